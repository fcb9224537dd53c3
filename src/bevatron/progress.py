"""Progress of anything longer than two seconds: a bar on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

QUIET_S = 2.0
LINE_EVERY_S = 5.0  # at first; a run of hours gets a line a minute
LINES_KEPT = 12  # the time to go is judged by the pace since so many lines ago


class Advance(Protocol):
    """Count `n` more; `fields` are shown beside the count."""

    def __call__(self, n: int = 1, **fields: object) -> None: ...


@contextmanager
def progress(
    description: str, total: int | None = None, unit: str = "it", done: int = 0
) -> Iterator[Advance]:
    """Yields a function that counts. Everything goes to stderr; nothing at all under two seconds.

    Args:
        unit: `B` shows the count in MB.
        done: before the start, at no time.
    """
    with (
        _bar(description, total, unit, done)
        if sys.stderr.isatty()
        else _lines(description, total, unit, done) as advance
    ):
        yield advance


def _amount(n: int, unit: str) -> str:
    return f"{n / 1e6:,.0f} MB" if unit == "B" else f"{n:,}"


def _fields(fields: dict[str, object]) -> str:
    return "  ".join(f"{k} {v}" for k, v in fields.items())


def duration(seconds: float) -> str:
    """45 s, 12:05, 3:12:05, 2 d 3:12."""
    n = round(seconds)
    if n < 60:
        return f"{n} s"
    minutes, s = divmod(n, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h}:{m:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


@contextmanager
def _lines(description: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    began = last = time.monotonic()
    said, shown = False, ""
    marks = deque([(began, done)], maxlen=LINES_KEPT)

    def line(now: float) -> str:
        of = f" of {_amount(total, unit)} ({done / total:.0%})" if total else ""
        text = f"{description}: {_amount(done, unit)}{of}, {duration(now - began)}"
        then, before = marks[0]
        if total and before < done < total:
            text += f", {duration((total - done) * (now - then) / (done - before))} to go"
        return f"{text}  {shown}".rstrip()

    def advance(n: int = 1, **fields: object) -> None:
        nonlocal done, last, said, shown
        done += n
        shown = _fields(fields) or shown
        now = time.monotonic()
        pause = min(60.0, max(LINE_EVERY_S, (now - began) / 20)) if said else QUIET_S
        if now - began >= QUIET_S and now - last >= pause:
            last, said = now, True
            print(line(now), file=sys.stderr, flush=True)
            marks.append((now, done))

    yield advance
    if said:
        print(line(time.monotonic()), file=sys.stderr, flush=True)


@contextmanager
def _bar(description: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    """One line with the bar, and below it what else is known."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.text import Text

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    below = Text(no_wrap=True, overflow="ellipsis", style="dim")
    live = Live(Group(bar, below), console=Console(stderr=True), transient=True)
    began = time.monotonic()
    task: TaskID | None = None

    def advance(n: int = 1, **fields: Any) -> None:
        nonlocal done, task
        done += n
        if fields:
            below.plain = _fields(fields)
        if task is None and time.monotonic() - began >= QUIET_S:
            task = bar.add_task(description, total=total, completed=done, amount="")
            live.start()
        if task is not None:
            of = f" / {_amount(total, unit)}" if total else ""
            bar.update(task, completed=done, amount=_amount(done, unit) + of)

    try:
        yield advance
    finally:
        if task is not None:
            live.stop()
