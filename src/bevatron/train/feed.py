"""What feeds a run: which samples a step takes, and the state that is saved with a step.

Samples are read a step ahead. Most feeds are functions of the position in an endless order of
samples and have no state. A feed with state implements `snapshot` and `restore`. A feed whose
batches all ranks make together, such as by sampling from the trained model, is `collective`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from bevatron.checkpoint.storage import threads_are_free
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import Samples, Stored
from bevatron.train.run_start import Start

if TYPE_CHECKING:
    from bevatron.train.trainer import Trainer

Batch = dict[str, NDArray[Any]]
Memory = dict[str, Any]  # JSON, and arrays under names of their own
ARRAYS = "feed.safetensors"  # of a step folder: the arrays of its feed's memory
Since = tuple[int, int, int]  # from this step (counted from 0) and sample on, so many a step


class Batches:
    """The position in the order of samples, as a function of the step.

    Args:
        history: what held from when on; the first from step 0, then ascending.
    """

    def __init__(self, history: Sequence[Since]) -> None:
        self.history = [(int(step), int(at), int(size)) for step, at, size in history]

    @classmethod
    def of(cls, global_batch: int) -> Batches:
        """Those of a run whose global batch never changed."""
        return cls([(0, 0, global_batch)])

    @classmethod
    def saved(cls, state: Mapping[str, Any], global_batch: int) -> Batches:
        """Those of a step's train_state.json, which did not have them in earlier versions: its
        samples were always step * `global_batch`, that of its configuration."""
        return cls(state.get("batches", [(0, 0, global_batch)]))

    def followed_by(self, step: int, global_batch: int) -> Batches:
        """The same up to `step`, and batches of this size after it."""
        if self.history[-1][2] == global_batch:
            return self
        before = [since for since in self.history if since[0] < step]
        return Batches([*before, (step, self.position(step), global_batch)])

    def position(self, step: int) -> int:
        """The first sample of update number `step` (from 0): how many came before it."""
        first, at, size = next(s for s in reversed(self.history) if s[0] <= step)
        return at + (step - first) * size

    def state(self) -> list[Since]:
        """What train_state.json keeps of it."""
        return self.history


class Feed(ABC):
    """While a step computes, a thread reads the next one's samples. An error on the way is raised
    when that step asks for them. A collective feed reads when it is asked, on all ranks at once.

    Args:
        global_batch: samples of a step over all ranks.
        dp_rank, dp: which contiguous part of them is this rank's.
        batches: which samples a step takes, if not always so many.

    Attributes:
        collective: whether all ranks take part in making a batch; those with equal `dp_rank` are
            asked for the same positions and must get the same. Whether to stop has been agreed by
            then, and a signal meanwhile waits for the step's end.
        alive: to be called now and then by what takes long before the first batch.
        wait_s: seconds for which the last `batch` had to wait for its samples.
        reported: what a collective feed says of its last batch, for the step's metrics.
    """

    collective: ClassVar[bool] = False

    def __init__(
        self,
        *,
        global_batch: int,
        dp_rank: int,
        dp: int,
        device: torch.device,
        batches: Batches | None = None,
    ) -> None:
        self.global_batch, self.dp_rank, self.dp = global_batch, dp_rank, dp
        self.batches = batches or Batches.of(global_batch)
        self.device = device
        self.wait_s = 0.0
        self.reported: dict[str, float] = {}
        self.alive: Callable[[], None] = lambda: None
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[tuple[Batch, Memory]]] | None = None
        self._memories: dict[int, Memory] = {}  # by how many batches had been taken
        if threads_are_free() and not self.collective:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="feed")

    @classmethod
    @abstractmethod
    def open(
        cls,
        config: RunConfig,
        start: Start,
        *,
        stored: Stored | None,
        rounded: bool,
        **options: Any,
    ) -> Self:
        """That of a run. Options as above, and `seed`.

        Args:
            stored: arrays that join the samples.
            rounded: mix by rounded weights, as the run was begun; see `data.sample_order.Shares`.
        """

    @classmethod
    @abstractmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        """Open all data once, before any process starts. Raises BevatronError if some does not
        fit."""

    @classmethod
    def memory(cls, config: RunConfig, spec: ModelSpec, rank: int, ranks: int) -> tuple[int, int]:
        """Bytes that it takes on one of so many ranks, of a device: between steps, and at most
        while it makes a batch."""
        return 0, 0

    @staticmethod
    @abstractmethod
    def hash_of(path: str) -> str:
        """Of a source: the same for the same content anywhere."""

    @abstractmethod
    def read_training(self, positions: range) -> Batch:
        """The samples at these positions of the endless training order. Runs in a thread."""

    @abstractmethod
    def read_validation(self, positions: range) -> Batch:
        """The same of the validation order, which is the same in every run. Samples that count for
        nothing from position `validation_samples` on."""

    @property
    @abstractmethod
    def validation_samples(self) -> int:
        """How many make one pass over the validation's data."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """The hash of each training source, by the path under which the configuration has it."""

    @abstractmethod
    def summary(self, steps: int) -> list[str]:
        """Lines about what a run of so many steps takes."""

    def bind(self, trainer: Trainer) -> None:
        """Before the first batch: what is trained, for a feed that asks it. Its weights are in
        place, and those of the updates so far whenever a collective feed is asked."""
        self.trainer = trainer

    def check_step(self, step: int, reported: Mapping[str, float]) -> None:
        """Before update number `step` (from 0) is applied, on all ranks: what the objective reports
        of it. Raises BevatronError if it must not be."""
        del step, reported

    def read_step(self, step: int) -> Batch:
        """This rank's samples of update number `step` (from 0). Runs in a thread."""
        return self.read_training(self._mine(self.batches.position(step)))

    def snapshot(self) -> Memory:
        """What the samples after the last ones read depend on besides their positions, the same on
        every rank: JSON, and numpy arrays, which are not changed afterwards. Called after each
        reading, where that was done."""
        return {}

    def restore(self, memory: Memory) -> None:
        """Go on from a `snapshot`, at whatever layout; here, one of a feed that remembers, which
        the run had before its objective became another."""
        del memory

    def state(self, step: int) -> dict[str, Any]:
        """What train_state.json keeps, once `step` updates have been made."""
        out: dict[str, Any] = {"samples": self.batches.position(step)}
        out["batches"] = self.batches.state()
        if memory := self._memories.get(step):
            out["feed"] = {k: v for k, v in memory.items() if not isinstance(v, np.ndarray)}
        return out

    def arrays(self, step: int) -> dict[str, NDArray[Any]]:
        """What the step's folder keeps beside train_state.json, as `ARRAYS`."""
        memory = self._memories.get(step) or {}
        return {k: v for k, v in memory.items() if isinstance(v, np.ndarray)}

    def load(self, state: Mapping[str, Any], folder: Path | None = None) -> None:
        """Go on from a `state`, whose batches are those of this feed already, and from the arrays
        that lie in the step's `folder`."""
        arrays = folder / ARRAYS if folder is not None else None
        kept = load_file(arrays) if arrays is not None and arrays.is_file() else {}
        if memory := state.get("feed", {}) | kept:
            self.restore(memory)
            self._memories = {int(state["step"]): memory}

    def batch(self, step: int) -> Samples:
        """This rank's samples of update number `step` (from 0)."""
        began, self.reported = time.perf_counter(), {}
        rows = self._take(step)
        self.wait_s = time.perf_counter() - began
        return self._to_device(rows)

    def validation_batch(self, number: int) -> Samples:
        """The same of validation batch `number`: the same samples in every run, in their order."""
        return self._to_device(self.read_validation(self._mine(number * self.global_batch)))

    def close(self) -> None:
        """Stop reading ahead. Batches can still be had."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._reader = self._ahead = None

    def changed_sources(self, recorded: Mapping[str, str]) -> list[str]:
        """A sentence about each source that is no longer what it was when a checkpoint recorded
        its `fingerprints()`: samples are lost or repeated."""
        return [
            f"{path}: is not the data that this run was trained on so far (its hash is {found}, "
            f"was {recorded[path]}), so samples are lost or repeated"
            for path, found in self.fingerprints().items()
            if recorded.get(path, found) != found
        ]

    def _mine(self, begin: int) -> range:
        """This rank's positions of the global batch whose first is `begin`."""
        n = self.global_batch // self.dp
        first = begin + self.dp_rank * n
        return range(first, first + n)

    def _read(self, step: int) -> tuple[Batch, Memory]:
        rows = self.read_step(step)
        return rows, self.snapshot()

    def _take(self, step: int) -> Batch:
        rows, memory = self._read_or_wait(step)
        # A step that is not taken after all, as another rank was asked to stop, is not saved: the
        # memory before it is still there.
        before = {step: self._memories[step]} if step in self._memories else {}
        self._memories = before | {step + 1: memory}
        return rows

    def _read_or_wait(self, step: int) -> tuple[Batch, Memory]:
        ahead, self._ahead = self._ahead, None
        if self._reader is None:
            return self._read(step)
        try:
            if ahead is None or ahead[0] != step:  # the first step, or one that is done again
                ahead = step, self._reader.submit(self._read, step)
            following = self._reader.submit(self._read, step + 1)
        except RuntimeError:  # no thread can be started
            self._reader = None
            return self._read(step)
        self._ahead = step + 1, following
        return ahead[1].result()

    def _to_device(self, rows: Batch) -> Samples:
        return {name: torch.from_numpy(array).to(self.device) for name, array in rows.items()}
