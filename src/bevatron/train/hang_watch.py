"""Noticing that a run hangs, and saying which rank the others wait for.

A thread in every rank regularly writes to the job's store what the rank is doing. When a rank has
made no progress for `timeout_s`, its thread reports this to the store. All ranks then dump their
stacks; one of them reads all reports and names the ranks that are behind or silent, and every rank
ends with this message. The training loop itself only sets a variable.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch._C._distributed_c10d import Store

from bevatron.train.processes_and_signals import last_words

# What a rank may be doing, in the order in which one step goes through it.
PHASES = ("starting", "waiting for data", "in its step", "validating", "saving", "exporting")
BEAT_S = (0.2, 15.0)  # at most a tenth of the timeout, within these limits
SHOWN = 8  # ranks, or groups of ranks, in a message
FRAMES = 4
STATUS = 1
PREFIX = "watch/"


class Watch:
    """Use as a context around a rank's run. `timeout_s` 0 watches nothing."""

    def __init__(self, timeout_s: float, rank: int, world: int, store: Store | None) -> None:
        self.timeout_s, self.rank, self.world, self.store = timeout_s, rank, world, store
        self.beat_s = min(max(timeout_s / 10, BEAT_S[0]), BEAT_S[1])
        self.main = threading.get_ident()
        self.now = ("starting", 0, time.monotonic())
        self.beats = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.timeout_s:
            self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.done.set()

    def at(self, phase: str, step: int) -> None:
        """This rank now does `phase` (of PHASES) for update number `step`."""
        self.now = (phase, step, time.monotonic())

    def _watch(self) -> None:
        """Beat; end the process when this rank or another one says that nothing moves."""
        store = _Patient(self.store) if self.store is not None else None
        while not self.done.wait(self.beat_s):
            self._beat(store)
            since = self.now[2]
            stuck = time.monotonic() - since > self.timeout_s
            if stuck and store is not None:
                store.set("hung", "1")
            if stuck or (store is not None and store.has("hung")):
                if self.done.is_set():
                    return
                last_words(self._verdict(store), STATUS)

    def _beat(self, store: _Patient | None, **more: Any) -> None:
        self.beats += 1
        phase, step, _ = self.now
        if store is not None:
            said = {"beat": self.beats, "phase": phase, "step": step, "pid": os.getpid()}
            store.set(str(self.rank), json.dumps(said | {"host": socket.gethostname()} | more))

    def _verdict(self, store: _Patient | None) -> str:
        stack = _stack(self.main)
        alone = f"nothing moved for {self.timeout_s:g} s (safety.hang_timeout_s)"
        phase, step, _ = self.now
        if store is None:
            return f"{alone}: {phase} (step {step}) at {stack}"
        self._beat(store, stack=stack)
        if store.add("reporters") == 1:
            # Two looks, so that a rank whose beat does not change between them is silent. Others
            # leave their stacks meanwhile.
            before = self._all(store)
            time.sleep(3 * self.beat_s + 1)
            self._beat(store, stack=stack)
            verdict = f"{alone}: {explain(before, self._all(store), self.world)}"
            store.set("verdict", verdict)
            time.sleep(2 * self.beat_s)  # this process may be the one that keeps the store
            return verdict
        patience = time.monotonic() + 10 * self.beat_s + 10
        while time.monotonic() < patience and not store.failed:
            if store.has("verdict"):
                return store.get("verdict")
            time.sleep(self.beat_s)
            self._beat(store, stack=stack)
        return (
            f"{alone}: rank {self.rank} is {phase} (step {step}) at {stack}; the job's store does "
            "not answer, so the process or machine of rank 0 is probably gone"
        )

    def _all(self, store: _Patient) -> dict[int, dict[str, Any]]:
        said = {}
        for rank in range(self.world):
            if store.has(str(rank)):
                said[rank] = json.loads(store.get(str(rank)))
        return said


def explain(before: dict[int, Any], after: dict[int, Any], world: int) -> str:
    """Which ranks the others wait for, from two looks at what all ranks said. Falls back to where
    every rank is."""
    silent = [r for r in range(world) if r not in after or before.get(r) == after[r]]
    heard = {r: after[r] for r in range(world) if r in after and r not in silent}
    parts = []
    if silent:
        shown = ", ".join(_name(r, after.get(r)) for r in silent[:SHOWN])
        parts.append(f"{shown} {'is' if len(silent) == 1 else 'are'} silent (stopped, or gone)")
    places = {r: (said["step"], PHASES.index(said["phase"])) for r, said in heard.items()}
    behind = [r for r in places if places[r] == min(places.values())]
    if not silent and len(behind) < len(places):
        shown = ", ".join(_name(r, after[r]) for r in behind[:SHOWN])
        verb = "is" if len(behind) == 1 else "are"
        parts.append(f"the others wait for {shown}, which {verb} behind")
    by_place: dict[str, list[int]] = defaultdict(list)
    for rank, said in heard.items():
        where = f"{said['phase']} (step {said['step']}) at {said.get('stack', 'unknown')}"
        by_place[where].append(rank)
    for where, ranks in sorted(by_place.items(), key=lambda item: len(item[1]))[:SHOWN]:
        shown = ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")
        parts.append(f"rank{'s' * (len(ranks) > 1)} {shown}: {where}")
    return "; ".join(parts)


def _name(rank: int, said: dict[str, Any] | None) -> str:
    if said is None:
        return f"rank {rank} (never heard of)"
    return (
        f"rank {rank} ({said['host']}, process {said['pid']}; {said['phase']}, step {said['step']})"
    )


def _stack(thread: int) -> str:
    """The innermost frames of a thread, outermost first, as `file:line function`."""
    frame = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
    return " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)


class _Patient:
    """A store that may stop answering: then nothing is known, and nobody waits for it again."""

    def __init__(self, store: Store) -> None:
        self.store, self.failed = store, False

    def _try(self, act: Any, default: Any) -> Any:
        if self.failed:
            return default
        try:
            return act()
        except RuntimeError:
            self.failed = True
            return default

    def set(self, key: str, value: str) -> None:
        self._try(lambda: self.store.set(PREFIX + key, value), None)

    def get(self, key: str) -> str:
        return str(self._try(lambda: self.store.get(PREFIX + key).decode(), "{}"))

    def add(self, key: str) -> int:
        return int(self._try(lambda: self.store.add(PREFIX + key, 1), 0))

    def has(self, key: str) -> bool:
        return bool(self._try(lambda: self.store.check([PREFIX + key]), False))
