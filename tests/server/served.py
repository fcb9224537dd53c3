"""Real servers in processes of their own, and the small models that they serve."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch
import transformers

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve café, 日本語, 🙂🙃! " * 4
CONTEXT = 256
ENDLESS = 100_000_000  # tokens of an answer that no machine ends within the time of a test


def make_model(
    folder: Path,
    *,
    template: str | None = TEMPLATE,
    eos: int | None = 1,
    context: int = CONTEXT,
) -> Path:
    """A random Llama with a byte-level tokenizer, whose answers are arbitrary bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=eos,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>"}
    described |= {"eos_token": "<|end|>", "model_max_length": context}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def make_endless(folder: Path) -> Path:
    """A model that does not end by itself, in a context that is never full. (A special token after
    an answer in the template would end it.)"""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return make_model(folder, eos=None, template=template, context=ENDLESS)


def make_obedient(folder: Path, pieces: list[str], *, template: str) -> Path:
    """A model that answers with these pieces, whatever it is asked: each token has one successor,
    which its row of the embedding and of the head spell out; layers add nothing."""
    from tokenizers import AddedToken, Tokenizer

    make_model(folder, template=template)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer.save(str(folder / "tokenizer.json"))
    chain = [tokenizer.token_to_id(t) for t in ("<|assistant|>", *pieces, "<|end|>")]
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.vocab_size = tokenizer.get_vocab_size()
    config.hidden_size = config.num_attention_heads * -(-config.vocab_size // 4)
    config.hidden_size += config.hidden_size % 8
    config.head_dim = 16
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        for token in range(config.vocab_size):
            model.model.embed_tokens.weight[token, token] = 1.0
        for token, following in pairwise(chain):
            model.lm_head.weight[following, token] = 1.0
    model.save_pretrained(folder)
    return folder


@dataclass
class Served:
    """A server that runs."""

    process: subprocess.Popen[str]
    port: int
    model: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=600, headers=self.headers, **options)

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=600, headers=self.headers, **options)

    def post_raw(self, path: str, content: Any, headers: dict[str, str]) -> httpx.Response:
        given = {**self.headers, **headers}
        return httpx.post(self.url + path, content=content, timeout=600, headers=given)

    def metric(self, name: str) -> float:
        found = re.search(rf"^bevatron_{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def idle(self, seconds: float = 10) -> bool:
        """Whether nothing runs, nothing waits and the cache is empty, soon."""
        until = time.monotonic() + seconds
        names = ("requests_running", "requests_waiting", "cached_tokens")
        while any(self.metric(name) for name in names):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True


@contextmanager
def served(model: Path, *options: str) -> Iterator[Served]:
    """`bevatron serve` on a free port; on leaving it must end well after one SIGTERM."""
    command = [sys.executable, "-m", "bevatron", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"serving (\S+) at http://\S+:(\d+)", line):
            break
    else:
        raise AssertionError(f"status {process.wait()}: {said}")
    try:
        yield Served(process, int(found[2]), found[1])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        status = process.wait(30)
        process.stderr.close()
    assert "Traceback" not in rest, rest
    assert status in (0, 128 + signal.SIGTERM), rest
