"""Signals that ask a run to save and end: SIGTERM, SIGUSR1 (before a time limit), Ctrl-C.

A signal only leaves a note. The loop looks at it before every batch; a rank that was asked brings
no samples, which all ranks learn by the exchange that a step begins with (`Trainer.step`), so all
stop after the same step. Waiting for data ends at once; a step, an evaluation batch or a save under
way is finished first. A second Ctrl-C ends the process on the spot.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher that was asked to stop tells workers that it starts afterwards (a restart).
ASKED = "BEVATRON_STOP"
_PR_SET_PDEATHSIG = 1


class _Interrupted(BaseException):
    """Leaves a wait. A BaseException, so that no reader takes it for an error of its own."""


class Stopping:
    """Use as a context around a run; outside of the main thread it hears nothing.

    Attributes:
        asked: the signal that this process got, None if none.
    """

    def __init__(self) -> None:
        told = os.environ.get(ASKED)
        self.asked: signal.Signals | None = signal.Signals[told] if told else None
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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

    def unless_asked(self, get: Callable[[], T]) -> T | None:
        """What `get` returns; None if the run is to stop, also if that is heard while it waits."""
        try:
            try:
                self._waiting = True
                return get() if self.asked is None else None
            finally:
                self._waiting = False
        except _Interrupted:
            return None


def end_with_parent() -> None:
    """Get a SIGTERM when the process that started this one dies, so that a killed launcher leaves
    no workers behind. Linux alone has this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
