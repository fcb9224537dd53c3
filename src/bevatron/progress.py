"""Progress of anything longer than two seconds: a bar on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

QUIET_S = 2.0
LINE_EVERY_S = 5.0


class Advance(Protocol):
    """Count `n` more; `fields` are shown beside the count."""

    def __call__(self, n: int = 1, **fields: object) -> None: ...


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "it") -> Iterator[Advance]:
    """Yields a function that counts. Everything goes to stderr; nothing at all under two seconds.

    Args:
        unit: `B` shows the count in MB.
    """
    with (
        _bar(description, total, unit)
        if sys.stderr.isatty()
        else _lines(description, total, unit) as advance
    ):
        yield advance


def _amount(n: int, unit: str) -> str:
    return f"{n / 1e6:,.0f} MB" if unit == "B" else f"{n:,}"


def _fields(fields: dict[str, object]) -> str:
    return "  ".join(f"{k} {v}" for k, v in fields.items())


@contextmanager
def _lines(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    began = last = time.monotonic()
    done, said, shown = 0, False, ""

    def line(now: float) -> str:
        of = f" of {_amount(total, unit)} ({done / total:.0%})" if total else ""
        return f"{description}: {_amount(done, unit)}{of}, {now - began:.0f} s  {shown}".rstrip()

    def advance(n: int = 1, **fields: object) -> None:
        nonlocal done, last, said, shown
        done += n
        shown = _fields(fields) or shown
        now = time.monotonic()
        if now - began >= QUIET_S and now - last >= (LINE_EVERY_S if said else QUIET_S):
            last, said = now, True
            print(line(now), file=sys.stderr, flush=True)

    yield advance
    if said:
        print(line(time.monotonic()), file=sys.stderr, flush=True)


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=Console(stderr=True),
        transient=True,
    )
    began, done, shown = time.monotonic(), 0, ""
    task: TaskID | None = None

    def advance(n: int = 1, **fields: Any) -> None:
        nonlocal done, shown, task
        done += n
        shown = _fields(fields) or shown
        if task is None and time.monotonic() - began >= QUIET_S:
            task = bar.add_task(description, total=total, amount="", shown="")
            bar.start()
        if task is not None:
            of = f" / {_amount(total, unit)}" if total else ""
            bar.update(task, completed=done, amount=_amount(done, unit) + of, shown=shown)

    try:
        yield advance
    finally:
        if task is not None:
            bar.stop()
