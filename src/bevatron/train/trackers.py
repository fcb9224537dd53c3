"""Experiment trackers beside metrics.jsonl: tensorboard, trackio, wandb. All optional; none of them
may stop a run."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from bevatron.errors import BevatronError
from bevatron.train.config import LogConfig, RunConfig

Values = dict[str, float]


class Tracker(Protocol):
    def log(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class Tensorboard:
    """Event files in `RUN/tensorboard`. Steps that a resume will do again are taken back."""

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=10
        )

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """One W&B run per run folder; a resume goes on with it."""

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        name = folder / "wandb-id.txt"
        if not name.exists():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run: Any = import_module("wandb").init(
            project=config.log.project,
            name=_name(config, folder),
            id=name.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json", by_alias=True),
        )

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A local trackio dashboard: `trackio show`."""

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self.package: Any = import_module("trackio")
        self.run: Any = self.package.init(
            project=config.log.project,
            name=_name(config, folder),
            resume="allow",
            config=config.model_dump(mode="json", by_alias=True),
        )

    def log(self, step: int, values: Values) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.package.finish()


# By their key under `log:`, which is also the package to install.
KINDS: dict[str, Callable[[RunConfig, Path, int], Tracker]] = {
    "tensorboard": Tensorboard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def _name(config: RunConfig, folder: Path) -> str:
    return config.log.name or folder.resolve().name


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
        step: that the run is at; the next line is of the one after.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self.open: dict[str, Tracker] = {}
        for name in asked_for(config.log):
            self._guard(name, lambda n=name: self._start(n, config, folder, step))  # type: ignore[misc]

    def _start(self, name: str, config: RunConfig, folder: Path, step: int) -> None:
        self.open[name] = KINDS[name](config, folder, step)

    def log(self, line: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl."""
        values = {k: float(v) for k, v in line.items() if isinstance(v, (int, float))}
        step = int(values.pop("step"))
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
