"""Validating a run: when it is done, on how much of the validation data, and how."""

from __future__ import annotations

from functools import partial
from typing import Any

from bevatron.progress import progress
from bevatron.train.config import RunConfig
from bevatron.train.feed import Feed
from bevatron.train.hang_watch import Watch
from bevatron.train.processes_and_signals import Stopping
from bevatron.train.step_metrics import Meter
from bevatron.train.trainer import Trainer


class Validation:
    """All ranks do it together: at the start, every so many steps, and at the end."""

    def __init__(
        self,
        config: RunConfig,
        feed: Feed,
        trainer: Trainer,
        meter: Meter,
        stopping: Stopping,
        watch: Watch,
    ) -> None:
        self.config, self.feed, self.trainer, self.meter = config, feed, trainer, meter
        self.stopping, self.watch = stopping, watch
        self.every, self.steps = config.validates_every, config.train.steps
        self.samples = config.validation_samples(feed.validation_samples)
        self.batches = -(-self.samples // config.train.global_batch)

    def line(self) -> str | None:
        """What the start says of it; None if the configuration names no validation data."""
        sets = ", ".join(source.path for source in self.config.data.validation)
        if not sets:
            return None
        if not self.every:
            return f"validation: never (train.val_every is 0), though there is {sets}"
        whole = self.feed.validation_samples
        much = f"{self.samples:,} samples, all there are"
        if self.samples < whole:
            much = f"the first {self.samples:,} of {whole:,} samples (train.val_batches)"
        between = f"every {self.every:,} steps, " if self.every < self.steps else ""
        return (
            f"validation: {sets}: {much}, in {self.batches:,} batch"
            f"{'es' * (self.batches != 1)}; at the start, {between}at the end"
        )

    def due(self, step: int) -> bool:
        """Whether it follows this step."""
        return self.every > 0 and (step % self.every == 0 or step == self.steps)

    def run(self, step: int) -> bool:
        """Write a validation line; False if some rank was asked to stop meanwhile."""
        parts: list[Any] = []
        is_main = self.meter.folder is not None
        with progress("validating", self.batches, "batches", show=is_main) as advance:
            for i in range(self.batches):
                self.watch.at("validating", step)
                batch = self.stopping.unless_asked(
                    partial(self.feed.validation_batch, i), self.feed.collective
                )
                part = self.trainer.evaluate(batch)
                if part is None:
                    return False
                parts.append(part)
                advance(1)
        found = self.trainer.objective.report(*self.trainer.all_batches(parts))
        self.meter.validation(step, {f"val_{k}": v for k, v in found.items()})
        return True
