"""The training loop of one rank: start or continue, step, validate, save, log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bevatron.bridge.open_weights import Opened, open_step
from bevatron.checkpoint.run_folder import STARTS, RunFolder, read_state
from bevatron.checkpoint.save_and_load import box_reader
from bevatron.errors import BevatronError, CheckpointError
from bevatron.parallel.adapter_weights import fill_magnitudes
from bevatron.parallel.layout import Layout
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placed_weights import fill_random, stream
from bevatron.parallel.process_groups import mesh
from bevatron.parallel.replica_check import check_replicas
from bevatron.progress import Advance, progress
from bevatron.train import restart
from bevatron.train.adapter_init import begin_with
from bevatron.train.bad_steps import Guard, event
from bevatron.train.config import RunConfig
from bevatron.train.feed import Batches
from bevatron.train.freezing import describe, frozen_parameters
from bevatron.train.hang_watch import Watch
from bevatron.train.objectives import Objective
from bevatron.train.optimizer_and_schedule import learning_rate
from bevatron.train.processes_and_signals import Stopping, asked_by
from bevatron.train.restart import Change
from bevatron.train.run_record import differences, made_with, start_line
from bevatron.train.run_start import Start
from bevatron.train.save_steps import Saver
from bevatron.train.step_metrics import Meter
from bevatron.train.trainer import Trainer
from bevatron.train.validation import Validation

Say = Callable[[str], None]


class Run:
    """One rank of a run. Build it inside a process group; `go()` trains to `train.steps`.

    Args:
        allowed: which keys may change although that moves the numbers: all, none, or these.
        reset_at: forget the optimizer's state if it is of this step or one before.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        layout: Layout,
        objective: Objective,
        device: torch.device,
        stopping: Stopping,
        watch: Watch,
        *,
        allowed: bool | Collection[str] = False,
        reset_at: int | None = None,
    ) -> None:
        self.config, self.start, self.layout = config, start, layout
        self.stopping, self.watch, self.stopped = stopping, watch, False
        self.guard = Guard(config.safety)
        self.folder = RunFolder(Path(config.run.dir))
        self.is_main = dist.get_rank() == 0
        self.step = self.tokens = 0
        self.reset_at, self.optimizer_since = reset_at, 0
        self.trained_since: dict[str, int] = {}  # of parameters that were frozen up to that step
        # A branch is there to change something; what it does is said all the same.
        self.allowed, self.changes = allowed or start.branched, list[Change]()
        on_all(self._compare)
        self.trainer = Trainer(
            start.spec,
            layout,
            mesh(layout, device),
            objective,
            seq_len=config.data.seq_len,
            train=config.train,
            optimizer=config.optimizer,
            device=device,
        )
        self.device = device
        self.companions = self._fingerprints(objective)
        on_all(self._open_feed)
        self._fill()
        self.feed.alive = partial(watch.at, "starting", self.step)
        self.feed.bind(self.trainer)
        self.made_with = made_with(layout, device)
        self.recorded = restart.as_it_began(start, config)
        kept = self._state, self.feed.arrays
        self.saver = Saver(self.recorded, start, self.folder, self.trainer, *kept)
        on_all(self._open_meter)
        parts = self.feed, self.trainer, self.meter, stopping, watch
        self.validation = Validation(config, *parts)

    @property
    def begins(self) -> bool:
        """Whether this is the first start of the run that took a step."""
        return self.start.state is None or self.start.branched

    def _open_meter(self) -> None:
        self.meter = Meter(
            self.config,
            self.start.spec,
            self.layout,
            device=self.device,
            folder=self.folder if self.is_main else None,
            step=-1 if self.begins else self.step,
            rows=self.trainer.objective.rows,
            beside=[c.spec for c in self.trainer.objective.companions.values()],
        )

    def _open_feed(self) -> None:
        config, layout, start = self.config, self.layout, self.start
        batches = Batches.of(config.train.global_batch)
        if start.state is not None and start.config is not None:
            saved = Batches.saved(start.state, start.config.train.global_batch)
            batches = saved.followed_by(start.state["step"], config.train.global_batch)
        trainer, stored = self.trainer, self.trainer.objective.stored
        if stored is not None:
            stored.check(config)
        self.feed = config.objective.feed.open(
            config,
            self.start,
            stored=stored if trainer.placed.is_last else None,
            global_batch=config.train.global_batch,
            seed=config.train.seed,
            dp_rank=trainer.placed.dp_rank,
            dp=layout.dp,
            device=self.device,
            rounded=self._mixture == "rounded",
            batches=batches,
        )
        self.held_out = {
            s.path: config.objective.feed.hash_of(s.path) for s in config.data.validation
        }
        if start.state is not None:
            self.feed.load(start.state, start.resumed)
            recorded = start.state.get("data", {}), start.state.get("validation", {})
            changed = self.feed.changed_sources(recorded[0])
            self._note([Change("data.train", "fixed", said) for said in changed])
            self._note(
                Change(
                    "data.validation",
                    "aside",
                    f"{path}: is other data than it was: validation losses from here on are of it",
                )
                for path, found in self.held_out.items()
                if recorded[1].get(path, found) != found
            )

    def _state(self, step: int) -> dict[str, Any]:
        """What a step's train_state.json says besides."""
        state = self.feed.state(step)
        state |= {"made_with": self.made_with, "guard": self.guard.state()}
        state["optimizer_since"] = self.optimizer_since
        if self.config.train.freeze:
            state["freeze"] = self.config.train.freeze
        if self.trained_since:
            state["trained_since"] = self.trained_since
        if self.companions:
            state["companions"] = self.companions
        taps = self.trainer.taps
        if taps is not None:
            state["objective"] = taps.state()
        hashes = {"data": self.feed.fingerprints(), "validation": self.held_out}
        return {**state, "mixture": self._mixture, **hashes}

    @property
    def _mixture(self) -> str:
        """Whether the run's mixtures have exact or rounded weights: as it was begun."""
        state = self.start.state
        return "exact" if state is None else str(state.get("mixture", "rounded"))

    def _fingerprints(self, objective: Objective) -> dict[str, str]:
        """Of the objective's frozen models and stored arrays, which no checkpoint holds: they must
        stay the same. Collective."""
        companions, stored = objective.companions, objective.stored

        def look() -> dict[str, str]:
            if not self.is_main:
                return {}
            found = {n: c.fingerprint() for n, c in companions.items()}
            return found | ({stored.key: stored.fingerprint()} if stored is not None else {})

        found = on_all(look)[0]
        before = self.start.state.get("companions", {}) if self.start.state is not None else {}
        self._note(
            Change(
                f"objective.{name}",
                "fixed",
                f"objective.{name}: is another model than the one that {self.folder.path} was "
                f"started with (fingerprint {found[name][:12]}, was {before[name][:12]})",
            )
            for name in found
            if before.get(name, found[name]) != found[name]
        )
        return found

    def _compare(self) -> None:
        """What decides the numbers may not change between starts of one run."""
        if self.start.resumed is None:
            return
        found = restart.compare(self.start, self.config, self.config.objective.feed.hash_of)
        restart.refuse(str(self.folder.path), found, self.allowed)
        self.changes += found

    def _note(self, changes: Iterable[Change]) -> None:
        """Changes behind a key that stayed: refuse them, or say them at the start."""
        for change in changes:
            if change.kind == "fixed" and not restart.allows(self.allowed, change.key):
                raise BevatronError(
                    f"{change.said}; put the old one back, go on in another run.dir with "
                    f"run.branch_from, or --allow-changed={change.key}"
                )
            self.changes.append(change)

    def _fill(self) -> None:
        """Random weights, or the boxes of a checkpoint after checking its hashes."""
        trainer, weights = self.trainer, self.start.weights
        trainer.fill_companions()
        trainer.fill_added(self.config.train.seed)
        if weights is None:
            trainer.fill_random(self.config.train.seed)
            return
        stream(trainer.placed, weights, leave=self.start.fresh, verified=self.start.verified)
        fill_random(trainer.placed, self.config.train.seed, only=self.start.fresh)
        fill_magnitudes(trainer.placed, only=self.start.fresh)
        adapter = self.config.adapter
        if adapter is not None and adapter.init is not None and self.start.resumed is None:
            begin_with(trainer.placed, adapter.init, self.start.family, weights)
        if self.start.state is not None:
            self._continue(weights, self.start.state)

    def _continue(self, weights: Opened, state: Mapping[str, Any]) -> None:
        self.step, self.tokens = state["step"], state["tokens"]
        prefix = "optimizer/"
        tensors = weights.manifest.tensors
        shapes = {n[len(prefix) :]: t.shape for n, t in tensors.items() if n.startswith(prefix)}
        read = box_reader(weights.folder, weights.manifest, prefix)
        before = frozen_parameters(self.start.spec, state.get("freeze", []))
        weights_of = weights.manifest.weights().items()
        rounded = {n for n, t in weights_of if t.dtype != "F32" and n not in before}
        if missing := sorted(n for n in rounded if f"master/{n}" not in shapes):
            raise CheckpointError(
                f"{weights.folder}: has no optimizer/master/{missing[0]}, but its model/ is "
                "rounded; continue from another step"
            )
        self.guard.load(state.get("guard", {}))
        if self.trainer.taps is not None:
            self.trainer.taps.load(state.get("objective", {}))
        fresh = self.reset_at is not None and self.step <= self.reset_at
        self.optimizer_since = self.step if fresh else int(state.get("optimizer_since", 0))
        updates = self.guard.updates(self.step, self.optimizer_since)
        began = dict(state.get("trained_since", {})) | dict.fromkeys(before, self.step)
        self.trained_since = {n: s for n, s in began.items() if n not in self.trainer.frozen}
        later = {
            name: self.guard.updates(self.step, max(since, self.optimizer_since))
            for name, since in self.trained_since.items()
        }
        lacking = sorted(n for n in self.trainer.optimizer.states() if n not in shapes)
        needed = self.trainer.placed.parameters.keys() - before
        lacking = [n for n in lacking if n.partition("/")[2] in needed]

        def load() -> None:
            if lacking and not fresh:
                raise CheckpointError(
                    f"{weights.folder}: has no optimizer/{lacking[0]}, for it was saved with "
                    "another optimizer; --reset-optimizer goes on without its state (weights, fp32 "
                    "masters, learning rate and data go on)"
                )
            self.trainer.load_optimizer(shapes, read, updates, fresh=fresh, later=later)

        on_all(load)

    def go(self, say: Say) -> None:
        """Train from the current step to `train.steps`, then save if that was not done."""
        steps = self.config.train.steps
        validated = on_all(lambda: self._prepare_folder() if self.is_main else False)[0]
        if self.step >= steps:
            say(f"{self.folder.path}: already at step {self.step} of {steps}; nothing to do")
            self.saver.export(self.is_main)
            return
        self._say_changes(say)
        if self.trainer.frozen:
            say(f"frozen: {describe(self.start.spec, self.trainer.frozen)}")
        for line in (*self.feed.summary(steps), self.validation.line(), self.saver.line()):
            if line is not None:
                say(line)
        shown = progress("training", steps, "steps", self.step, show=self.is_main)
        try:
            with shown as advance:
                self._loop(steps, advance, validated)
        except BaseException:
            self.saver.leave()
            raise
        finally:
            self.feed.close()
            self.meter.close()
        if self.stopped:
            self._say_why(say)
        else:
            self.watch.at("exporting", self.step)
            self.saver.export(self.is_main)
        say(self.meter.summary())

    def _say_changes(self, say: Say) -> None:
        start = self.start
        if start.state is None or start.config is None:
            return
        if self.reset_at is not None:
            what = "had been reset before, and is not again"
            if self.optimizer_since == self.step:
                what = (
                    "is as before its first update; weights, fp32 masters, learning rate and data "
                    "go on"
                )
                self.changes.append(Change("optimizer", "free", f"the optimizer's state {what}"))
            else:
                say(f"step {self.step}: the optimizer's state {what}")
        made = differences(start.state.get("made_with", {}), self.made_with)
        for line in restart.lines(self.changes, made, start.config, self.config):
            say(f"step {self.step}: {line}")

    def _prepare_folder(self) -> bool:
        """Drop what was logged after the step that is continued from, and say what starts now.
        Whether a validation of that step is logged, or none is due."""
        lines = self.folder.drop_metrics_after(-1 if self.begins else self.step)
        if self.step < self.config.train.steps:
            line = start_line(self.recorded, self.start, self.made_with, self.feed.fingerprints())
            self.folder.append(STARTS, line)
        due = self.validation.every > 0 and (self.begins or self.validation.due(self.step))
        return not due or any(x["step"] == self.step and "val_loss" in x for x in lines)

    def _loop(self, steps: int, advance: Advance, validated: bool) -> None:
        if self.start.branched:  # on its own from here on: the other run may delete that step
            self.saver.save(self.step, self.tokens)
        self.stopped = not validated and not self.validation.run(self.step)
        while self.step < steps and not self.stopped:
            rewound = self._one_step(advance)
            if rewound is None:
                self.stopped = True
                break
            if self.validation.due(self.step):
                self.stopped = not self.validation.run(self.step)
            self.watch.at("saving", self.step)
            if rewound:  # what it passed over must not come back by a restart
                self.saver.save(self.step, self.tokens)
            else:
                self.saver.save_if_due(self.step, self.tokens)
        self.watch.at("saving", self.step)
        if self.step:
            self.saver.finish(self.step, self.tokens)

    def _say_why(self, say: Say) -> None:
        asked = self.stopping.asked
        reason = asked_by(asked) if asked is not None else "a signal to another rank"
        self.meter.write({"step": self.step, "event": "stopped", "reason": reason})
        saved = "saved; start again to continue" if self.step else "nothing to save yet"
        say(f"stopped by {reason} after step {self.step}: {saved}")

    def _one_step(self, advance: Advance) -> bool | None:
        """Take the next step; True if it ended in a rewind, None if it was not begun because some
        rank was asked to stop."""
        config, began, number = self.config, time.perf_counter(), self.step + 1
        safety = config.safety
        lr = learning_rate(
            number, config.schedule, steps=config.train.steps, lr=config.optimizer.lr
        )
        self.watch.at("waiting for data", number)
        samples = self.stopping.unless_asked(
            partial(self.feed.batch, self.step), self.feed.collective
        )
        waited = time.perf_counter() - began
        self.watch.at("in its step", number)

        def admit(loss: float, norm: float) -> bool:
            self.feed.check_step(self.step, self.trainer.reported)
            return self.guard.decide(number, loss, norm).action == "apply"

        done = self.trainer.step(
            samples,
            lr,
            admit,
            replay=_due(number, safety.replay_every),
        )
        if done is None:
            return None
        self.stopping.begun = True
        loss, norm = done
        if self.guard.decision.action not in ("apply", "skip"):
            self._rewind_or_stop(number, loss, norm)
            return True
        self.step += 1
        self.tokens += self.meter.tokens_per_step
        if self.guard.decision.action == "skip":
            self._record("skipped", loss, norm)
            advance(1)
            return False
        values = {"loss": loss, "grad_norm": norm, "lr": lr} | self.trainer.reported
        seconds = time.perf_counter() - began
        if self.feed.collective:  # whose batches are part of the step's work
            values |= self.feed.reported | {"time/update_s": seconds - waited}
        self.meter.step(
            self.step,
            tokens=self.tokens,
            seconds=seconds,
            values=values,
            advance=advance,
            data_wait=waited,
        )
        if _due(number, safety.check_replicas_every):
            check_replicas(self.trainer.placed)
        return False

    def _record(self, kind: str, loss: float, norm: float) -> None:
        """An event of this step: into metrics.jsonl, and to whoever is watching."""
        reason = self.guard.decision.reason
        self.meter.write(event(self.step, kind, reason, loss, norm))
        if self.is_main:
            print(f"step {self.step} {kind}: {reason}", file=sys.stderr, flush=True)

    def _rewind_or_stop(self, bad: int, loss: float, norm: float) -> None:
        """Back to the weights of the newest saved step, past the data of step `bad`: the steps
        between count as taken, without their updates."""
        reason, action = self.guard.decision.reason, self.guard.decision.action
        self.saver.wait()
        newest = on_all(self.folder.newest)[0]  # rank 0's view, if they should differ
        if action == "stop" or newest is None:
            self.meter.write(event(bad, "stopped", reason, loss, norm))
            instead = "" if action == "stop" else "; there is no saved step to go back to yet"
            raise BevatronError(
                f"step {bad}: {reason}{instead}; stopped before the update. The newest saved step "
                f"is {newest or 'none'}; lower optimizer.lr, look at the data, or set safety.* to "
                "skip or rewind"
            )
        opened: list[Opened] = []
        on_all(lambda: opened.append(open_step(newest)))
        stream(self.trainer.placed, opened[0])
        self._continue(opened[0], read_state(newest, opened[0].manifest.step))
        first = self.step + 1
        self.guard.rewound.append((first, bad))
        self.tokens += (bad - self.step) * self.meter.tokens_per_step
        self.step = bad
        if self.is_main:
            self.folder.drop_metrics_after(first - 1)
        self._record("rewound", loss, norm)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
