"""Reading what a run folder says about its run, without torch and without trusting its files."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from bevatron.charts.thinning import Series
from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.manifest import FILE_NAME, read_manifest
from bevatron.checkpoint.run_folder import METRICS
from bevatron.errors import BevatronError, CheckpointError
from bevatron.spec import ModelSpec
from bevatron.spec.json import from_json

STARTS = "starts.jsonl"
_FOLDER = re.compile(r"(step|weights)-(\d{8,})")
CURVES: tuple[str, ...] = (
    "loss",
    "val_loss",
    "val_bpb",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "memory_gib",
)
CURVES += ("mfu", "mfu_causal", "val_ce", "reward", "val_reward", "kl", "entropy")
# Beginnings of the names of other curves:
FAMILIES = ("rewards/", "completions/", "sampling/", "clip_ratio/", "time/", "val_pass@")


@dataclass(frozen=True)
class Event:
    step: int
    kind: str  # skipped, rewound, stopped, restart, ...
    text: str
    bad: bool = False  # the guard's, of a step whose update was not applied


@dataclass(frozen=True)
class Checkpoint:
    """`state`: complete (all files there, in their sizes; no hash is computed), or what is not."""

    folder: str
    kind: str  # step, or weights
    step: int
    nbytes: int
    state: str


@dataclass
class Record:
    """One run. `config` and `spec` are of the newest step; None if it has none yet."""

    path: Path
    name: str
    series: dict[str, Series]
    events: list[Event]
    checkpoints: list[Checkpoint]
    config: dict[str, Any]
    spec: ModelSpec | None
    family: str | None
    starts: list[dict[str, Any]]
    headline: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "name": self.name,
            "family": self.family,
            **self.headline,
            "events": [vars(e) for e in self.events],
            "checkpoints": [vars(c) for c in self.checkpoints],
        }


def read_run(path: Path) -> Record:
    """Raises BevatronError if `path` holds neither metrics nor checkpoints of a run."""
    if not path.is_dir():
        raise BevatronError(f"{path}: is not a folder; expected a run's folder (its run.dir)")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and _FOLDER.fullmatch(p.name))
    if not folders and not (path / METRICS).is_file():
        raise BevatronError(
            f"{path}: holds neither {METRICS} nor a step folder; expected a run's folder (run.dir)"
        )
    metrics = _Metrics(_lines(path / METRICS))
    starts = list(_lines(path / STARTS))
    config, spec, family = _newest(folders)
    record = Record(
        path=path,
        name=path.resolve().name,
        series=metrics.series(),
        events=sorted([*metrics.events, *_restarts(starts)], key=lambda e: e.step),
        checkpoints=[_checkpoint(folder) for folder in folders],
        config=config,
        spec=spec,
        family=family,
        starts=starts,
    )
    record.headline = _headline(record, metrics)
    return record


def unique_names(records: Sequence[Record]) -> None:
    """Where two folders have one name, more of the path tells them apart."""
    names = [r.name for r in records]
    for record in records:
        if names.count(record.name) > 1:
            record.name = str(record.path)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one a line; what a crash cut short is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def _number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


class _Metrics:
    """One pass over metrics.jsonl, which may have a million lines: numbers in arrays, no dicts."""

    def __init__(self, lines: Iterator[dict[str, Any]]) -> None:
        self.found: dict[str, tuple[array[float], array[float]]] = {}
        self.events: list[Event] = []
        self.seconds = 0.0
        self.tokens: float | None = None
        self._before = 0.0
        for line in lines:
            if not _number(line.get("step")):
                continue
            if "event" in line:
                kind, text = str(line["event"]), _say(line, "step", "event")
                bad = "loss" in line or "grad_norm" in line
                self.events.append(Event(int(line["step"]), kind, text, bad))
            else:
                self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        step = float(line["step"])
        for key, value in line.items():
            if _number(value) and (key in CURVES or key.startswith(FAMILIES)):
                steps, values = self.found.setdefault(key, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
        if not _number(line.get("tokens")):
            return
        self.tokens, speed, took = line["tokens"], line.get("tokens_per_s"), line.get("step_s")
        if not _number(took) and _number(speed) and step and speed:
            took = line["tokens"] / step / speed
        # With log.every above 1 a line stands for the steps since the one before.
        self.seconds += float(took) * max(0.0, step - self._before) if _number(took) else 0.0
        self._before = step

    def series(self) -> dict[str, Series]:
        return {k: Series(np.array(s), np.array(v)) for k, (s, v) in self.found.items()}


def _restarts(starts: list[dict[str, Any]]) -> list[Event]:
    return [
        Event(int(x["step"]), "restart", "started again from here")
        for x in starts[1:]
        if _number(x.get("step"))
    ]


def _say(line: dict[str, Any], *but: str) -> str:
    """The rest of an event's line in words: its reason first."""
    rest = {k: v for k, v in line.items() if k not in (*but, "reason") and v is not None}
    reason = str(line.get("reason", ""))
    numbers = ", ".join(f"{k} {v:.6g}" if _number(v) else f"{k} {v}" for k, v in rest.items())
    return "; ".join(part for part in (reason, numbers) if part)


def _newest(folders: list[Path]) -> tuple[dict[str, Any], ModelSpec | None, str | None]:
    """Configuration, spec and family of the newest folder in which they can be read."""
    config: dict[str, Any] = {}
    spec: ModelSpec | None = None
    family = None
    for folder in sorted(folders, key=lambda p: p.name.rpartition("-")[2], reverse=True):
        try:
            if not config and (folder / "config.yaml").is_file():
                loaded = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
                config = loaded if isinstance(loaded, dict) else {}
            if spec is None and (folder / "spec.json").is_file():
                spec = from_json((folder / "spec.json").read_text(encoding="utf-8"))
                family = read_manifest(folder).family
        except (BevatronError, OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        if config and spec is not None:
            break
    return config, spec, family


def _checkpoint(folder: Path) -> Checkpoint:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    files = [p for p in folder.rglob("*") if p.is_file()]
    nbytes = sum(p.stat().st_size for p in files)
    return Checkpoint(folder.name, match[1], int(match[2]), nbytes, _state(folder))


def _state(folder: Path) -> str:
    if not (folder / FILE_NAME).is_file():
        return f"incomplete: no {FILE_NAME}"
    try:
        manifest = read_manifest(folder)
    except (CheckpointError, OSError) as error:
        return f"damaged: {error}".replace(f"{folder}/", "")
    ends: dict[str, int] = {}
    for tensor in manifest.tensors.values():
        for chunk in tensor.chunks:
            end = chunk.at + math.prod(chunk.shape) * ITEMSIZE[tensor.dtype]
            ends[chunk.file] = max(ends.get(chunk.file, 0), end)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            return f"damaged: {name} is missing"
        if path.stat().st_size < end:
            return f"damaged: {name} has {path.stat().st_size:,} bytes, expected {end:,}"
    return "complete"


def _headline(record: Record, metrics: _Metrics) -> dict[str, float | None]:
    """The numbers on top. `seconds`: of the steps themselves, without saving and validation."""
    series = record.series
    loss, val, bpb = (series.get(k) for k in ("loss", "val_loss", "val_bpb"))
    steps = record.config.get("train", {})
    planned = steps.get("steps") if isinstance(steps, dict) else None
    return {
        "steps": float(loss.steps[-1]) if loss else None,
        "planned_steps": float(planned) if _number(planned) else None,
        "loss": loss.last if loss else None,
        "val_loss": val.last if val else None,
        "best_val_loss": float(val.values.min()) if val else None,
        "val_bpb": bpb.last if bpb else None,
        "tokens": metrics.tokens,
        "seconds": metrics.seconds or None,
        "tokens_per_s": _median(series.get("tokens_per_s")),
        "mfu": _median(series.get("mfu")),
        "mfu_causal": _median(series.get("mfu_causal")),
        "memory_gib": float(series["memory_gib"].values.max()) if "memory_gib" in series else None,
        "parameters": float(sum(p.numel for p in record.spec.parameters()))
        if record.spec
        else None,
    }


def _median(series: Series | None) -> float | None:
    return float(np.median(series.values)) if series else None
