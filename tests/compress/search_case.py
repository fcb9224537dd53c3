"""A search small enough to be run often: a Llama of random weights, text of random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bevatron.compress.search.search import Search
from bevatron.compress.search.search_results import State
from bevatron.compress.verb_options import SearchOptions
from bevatron.data.token_store_writer import StoreWriter
from tests.compress.test_distill_command import teacher

SEQ_LEN, VAL_SAMPLES = 16, 6
PARAMS, WITHIN, MULTIPLE, HIDDEN = 15600, 0.05, 8, (24, 32)
OVERRIDES = ("optimizer.lr=1e-3", "train.global_batch=4", "checkpoint.every=1")
CANDIDATES = {"L2-H24-A4-F40", "L2-H32-A4-F16", "L3-H24-A4-F16"}


def tokens(path: Path, seed: int, count: int = 1000) -> Path:
    """Text in which a token says something of the next."""
    path.mkdir(parents=True)
    writer = StoreWriter(path, 101, None)
    steps = np.random.default_rng(seed).zipf(1.5, size=count)
    writer.add((np.cumsum(steps) % 101).tolist(), ends=True)
    writer.finish(tokenizer="toy", fingerprint="xxh3:0")
    return path


def make(folder: Path) -> Path:
    """A model and its text."""
    teacher(folder / "model", num_hidden_layers=3, hidden_size=32, initializer_range=0.2)
    tokens(folder / "train", 1)
    tokens(folder / "held-out", 2)
    return folder


def options(folder: Path, **changes: Any) -> SearchOptions:
    given: dict[str, Any] = {
        "params": PARAMS,
        "within": WITHIN,
        "multiple": MULTIPLE,
        "num_attention_heads": (4,),
        "hidden_size": HIDDEN,
        "data": (folder / "train",),
        "validation": (folder / "held-out",),
        "samples": 8,
        "seq_len": SEQ_LEN,
        "val_samples": VAL_SAMPLES,
        "steps": 3,
        "short": 2,
        "overrides": OVERRIDES,
    }
    return SearchOptions(**{**given, **changes})


def arguments(folder: Path, target: Path) -> list[str]:
    """The same on the command line."""
    pairs = {
        "params": PARAMS, "within": WITHIN, "multiple": MULTIPLE, "num-attention-heads": 4,
        "hidden-size": ",".join(map(str, HIDDEN)), "data": folder / "train",
        "validation": folder / "held-out", "samples": 8, "seq-len": SEQ_LEN,
        "val-samples": VAL_SAMPLES, "steps": 3, "short": 2,
    }  # fmt: skip
    flags = [text for name, value in pairs.items() for text in (f"--{name}", str(value))]
    return ["search", str(folder / "model"), str(target), *OVERRIDES, *flags]


def search(folder: Path, target: Path, **changes: Any) -> State:
    return Search(
        str(folder / "model"), target, options(folder, **changes), lambda text: None
    ).run()
