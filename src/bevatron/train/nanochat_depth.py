"""NanoChat's dial: `model: {spec: {depth: 20}}` says a whole pretraining by one number.

The depth gives the widths, and wherever the configuration says nothing, sequence length, batch,
horizon, optimizer and learning rate, as scripts/base_train.py of github.com/karpathy/nanochat does.
What it gives is filled into the configuration before it is checked, so `--print-config` has it.

The architecture is that of October 2025, which transformers has a class for, and so are the rules
by default. NanoChat's architecture of 2026 has no class there (windows, value embeddings, lambdas,
smear, backout). Its rules of July 2026, which scale batch, rates and weight decay with the depth,
can be chosen for this architecture too, as far as AdamW and Muon here have their settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from bevatron.families.published_models import nanochat
from bevatron.spec import ModelSpec
from bevatron.spec.count import parameter_count
from bevatron.train.config_objective import Section

RULES = Literal["october_2025", "july_2026"]
TUNED_WIDTH = 768  # that the rates of embedding and head were tuned at
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19  # and, in tokens, what July 2026 scales from
SEQ_LEN = 2048
# Sections of which the dial fills what is left out, but only while this key has that value.
ONLY_IF = {"optimizer": ("name", "muon"), "schedule": ("name", "wsd")}

Sections = dict[str, dict[str, Any]]


class DepthConfig(Section):
    """NanoChat's model of some depth, and with it the batch, horizon, optimizer and schedule where
    the configuration leaves them out."""

    depth: int = Field(ge=1, examples=[20])
    """Layers; a layer has 64 channels and half a head of 128 for each of them, rounded up."""
    vocab_size: int = Field(65536, ge=1)
    """Of the tokenizer that it is trained with."""
    rules: RULES = "october_2025"
    """Whose batch, horizon and rates: october_2025, those of this architecture; july_2026, which
    scale with the depth."""

    @property
    def model(self) -> ModelSpec:
        return nanochat(self.depth, self.vocab_size)

    def __str__(self) -> str:
        return f"NanoChat of depth {self.depth}"


@dataclass(frozen=True)
class _Rules:
    """Attributes:
    ratio: tokens per parameter, of all parameters or (`of_matrices`) of the matrices that tokens
        are multiplied with.
    matrix, embedding, head: learning rates; of the last two at a width of 768.
    scaled: batch, rates and weight decay by the horizon (arXiv 2505.13738, 2405.13698).
    """

    ratio: int
    of_matrices: bool
    scaled: bool
    matrix: float
    embedding: float
    head: float
    weight_decay: float
    optimizer: Mapping[str, Any]
    warmup_steps: int
    warmdown: float
    final: float

    def horizon(self, spec: ModelSpec) -> int:
        """Tokens."""
        counted = parameter_count(spec)
        if self.of_matrices:
            counted -= spec.vocab_size * spec.hidden_size  # the embedding
        return self.ratio * counted


KNOWN: Mapping[str, _Rules] = {
    "october_2025": _Rules(
        ratio=20,
        of_matrices=False,
        scaled=False,
        matrix=0.02,
        embedding=0.2,
        head=0.004,
        weight_decay=0.0,
        optimizer={"betas": [0.8, 0.95], "eps": 1e-10, "clip_grad": 1.0},
        warmup_steps=0,
        warmdown=0.2,
        final=0.0,
    ),
    "july_2026": _Rules(
        ratio=12,
        of_matrices=True,
        scaled=True,
        matrix=0.02,
        embedding=0.3,
        head=0.008,
        weight_decay=0.28,  # of matrices alone
        optimizer={
            "betas": [0.8, 0.96],
            "eps": 1e-10,
            "clip_grad": 0.0,
            "no_decay": ["norm", "embedding", "bias", "head", "score"],
            "muon": {"momentum": 0.97, "momentum_start": 0.85, "momentum_warmup": 400},
        },
        warmup_steps=40,
        warmdown=0.65,
        final=0.05,
    ),
}


def values(dial: DepthConfig, seq_len: int = SEQ_LEN, global_batch: int | None = None) -> Sections:
    """What the dial says of each section.

    Args:
        global_batch: in samples, if the configuration has one; the rest follows from it."""
    spec, rules = dial.model, KNOWN[dial.rules]
    tokens = rules.horizon(spec)
    reference = rules.horizon(nanochat(REFERENCE_DEPTH, dial.vocab_size))
    if global_batch is None:
        batch = REFERENCE_BATCH
        if rules.scaled:
            batch = 2 ** round(math.log2(batch * (tokens / reference) ** 0.383))
        global_batch = max(1, batch // seq_len)
    share = global_batch * seq_len / REFERENCE_BATCH
    rate = rules.matrix * (math.sqrt(share) if rules.scaled else 1.0)
    decay = rules.weight_decay * (math.sqrt(share) * reference / tokens if rules.scaled else 1.0)
    width = (spec.hidden_size / TUNED_WIDTH) ** -0.5
    scales = {"embedding": rules.embedding, "head": rules.head}
    return {
        "data": {"seq_len": seq_len},
        "train": {
            "global_batch": global_batch,
            "steps": max(1, tokens // (global_batch * seq_len)),
        },
        "optimizer": {
            "name": "muon",
            "lr": _digits(rate),
            "lr_scale": {k: _digits(lr / rules.matrix * width) for k, lr in scales.items()},
            "weight_decay": _digits(decay),
            **rules.optimizer,
        },
        "schedule": {
            "name": "wsd",
            "warmup_steps": rules.warmup_steps,
            "min_lr": _digits(rate * rules.final),
            "decay": "linear",
            "decay_fraction": rules.warmdown,
        },
    }


def filled(raw: Any) -> Any:
    """A configuration as it was read, with what its dial says where it says nothing."""
    dial = _dial(raw)
    if dial is None:
        return raw
    out = dict(raw)
    for name, said in values(dial, *_given(raw)).items():
        own = raw.get(name) or {}
        if not isinstance(own, Mapping):
            continue
        key, value = ONLY_IF.get(name, ("", None))
        if own.get(key, value) == value:
            out[name] = {**said, **{k: v for k, v in own.items() if v is not None}}
    rate = out["optimizer"].get("lr") if isinstance(out.get("optimizer"), Mapping) else None
    own = raw.get("schedule") or {}
    if isinstance(rate, (int, float)) and "min_lr" not in own and "min_lr" in out["schedule"]:
        out["schedule"]["min_lr"] = _digits(rate * KNOWN[dial.rules].final)
    return out


def told(dial: DepthConfig, flat: Mapping[str, Any]) -> list[str]:
    """What the dial set, and what is otherwise than the depth alone would have it.

    Args:
        flat: value of every dotted key of the configuration."""
    spec = dial.model
    said = {f"{s}.{key}": value for s, keys in values(dial).items() for key, value in keys.items()}
    own = [key for key, value in said.items() if not _equal(flat, key, value)]
    sets = ", ".join(f"{key} {_short(value)}" for key, value in said.items() if key not in own)
    lines = [
        f"{dial}: {spec.hidden_size} channels, {spec.hidden_size // 128} heads, "
        f"{parameter_count(spec):,} parameters; by the rules of {dial.rules} it sets "
        + (sets or "nothing more")
    ]
    if own:
        others = (f"{key} {_short(_found(flat, key))} ({_short(said[key])})" for key in own)
        lines.append(f"otherwise than depth {dial.depth} alone would have it: {', '.join(others)}")
    return lines


def _found(flat: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or of all below it."""
    below = {k.removeprefix(f"{key}."): v for k, v in flat.items() if k.startswith(f"{key}.")}
    return flat.get(key, below)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _equal(flat: Mapping[str, Any], key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_equal(flat, f"{key}.{k}", v) for k, v in value.items())
    return bool(flat.get(key) == value)


def _dial(raw: Any) -> DepthConfig | None:
    model = raw.get("model") if isinstance(raw, Mapping) else None
    given = model.get("spec") if isinstance(model, Mapping) else None
    if isinstance(given, DepthConfig) or not isinstance(given, Mapping):
        return given if isinstance(given, DepthConfig) else None
    try:
        return DepthConfig.model_validate(dict(given))
    except ValueError:  # its own check says what is wrong; nothing else is missing then
        return DepthConfig(depth=1)


def _given(raw: Mapping[str, Any]) -> tuple[int, int | None]:
    """The sequence length and the batch that the configuration has."""
    found: list[int | None] = []
    for section, key in (("data", "seq_len"), ("train", "global_batch")):
        own = raw.get(section)
        value = own.get(key) if isinstance(own, Mapping) else None
        found.append(value if type(value) is int and value > 0 else None)
    return found[0] or SEQ_LEN, found[1]


def _digits(value: float) -> float:
    """With the digits that people read."""
    return float(f"{value:.4g}")
