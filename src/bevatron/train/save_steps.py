"""Saving a run's steps, at once or in the background while training goes on.

Every rank copies its boxes to host memory, and a thread writes them. A thread of rank 0 waits for
the tables that all ranks leave beside their files, and commits the step. No thread takes part in a
collective. The functions here are collective: a failure in a thread is raised on all ranks by the
next call.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bevatron.bridge.adapter_base import RECORD, read_base
from bevatron.bridge.convert import export_checkpoint
from bevatron.bridge.open_weights import Opened, base_record, copy_tokenizer
from bevatron.checkpoint import rank_tables
from bevatron.checkpoint.run_folder import STEP, WEIGHTS, RunFolder
from bevatron.checkpoint.save_and_load import (
    Saved,
    Snapshot,
    own_share,
    write_rank,
)
from bevatron.data.tokenizer import OpenTokenizer, open_tokenizer
from bevatron.errors import BevatronError, failed, failure
from bevatron.families.config_fields import TOKEN_IDS
from bevatron.parallel.on_all_ranks import Background, on_all, wait_on_all
from bevatron.parallel.placed_weights import carried
from bevatron.spec.json import to_json
from bevatron.train.config import RunConfig
from bevatron.train.config_file import to_yaml
from bevatron.train.feed import ARRAYS
from bevatron.train.run_start import Start
from bevatron.train.trainer import Trainer

LEAVE_WITHIN_S = 30.0


@dataclass(frozen=True)
class Part:
    """One folder of a save: all tensors that belong in it, and those that this rank writes."""

    kind: str
    folder: Path
    tensors: Sequence[Saved]
    own: Sequence[Saved]


@dataclass
class InFlight:
    """A save that is going on."""

    step: int
    parts: Sequence[Part]
    writing: Background[None]
    committing: Background[None] | None = None  # on rank 0
    stop: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Writes steps into a run folder. All methods but `leave` are collective.

    Args:
        state: what else train_state.json says after so many steps, such as the data's position.
        arrays: what the feed remembers beside that.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        folder: RunFolder,
        trainer: Trainer,
        state: Callable[[int], Mapping[str, Any]] = lambda step: {"samples": 0},
        arrays: Callable[[int], Mapping[str, NDArray[Any]]] = lambda step: {},
    ) -> None:
        self.config, self.start, self.folder, self.trainer = config, start, folder, trainer
        self.state, self.arrays = state, arrays
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.kept = start.weights  # where the next save finds source files; moves with every save
        self.saved = -1 if start.state is None or start.branched else start.state["step"]
        options = config.checkpoint
        self.is_async = trainer.device.type != "cpu" if options.async_ is None else options.async_
        self.token = on_all(lambda: secrets.token_hex(4))[0]
        self.snapshot = Snapshot()
        self.in_flight: InFlight | None = None
        self.carried: list[Saved] = []
        self.texts: dict[str, str] = {}
        on_all(self._read_carried)

    def _read_carried(self) -> None:
        """Small tensors that are no parameters: kept, since the folder they lie in may go. Those of
        an adapter's base stay there; what is kept is which model that is."""
        if not self.is_main or self.kept is None:
            return
        if self.start.spec.adapter is None:
            self.carried = carried(self.kept)
            return
        base, named = self.kept.base, str(self.config.model.init)
        if self.start.resumed is not None:
            named = read_base(self.start.resumed).path
        found = base_record(
            self.kept if self.start.resumed is None or base is None else base, named
        )
        self.texts[RECORD] = found.to_json()

    def line(self) -> str:
        """What the start says of it."""
        options = self.config.checkpoint
        often = f"every {options.every:,} steps and at the end" if options.every else "at the end"
        kept = f"the newest {options.keep:,} stay"
        if options.keep_every:
            kept += f", and each {options.keep_every:,}th"
        return f"saving: {often}; {kept}"

    def save_if_due(self, step: int, tokens: int) -> None:
        """Save what the configuration asks for at this step."""
        options, kinds = self.config.checkpoint, []
        if options.every and step % options.every == 0:
            kinds.append(STEP)
        if options.weights_every and step % options.weights_every == 0:
            kinds.append(WEIGHTS)
        if kinds:
            self.save(step, tokens, kinds)

    def save(self, step: int, tokens: int, kinds: Sequence[str] = (STEP,)) -> None:
        """Write a step's checkpoint, or its weights alone, or both; after the save before it."""
        self._begin(step, tokens, kinds, copy=self.is_async)
        if not self.is_async:
            self.wait()

    def finish(self, step: int, tokens: int) -> None:
        """Save this step if it was not, and wait: nothing is left to be written afterwards."""
        self.wait()
        if self.saved != step:
            self._begin(step, tokens, (STEP,), copy=False)
            self.wait()

    def wait(self) -> None:
        """Until the save in flight is complete. Raises its failure, on all ranks."""
        if self.in_flight is None:
            return
        save, self.in_flight = self.in_flight, None
        try:
            wait_on_all(save.writing)
            wait_on_all(save.committing)
        except BevatronError as error:
            save.stop.set()
            if save.committing is not None:
                save.committing.done(wait_s=LEAVE_WITHIN_S)
            raise BevatronError(
                f"saving step {save.step} failed: {error}; nothing of it was kept, and the steps "
                f"in {self.folder.path} are as they were"
            ) from error

    def leave(self) -> None:
        """Before an error ends this process: give the save in flight a chance to be completed.
        Not collective: the other ranks may be gone, or waiting for this one."""
        save, deadline = self.in_flight, time.monotonic() + LEAVE_WITHIN_S
        if save is None:
            return
        save.writing.done(LEAVE_WITHIN_S)
        if save.committing is not None:
            save.committing.done(max(0.0, deadline - time.monotonic()))
        elif save.writing.failure is None:  # rank 0 commits, which takes the partial folder away
            while save.parts[-1].folder.exists() and time.monotonic() < deadline:
                time.sleep(0.05)

    def export(self, show_progress: bool) -> None:
        """Write `checkpoint.export` from the newest step if it does not exist yet: rank 0, while
        the others wait."""
        target, step = self.config.checkpoint.export, self.folder.step_folder(self.saved)
        if target is None:
            return

        def act() -> None:
            if not Path(target).exists():
                export_checkpoint(step, target, show_progress=show_progress)

        wait_on_all(Background(act) if self.is_main else None)

    # --- one save ---------------------------------------------------------------------------------

    def _begin(self, step: int, tokens: int, kinds: Sequence[str], copy: bool) -> None:
        self.wait()
        on_all(lambda: self._make_folders(step, kinds) if self.is_main else None)
        everything = [*self.trainer.to_save(), *self.carried]
        parts = [self._part(step, kind, everything) for kind in kinds]
        if copy:
            copies = iter(self.snapshot.take([saved for part in parts for saved in part.own]))
            parts = [replace(part, own=[next(copies) for _ in part.own]) for part in parts]
        shown = self.is_main and not copy  # steps go on beside a copy, and show their own
        save = InFlight(step, parts, Background(lambda: self._write(step, parts, shown)))
        if self.is_main:
            state, arrays = self._train_state(step, tokens), dict(self.arrays(step))
            save.committing = Background(lambda: self._commit_all(save, state, arrays))
        self.in_flight = save
        if STEP in kinds:
            self.saved = step

    def _make_folders(self, step: int, kinds: Sequence[str]) -> None:
        for kind in kinds:
            (self.folder.begin(step, kind, self.token) / rank_tables.FOLDER).mkdir()

    def _part(self, step: int, kind: str, everything: Sequence[Saved]) -> Part:
        if kind == WEIGHTS:
            everything = [t for t in everything if not t.name.startswith("optimizer/")]
        folder = self.folder.partial(step, kind, self.token)
        return Part(kind, folder, everything, own_share(everything))

    def _write(self, step: int, parts: Sequence[Part], shown: bool) -> None:
        """In a thread of every rank."""
        try:
            for part in parts:
                title = f"saving step {step}" if shown else None
                write_rank(part.folder, part.tensors, self.rank, part.own, title)
        except Exception as error:
            message = f"rank {self.rank}: {failure(error)}"
            if self.is_async:  # the others will know at the next save
                print(f"warning: saving step {step}: {message}", file=sys.stderr, flush=True)
            raise failed(message, failure(error).exit_status) from error

    def _commit_all(
        self, save: InFlight, state: Mapping[str, Any], arrays: dict[str, NDArray[Any]]
    ) -> None:
        """In a thread of rank 0."""
        try:
            for part in save.parts:
                if not rank_tables.wait_for_tables(part.folder, self.ranks, save.stop):
                    return
                self._commit(part, save.step, state, arrays)
        finally:
            for part in save.parts:  # gone already, unless something failed
                shutil.rmtree(part.folder, ignore_errors=True)

    def _commit(
        self, part: Part, step: int, state: Mapping[str, Any], arrays: dict[str, NDArray[Any]]
    ) -> None:
        options = self.config.checkpoint
        merged = rank_tables.merge_tables(part.folder, self.ranks, self.start.family, step)
        self._copy_origin(part.folder)
        texts = {"spec.json": to_json(self.start.spec), "config.yaml": to_yaml(self.config)}
        texts |= self.texts
        if part.kind == STEP:
            texts["train_state.json"] = json.dumps(state) + "\n"
            if arrays:
                save_file(arrays, part.folder / ARRAYS)
        target = self.folder.commit(part.folder, step, merged, texts, part.kind)
        rank_tables.check_sizes(target, merged.sizes)  # before older steps are deleted
        if part.kind == STEP:
            self.kept = _moved(self.kept, target) if self.kept is not None else None
            self.folder.retain(options.keep, options.keep_every)
        elif options.weights_keep:
            self.folder.retain(options.weights_keep, kind=WEIGHTS)

    def _train_state(self, step: int, tokens: int) -> dict[str, Any]:
        state: dict[str, Any] = {"step": step, "tokens": tokens}
        return {**state, "schedule": self.config.schedule.name, **self.state(step)}

    def _copy_origin(self, folder: Path) -> None:
        weights = self.kept
        if weights is not None:
            weights.copy_origin(folder)
        if (weights is None or weights.source is None) and self._tokenizer is not None:
            tokenizer = self._tokenizer
            special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
            ids = dict(zip(TOKEN_IDS, special, strict=True))
            copy_tokenizer(tokenizer.file.parent, folder / "source", ids)

    @cached_property
    def _tokenizer(self) -> OpenTokenizer | None:
        """The configured one. None if it is gone by now: a save does not fail for want of it."""
        if self.config.tokenizer is None:
            return None
        with suppress(BevatronError):
            return open_tokenizer(self.config.tokenizer)
        return None


def _moved(weights: Opened, target: Path) -> Opened:
    """The same origin, whose other files now lie in a step of this run."""
    source = target / "source"
    found = source if source.is_dir() else None
    return replace(weights, folder=target, source=found, others=None, native=True, made={})
