"""Doing something on every rank, and raising the same error on all ranks if it fails on one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch.distributed as dist

from bevatron.errors import BevatronError, failed, failure

T = TypeVar("T")
HEARTBEAT_S = 30.0  # far below the timeout of any process group


def on_all(act: Callable[[], T]) -> list[T]:
    """Run `act` on every rank and return all results, by rank.

    If it fails on any rank with bad input or a file system error, all ranks raise that rank's
    error: none goes on alone into a collective that the others will never join."""
    result: T | None = None
    problem: tuple[str, int] | None = None
    try:
        result = act()
    except (BevatronError, OSError) as error:
        found = failure(error)
        problem = str(found), found.exit_status
    outcomes: list[tuple[T | None, tuple[str, int] | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, problem))
    for _, problem in outcomes:
        if problem is not None:
            raise failed(*problem)
    return [value for value, _ in outcomes]  # type: ignore[misc]


class Background(Generic[T]):
    """Work that one rank does in a thread, while it goes on or waits with the others."""

    def __init__(self, act: Callable[[], T]) -> None:
        self.act = act
        self.outcome: T | None = None
        self.failure: BevatronError | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.act()
        except BaseException as error:
            self.failure = failure(error)

    def done(self, wait_s: float) -> bool:
        """Whether it has ended, after waiting for up to so long."""
        self.thread.join(wait_s)
        return not self.thread.is_alive()

    def result(self) -> T | None:
        """What it returned. Raises its failure if it failed."""
        if self.failure is not None:
            raise self.failure
        return self.outcome


def wait_on_all(work: Background[T] | None) -> list[T | None]:
    """Wait until what any rank has begun is done, however long it takes: the ranks meet again and
    again, so no collective times out. Returns all results; raises as `on_all` does."""
    while not all(on_all(lambda: work is None or work.done(HEARTBEAT_S))):
        pass
    return on_all(lambda: None if work is None else work.result())
