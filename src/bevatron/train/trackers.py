"""Experiment trackers beside metrics.jsonl: tensorboard, trackio and wandb.

All of them are optional, and none of them may stop a run.

A run that was killed repeats steps that the trackers already have. Each tracker shows every step
once all the same: what was logged after the step that the run continues from is removed if the
tracker can do so; else the run is logged anew from its beginning, with the lines of metrics.jsonl.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from bevatron.checkpoint.run_folder import RunFolder
from bevatron.errors import BevatronError
from bevatron.train.config import LogConfig, RunConfig

Values = dict[str, float]
Line = dict[str, Any]  # of metrics.jsonl


@dataclass(frozen=True)
class Past:
    """What earlier starts logged.

    Attributes:
        kept: lines of the run as it goes on; `step`: the last of them, -1 if it begins.
        lost: whether there are lines of later steps, which come again.
    """

    step: int
    kept: list[Line]
    lost: bool


class Tracker(Protocol):
    def log(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class Tensorboard:
    """Event files in `RUN/tensorboard`. Steps that a resume will do again are taken back."""

    def __init__(self, config: RunConfig, folder: Path, past: Past) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = past.step + 1 if past.kept or past.lost else None
        self.writer: Any = SummaryWriter(
            str(folder / "tensorboard"), purge_step=purge, flush_secs=10
        )

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """One W&B run per run folder; a resume goes on with it, unless steps come again: what W&B has
    of a run cannot be taken back, so another one of the same name begins."""

    def __init__(self, config: RunConfig, folder: Path, past: Past) -> None:
        name = folder / "wandb-id.txt"
        if past.lost or not name.exists():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run: Any = import_module("wandb").init(
            project=config.log.project,
            name=_name(config, folder),
            id=name.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json", by_alias=True),
        )
        _log_again(self, past)

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A local trackio dashboard: `trackio show`. A run whose steps come again is deleted there and
    logged anew; one that lies elsewhere (on a server) stays, and another name is used."""

    def __init__(self, config: RunConfig, folder: Path, past: Past) -> None:
        self.package: Any = import_module("trackio")
        file, name = folder / "trackio-name.txt", _name(config, folder)
        if file.exists() and (other := file.read_text(encoding="utf-8")).startswith(
            f"{name}-from-"
        ):
            name = other
        if past.lost and not self._deleted(config.log.project, name):
            name = f"{name}-from-{max(0, past.step)}"
            file.write_text(name, encoding="utf-8")
        self.run: Any = self.package.init(
            project=config.log.project,
            name=name,
            resume="allow",
            config=config.model_dump(mode="json", by_alias=True),
        )
        _log_again(self, past)

    def _deleted(self, project: str, name: str) -> bool:
        """Whether all runs of this name on this machine could be deleted."""
        try:
            runs = [run for run in self.package.Api().runs(project) if run.name == name]
        except ValueError:  # no such project here
            return False
        deleted = [run.delete() for run in runs]
        return bool(deleted) and all(deleted)

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.package.finish()


# By their key under `log:`, which is also the package to install.
KINDS: dict[str, Callable[[RunConfig, Path, Past], Tracker]] = {
    "tensorboard": Tensorboard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def _name(config: RunConfig, folder: Path) -> str:
    return config.log.name or folder.resolve().name


def _log_again(tracker: Tracker, past: Past) -> None:
    """Give a new run of a tracker what is kept of the old one, if that had to be left."""
    for line in past.kept if past.lost else ():
        tracker.log(int(line["step"]), _numbers(line))


def _numbers(line: Line) -> Values:
    """Those of a line of metrics.jsonl, without its step."""
    return {
        name: float(value)
        for name, value in line.items()
        if name != "step" and isinstance(value, (int, float))
    }


def asked_for(log: LogConfig) -> list[str]:
    return [name for name in KINDS if getattr(log, name)]


def check_trackers(log: LogConfig) -> None:
    """Raise BevatronError for a tracker that is asked for and not installed."""
    for name in asked_for(log):
        if find_spec(name) is None:
            raise BevatronError(
                f"log.{name} is true but {name} is not installed; `pip install {name}`, or set "
                f"log.{name}: false (metrics.jsonl is written anyway)"
            )


class Trackers:
    """All that a run asked for. One that fails is named on stderr and left out from then on.

    Args:
        step: that the run goes on from, -1 if it begins: later lines of metrics.jsonl, which is
            still as the start before left it, are of steps that come again.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self.open: dict[str, Tracker] = {}
        names = asked_for(config.log)
        lines = [line for _, line in RunFolder(folder).metrics()] if names else []
        kept = [line for line in lines if line["step"] <= step]
        past = Past(step, kept, lost=len(kept) < len(lines))
        for name in names:
            self._guard(name, lambda n=name: self._start(n, config, folder, past))  # type: ignore[misc]

    def _start(self, name: str, config: RunConfig, folder: Path, past: Past) -> None:
        self.open[name] = KINDS[name](config, folder, past)

    def log(self, line: Line) -> None:
        """The numbers of a line of metrics.jsonl."""
        values, step = _numbers(line), int(line["step"])
        for name, tracker in list(self.open.items()):
            self._guard(name, lambda t=tracker: t.log(step, values))  # type: ignore[misc]

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            self._guard(name, tracker.close)

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a network, a full disk, the tracker's own faults
            self.open.pop(name, None)
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(
                f"warning: log.{name} failed and is off from here on ({said}); training and "
                "metrics.jsonl go on",
                file=sys.stderr,
                flush=True,
            )
