"""A search small enough to be run often: a Llama of random weights, text of random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bevatron.compress.search import Options, Search
from bevatron.compress.search_space import Axes, Goal
from bevatron.compress.search_state import State
from bevatron.data.writer import StoreWriter
from tests.compress.test_distill_command import teacher

VOCAB, SEQ_LEN = 101, 16
OVERRIDES = (
    "optimizer.lr=1e-3",
    "train.global_batch=4",
    "checkpoint.every=2",
    "schedule.name=constant",
)


def tokens(path: Path, seed: int, count: int = 1000) -> Path:
    """Text in which a token says something of the next."""
    path.mkdir(parents=True)
    writer = StoreWriter(path, VOCAB, None)
    steps = np.random.default_rng(seed).zipf(1.5, size=count)
    writer.add((np.cumsum(steps) % VOCAB).tolist(), ends=True)
    writer.finish(tokenizer="toy", fingerprint="xxh3:0")
    return path


def make(folder: Path) -> Path:
    """A model and its text."""
    teacher(folder / "model", num_hidden_layers=3, hidden_size=32, initializer_range=0.2)
    tokens(folder / "train", 1)
    tokens(folder / "held-out", 2)
    return folder


def options(folder: Path, **changes: object) -> Options:
    given = {
        "axes": Axes(num_attention_heads=(4,), hidden_size=(16, 24, 32)),
        "goal": Goal(16500, 0.2, multiple=8),
        "data": (folder / "train",),
        "validation": (folder / "held-out",),
        "samples": 8,
        "seq_len": SEQ_LEN,
        "val_samples": 6,
        "steps": 4,
        "short": 3,
        "long_steps": 6,
        "long": 2,
        "overrides": OVERRIDES,
    }
    return Options(**{**given, **changes})  # type: ignore[arg-type]


def search(folder: Path, target: Path, **changes: object) -> State:
    return Search(
        str(folder / "model"), target, options(folder, **changes), lambda text: None
    ).run()
