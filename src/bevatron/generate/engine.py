"""Text from a checkpoint: greedy or sampled, with a KV cache, in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevatron.bridge.opened import Opened, open_weights
from bevatron.errors import BevatronError
from bevatron.generate.cache import make_caches
from bevatron.generate.load import load_opened
from bevatron.generate.sampling import Sampling, choose
from bevatron.nn.decoder import Decoder
from bevatron.parallel.world import default_device


@dataclass(frozen=True)
class Generation:
    """A completion: its text without special tokens, its token ids (a stop token included), and
    `stop` (a stop token came) or `length`."""

    text: str
    tokens: list[int]
    finish_reason: str


def generate(
    ckpt: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Generation:
    """Complete `prompt` with a native checkpoint, a run, an HF folder or a Hub id."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 1:
        raise BevatronError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    opened = open_weights(ckpt)
    if opened.spec.head.kind != "causal_lm":
        raise BevatronError(
            f"{opened.folder}: has the head {opened.spec.head.kind}; only a model with a causal_lm "
            "head can generate text"
        )
    tokenizer = load_tokenizer(opened)
    ids: list[int] = tokenizer.encode(prompt).ids
    if not ids:
        raise BevatronError("the prompt has no tokens; give at least one character")
    if max(ids) >= opened.spec.vocab_size:
        raise BevatronError(
            f"{opened.source}: the tokenizer gave token {max(ids)}, the model has "
            f"{opened.spec.vocab_size}; it belongs to another model"
        )
    decoder, _ = load_opened(opened, default_device())
    stops = stop_tokens(opened)
    tokens = list(decode(decoder, ids, sampling, max_new_tokens, stops))
    text = completion_text(tokenizer, ids, tokens)
    return Generation(text, tokens, "stop" if tokens[-1] in stops else "length")


@torch.inference_mode()
def decode(
    decoder: Decoder, ids: list[int], sampling: Sampling, limit: int, stops: frozenset[int]
) -> Iterator[int]:
    """Yield new tokens one by one; ends after a stop token or `limit` tokens."""
    weight = next(decoder.parameters())
    generator = torch.Generator().manual_seed(sampling.seed)
    caches = make_caches(decoder.spec, 1, len(ids) + limit, weight.dtype, weight.device)
    new = torch.tensor([ids], device=weight.device)  # [1, T]
    position = 0
    for _ in range(limit):
        positions = torch.arange(position, position + new.shape[1], device=weight.device)[None]
        logits = decoder(new, _last(decoder), positions=positions, caches=caches)  # [1, V]
        position += new.shape[1]
        token = choose(logits, sampling, generator)
        yield int(token)
        if int(token) in stops:
            return
        new = token[:, None]


def _last(decoder: Decoder) -> Any:
    """Logits of the last position only: a prompt's other logits are never made."""

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        return decoder.to_logits(hidden[:, -1], weight)

    return compute


def load_tokenizer(opened: Opened) -> Any:
    """The source's tokenizer.json, by the tokenizers library."""
    from tokenizers import Tokenizer

    path = opened.source / "tokenizer.json" if opened.source else None
    if path is None or not path.is_file():
        raise BevatronError(
            f"{opened.folder}: has no tokenizer.json among its source files; import a folder that "
            "has one, or name `tokenizer` in the run configuration"
        )
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BevatronError(f"{path}: cannot be read as a tokenizer ({error})") from error


def stop_tokens(opened: Opened) -> frozenset[int]:
    """End-of-sequence ids: generation_config.json's, else config.json's; one or a list."""
    for name in ("generation_config.json", "config.json"):
        if text := opened.source_text(name):
            found = json.loads(text).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def completion_text(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """The text that `tokens` add to the prompt's (decoding them alone may lose a space)."""
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    whole = str(tokenizer.decode(prompt + tokens, skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
