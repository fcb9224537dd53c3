"""The batches of a run, whatever they are made of, read a step ahead."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from numpy.typing import NDArray

from bevatron.checkpoint.storage import threads_are_free
from bevatron.train.batches import Batches
from bevatron.train.config import RunConfig
from bevatron.train.objectives import Samples, Stored
from bevatron.train.run_start import Start

Batch = dict[str, NDArray[Any]]


class ReadAhead(ABC):
    """Samples as a function of the step: nothing to save, nothing to lose.

    While a step computes, a thread reads the next one's samples. An error on the way is raised when
    that step asks for them.

    Args:
        global_batch: samples of a step over all ranks.
        dp_rank, dp: which contiguous part of them is this rank's.
        batches: which samples a step takes, if not always so many.

    Attributes:
        wait_s: seconds for which the last `batch` had to wait for its samples.
    """

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
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Batch]] | None = None
        if threads_are_free():
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

    def batch(self, step: int) -> Samples:
        """This rank's samples of update number `step` (from 0)."""
        began = time.perf_counter()
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

    def _read(self, step: int) -> Batch:
        return self.read_training(self._mine(self.batches.position(step)))

    def _take(self, step: int) -> Batch:
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
