"""Small Hugging Face folders with a tokenizer, of every family and layer kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.nn.llama_nemotron_reference import BLOCKS, ReferenceLlamaNemotron, published_config
from tests.nn.test_parity import ROPE, SMALL, save

VOCAB = 300
TEXT = ["the quick brown fox", "jumps over the lazy dog", "äöü € 😀 日本語"]


def tokenizer() -> Tokenizer:
    """Byte-level BPE: any text, and characters that are several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    made.train_from_iterator(TEXT * 3, trainer)
    return made


CLASSES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "three-kv-heads": ("Llama", {"num_key_value_heads": 3, "tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": ROPE["llama3"]}),
    "dynamic": ("Llama", {"rope_parameters": ROPE["dynamic"], "max_position_embeddings": 32}),
    "nemotron": ("Nemotron", {"head_dim": 16}),
    "nanochat": ("NanoChat", {"num_key_value_heads": 6}),
    "mistral": ("Mistral", {"sliding_window": None}),
}
KINDS = (*CLASSES, "llama-nemotron")


def make(folder: Path, kind: str, **changes: Any) -> Any:
    """Save a random model of a kind; returns what transformers computes it with."""
    if kind == "llama-nemotron":
        model = _llama_nemotron(folder)
    else:
        stem, more = CLASSES[kind]
        config = getattr(transformers, f"{stem}Config")(
            # a copy, for a configuration writes into what it is given
            **copy.deepcopy({**SMALL, "vocab_size": VOCAB, **more, **changes})
        )
        model = save(getattr(transformers, f"{stem}ForCausalLM")(config), folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return model


def _llama_nemotron(folder: Path) -> Any:
    import bevatron.hf  # noqa: F401  (registers the classes)

    config = published_config(BLOCKS, vocab_size=VOCAB)
    model = ReferenceLlamaNemotron(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise * 0.2 if "norm" in name else noise * 0.1
    folder.mkdir(exist_ok=True)
    tensors = {k: v for k, v in model.state_dict().items() if "rotary" not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own answer, of a fresh copy: its dynamic rope remembers longer sequences."""
    model = copy.deepcopy(model)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
