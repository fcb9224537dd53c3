"""Signals that ask a run to save and end: SIGTERM, SIGUSR1 (before a time limit), Ctrl-C.

A signal only leaves a note. The loop looks at it before every batch; a rank that was asked brings
no samples, which all ranks learn by the exchange that a step begins with (`Trainer.step`), so all
stop after the same step. Waiting for data ends at once; a step, an evaluation batch or a save under
way is finished first. A second Ctrl-C ends the process on the spot.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher that was asked to stop tells workers that it starts afterwards (a restart).
ASKED = "BEVATRON_STOP"
PARENT = "BEVATRON_PARENT"  # a launcher tells its workers its process number
PARENT_S = 0.5


class _Interrupted(BaseException):
    """Leaves a wait. A BaseException, so that no reader takes it for an error of its own."""


class Stopping:
    """Use as a context around a run; outside of the main thread it hears nothing.

    Attributes:
        asked: the signal that this process got, None if none.
        begun: whether a step has been taken, so that there is something to save.
        current: the one whose context this process is in.
    """

    current: ClassVar[Stopping | None] = None

    def __init__(self) -> None:
        told = os.environ.get(ASKED)
        self.asked: signal.Signals | None = signal.Signals[told] if told else None
        self.begun = False
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
            Stopping.current = self
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
            Stopping.current = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        got = signal.Signals(number)
        if self.asked is signal.SIGINT and got is signal.SIGINT:
            print("\nerror: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        if self.asked is None:
            self.asked = got
            if got is signal.SIGINT:
                text = "\nsaving after this step; Ctrl-C again stops at once without saving"
                print(text, file=sys.stderr, flush=True)
        if self._waiting:
            self._waiting = False
            raise _Interrupted

    def unless_asked(self, get: Callable[[], T], together: bool = False) -> T | None:
        """What `get` returns; None if the run is to stop, also if that is heard while it waits.

        Args:
            together: all ranks take part in `get`, so it begins on all or none, and is not left.
        """
        if together:
            from bevatron.parallel.on_all_ranks import on_all

            return None if any(on_all(lambda: self.asked is not None)) else get()
        try:
            try:
                self._waiting = True
                return get() if self.asked is None else None
            finally:
                self._waiting = False
        except _Interrupted:
            return None


def end_with_parent(parent: int | None = None) -> None:
    """From here on this process does not outlive the one that started it, however that dies: a
    thread looks every half second. A run with something to save is asked to stop; any other
    process ends at once, whatever it waits for.

    Args:
        parent: the number of the process that started this one, told by it: it may have died before
            this call. None: whoever is the parent now.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_S)
        if Stopping.current is None or not Stopping.current.begun:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, name="bevatron-parent", daemon=True).start()


def end_with_agent() -> None:
    """The same for a process that a launcher of ours or torchrun has started; no other one."""
    told = os.environ.pop(PARENT, None)  # not for what this process may start
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(None if told is None else int(told))
