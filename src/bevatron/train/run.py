"""The training loop of one rank: start or continue, step, validate, save, log."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bevatron.bridge.opened import Opened
from bevatron.checkpoint.run_folder import STARTS, RunFolder
from bevatron.checkpoint.sharded import box_reader
from bevatron.errors import BevatronError
from bevatron.parallel.agree import on_all
from bevatron.parallel.layout import Layout
from bevatron.parallel.weights import stream
from bevatron.parallel.world import mesh
from bevatron.progress import Advance
from bevatron.train.config import RunConfig, changed_keys
from bevatron.train.feed import Feed
from bevatron.train.meter import Meter
from bevatron.train.objectives import Objective
from bevatron.train.record import changes, made_with, start_line
from bevatron.train.saving import Saver
from bevatron.train.schedule import learning_rate
from bevatron.train.start import Start
from bevatron.train.trainer import Trainer

Say = Callable[[str], None]


class Run:
    """One rank of a run. Build it inside a process group; `go()` trains to `train.steps`."""

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        layout: Layout,
        objective: Objective,
        device: torch.device,
        allow_changed: bool,
    ) -> None:
        self.config, self.start, self.layout = config, start, layout
        self.folder = RunFolder(Path(config.run.dir))
        self.is_main = dist.get_rank() == 0
        self.step = self.tokens = 0
        if start.resumed is not None:
            on_all(lambda: self._check_unchanged(allow_changed))
        seq_len, batch = config.data.seq_len, config.train.global_batch
        self.trainer = Trainer(
            start.spec,
            layout,
            mesh(layout, device),
            objective,
            seq_len=seq_len,
            train=config.train,
            optimizer=config.optimizer,
            device=device,
        )
        self.device = device
        on_all(self._open_feed)
        self._fill()
        self.made_with = made_with(layout, device)
        self.recorded: dict[str, Any] = {}  # of the data, in every step and at every start
        state = {"made_with": self.made_with, **self.recorded}
        self.saver = Saver(config, start, self.folder, self.trainer, state)
        self.meter = Meter(
            start.spec,
            layout,
            seq_len=seq_len,
            global_batch=batch,
            device=device,
            folder=self.folder if self.is_main else None,
        )

    def _open_feed(self) -> None:
        config, layout = self.config, self.layout
        self.feed = Feed(
            config.data,
            self.start.spec,
            global_batch=config.train.global_batch,
            seed=config.train.seed,
            dp_rank=self.trainer.dp_rank,
            dp=layout.dp,
            device=self.device,
        )

    def _check_unchanged(self, allow_changed: bool) -> None:
        """What decides the numbers may not change between starts of one run."""
        assert self.start.config is not None
        changed = changed_keys(self.start.config, self.config)
        if changed and not allow_changed:
            raise BevatronError(
                f"{self.folder.path}: this run was started with other values of "
                f"{', '.join(changed)}; use the old ones, another run.dir, or --allow-changed"
            )

    def _fill(self) -> None:
        """Random weights, or the boxes of a checkpoint after checking its hashes."""
        trainer, weights = self.trainer, self.start.weights
        if weights is None:
            trainer.fill_random(self.config.train.seed)
            return
        stream(trainer.placed, weights, verified=self.start.verified)
        if self.start.resumed is not None:
            self._continue(weights)

    def _continue(self, weights: Opened) -> None:
        state = self.start.state
        assert state is not None
        self.step, self.tokens = state["step"], state["tokens"]
        prefix = "optimizer/"
        tensors = weights.manifest.tensors
        shapes = {n[len(prefix) :]: t.shape for n, t in tensors.items() if n.startswith(prefix)}
        read = box_reader(weights.folder, weights.manifest, prefix)
        on_all(lambda: self.trainer.load_optimizer(shapes, read, self.step))

    def go(self, say: Say) -> None:
        """Train from the current step to `train.steps`, then save if that was not done."""
        from bevatron.progress import progress

        config, steps = self.config, self.config.train.steps
        on_all(lambda: self._prepare_folder() if self.is_main else None)
        if self.step >= steps:
            say(f"{self.folder.path}: already at step {self.step} of {steps}; nothing to do")
            self.saver.export(self.is_main)
            return
        if self.start.resumed is not None:
            say(f"step {self.step}: {changes(self.start, config, self.made_with)}")
        try:
            with (
                progress("training", total=steps, unit="it") if self.is_main else _Quiet()
            ) as advance:
                if self.step:
                    advance(self.step)
                while self.step < steps:
                    self._one_step(advance)
                    if config.train.val_every and self.step % config.train.val_every == 0:
                        self._validate()
                    self.saver.save_if_due(self.step, self.tokens)
                self.saver.finish(self.step, self.tokens)
        except BaseException:
            self.saver.leave()
            raise
        self.saver.export(self.is_main)

    def _prepare_folder(self) -> None:
        """Drop what was logged after the step that is continued from, and say what starts now."""
        self.folder.drop_metrics_after(self.step)
        if self.step < self.config.train.steps:
            line = start_line(self.config, self.start, self.made_with, self.recorded)
            self.folder.append(STARTS, line)

    def _one_step(self, advance: Advance) -> None:
        config, began = self.config, time.perf_counter()
        schedule = config.schedule
        lr = learning_rate(
            self.step + 1,
            name=schedule.name,
            steps=config.train.steps,
            lr=config.optimizer.lr,
            warmup_steps=schedule.warmup_steps,
            min_lr=schedule.min_lr,
        )
        loss, norm = self.trainer.step(self.feed.batch(self.step), lr)
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise BevatronError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; stopped before saving. "
                f"The last good step is in {self.folder.path}; lower optimizer.lr or look at the "
                "data"
            )
        self.step += 1
        self.tokens += config.train.global_batch * config.data.seq_len
        self.meter.step(
            self.step,
            tokens=self.tokens,
            seconds=time.perf_counter() - began,
            values={"loss": loss, "grad_norm": norm, "lr": lr},
            advance=advance,
        )

    def _validate(self) -> None:
        total = count = 0.0
        for i in range(self.config.train.val_batches):
            part = self.trainer.evaluate(self.feed.validation_batch(i))
            total, count = total + part[0], count + part[1]
        self.meter.write({"step": self.step, "val_loss": total / count})


class _Quiet:
    """What ranks other than the first show."""

    def __enter__(self) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __exit__(self, *exc: object) -> None:
        return None
