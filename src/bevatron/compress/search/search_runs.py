"""The distillations of a search: their configurations, and what is left of them afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bevatron.checkpoint.new_folder import replace_text
from bevatron.checkpoint.run_folder import RunFolder, step_of
from bevatron.compress.search.search_state import SearchError
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout
from bevatron.train.config import RunConfig
from bevatron.train.config_file import checked, to_yaml

# What the search says itself, and with which option.
OWN = {
    "model": "CKPT",
    "run": "DIR",
    "data.train": "--data",
    "data.validation": "--validation",
    "data.seq_len": "--seq-len",
    "train.steps": "--steps and --long-steps",
    "train.seed": "--seed",
    "train.precision": "--dtype",
    "parallel.tp": "--tp",
    "parallel.pp": "--pp",
    "parallel.dp_shard": "--dp-shard",
    "parallel.dp_replicate": "--nproc",
}


def given(path: str) -> str:
    """A path as every later start can use it, wherever it is started; a Hub id or URL as it is."""
    found = Path(path)
    return str(found.resolve()) if found.exists() else path


def configuration(
    *,
    student: Path,
    teacher: str,
    run: Path,
    steps: int,
    data: Sequence[Path],
    validation: Sequence[Path],
    seq_len: int,
    val_samples: int,
    precision: str,
    seed: int,
    layout: Layout,
    overrides: Sequence[str],
) -> RunConfig:
    """Of one distillation: Minitron's recipe (forward KL, cosine to a tenth, short warmup), with
    the held-out loss at ten moments, saved at four, changed by `overrides`. Raises SearchError."""
    for override in overrides:
        key = override.partition("=")[0]
        for own, option in OWN.items():
            if key == own or key.startswith(f"{own}.") or own.startswith(f"{key}."):
                raise SearchError(f"override {override!r}: {own} is the search's own: use {option}")
    raw: dict[str, Any] = {
        "model": {"init": str(student)},
        "objective": {"name": "distill", "teacher": teacher},
        "data": {
            "train": [{"path": given(str(p)), "weight": float(_tokens(p))} for p in data],
            "validation": [{"path": given(str(p))} for p in validation],
            "seq_len": seq_len,
        },
        "parallel": {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp_shard": layout.dp_shard,
            "dp_replicate": layout.dp_replicate,
        },
        "train": {"steps": steps, "global_batch": 32, "precision": precision, "seed": seed},
        "optimizer": {"lr": 1e-4},
        "schedule": {"name": "cosine", "warmup_steps": min(40, steps // 10), "min_lr": 1e-5},
        "checkpoint": {"every": max(1, steps // 4), "keep": 1},
        "run": {"dir": str(run)},
    }
    raw["train"]["val_every"] = max(1, steps // 10)
    try:
        config = checked(raw, overrides, "the distillation's configuration")
    except BevatronError as error:
        raise SearchError(str(error)) from error
    if not any(override.startswith("train.val_batches=") for override in overrides):
        # As many samples as the loss of a stage is of.
        held_out = Sampler([(TokenStore.open(p), 1.0) for p in validation], seq_len, 0)
        samples = min(val_samples, held_out.epoch_length)
        batches = max(1, samples // config.train.global_batch)
        train = config.train.model_copy(update={"val_batches": batches})
        config = config.model_copy(update={"train": train})
    return config


def _tokens(path: Path) -> int:
    return TokenStore.open(path).tokens


def write(config: RunConfig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, to_yaml(config))


def is_finished(run: Path, steps: int) -> bool:
    """Whether the run's last step is saved."""
    newest = RunFolder(run).newest()
    return newest is not None and step_of(newest) >= steps


def drop_weights(run: Path) -> None:
    """Delete a run's steps. What it logged stays, for the page and for `bevatron report`."""
    for folder in RunFolder(run).folders():
        remove(folder)
    (run / "latest").unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a folder, which from the first moment on is no checkpoint any more."""
    gone = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(gone, ignore_errors=True)  # left by a killed process
    if folder.is_dir():
        folder.rename(gone)
        shutil.rmtree(gone)


def clear(folder: Path) -> None:
    """What a process that was killed while deleting left behind."""
    for gone in folder.rglob(".*.deleted"):
        shutil.rmtree(gone, ignore_errors=True)
