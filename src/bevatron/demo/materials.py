"""What the demo works with, made from files that every machine has.

It makes real text, a tokenizer trained on that text, and a small random Llama-3-style Hugging Face
folder that transformers itself saves.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bevatron.errors import BevatronError

TEXT_BYTES = 4_000_000
VOCAB_SIZE = 4096
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def copy_text(target: Path) -> int:
    """Copy Python's own library and licence into `target`, up to TEXT_BYTES; returns the bytes."""
    target.mkdir(parents=True)
    copied = 0
    for path in _library():
        size = path.stat().st_size
        if copied + size > TEXT_BYTES:
            continue
        shutil.copyfile(path, target / path.name)
        copied += size
    if copied < TEXT_BYTES // 8:
        raise BevatronError(f"found only {copied} bytes of text in Python's library; need more")
    return copied


def _library() -> Iterator[Path]:
    """Documentation topics and licence first, then the modules by name."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    first = [stdlib / "pydoc_data" / "topics.py", stdlib / "LICENSE.txt"]
    yield from (p for p in first if p.is_file())
    yield from sorted(p for p in stdlib.glob("*.py") if p.is_file())


def make_model(text: Path, target: Path) -> None:
    """A random Llama-3-style model (GQA, llama3 rope) and its tokenizer, as Hugging Face has it."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BevatronError(
            "the demo makes its model with transformers; install it: pip install 'bevatron[hf]'"
        ) from error
    target.mkdir(parents=True)
    vocab = _train_tokenizer(text, target)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [1, 4]
    model.save_pretrained(target)


def _train_tokenizer(text: Path, target: Path) -> int:
    """Byte-level BPE over the text, in the files that transformers reads; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in sorted(text.iterdir())], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], 0)]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return int(tokenizer.get_vocab_size())
