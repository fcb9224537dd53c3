"""The progress of work that takes over two seconds: a bar on a terminal, else plain lines."""

from __future__ import annotations

import sys
import threading
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
    description: str,
    total: int | None = None,
    unit: str = "it",
    done: int = 0,
    *,
    show: bool = True,
) -> Iterator[Advance]:
    """Yields a function that counts. Everything goes to stderr; nothing at all under two seconds.
    One may lie within another, or run beside it in another thread.

    Args:
        unit: `B` shows the count in MB.
        done: before the start, at no time.
        show: whether anything is shown; of several ranks, the first alone shows what all do.
    """
    shown = _silent if not show else _bar if sys.stderr.isatty() else _lines
    with shown(description, total, unit, done) as advance:
        yield advance


@contextmanager
def _silent(description: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    def advance(n: int = 1, **fields: object) -> None:
        pass

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
    said, shown = -1, ""  # what the last line counted
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
        pause = min(60.0, max(LINE_EVERY_S, (now - began) / 20)) if said >= 0 else QUIET_S
        if now - began >= QUIET_S and now - last >= pause:
            last, said = now, done
            print(line(now), file=sys.stderr, flush=True)
            marks.append((now, done))

    yield advance
    if 0 <= said < done:
        print(line(time.monotonic()), file=sys.stderr, flush=True)


class _Screen:
    """The bars on the terminal, one below the other, and below them what else is known."""

    def __init__(self) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(),
        )
        self.users = 0
        self.below = Text(no_wrap=True, overflow="ellipsis", style="dim")
        console = Console(stderr=True)
        self.live = Live(Group(self.bars, self.below), console=console, transient=True)


_screens: list[_Screen] = []  # one while there are bars
_changing = threading.Lock()


@contextmanager
def _bar(description: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    """A bar of the screen, which appears with the first one and goes with the last."""
    began = time.monotonic()
    screen: _Screen | None = None
    task: Any = None

    def advance(n: int = 1, **fields: object) -> None:
        nonlocal done, screen, task
        done += n
        if screen is None and time.monotonic() - began >= QUIET_S:
            screen = _appear()
            task = screen.bars.add_task(description, total=total, completed=done, amount="")
        if screen is not None:
            of = f" / {_amount(total, unit)}" if total else ""
            screen.bars.update(task, completed=done, amount=_amount(done, unit) + of)
            if fields:
                screen.below.plain = _fields(fields)

    try:
        yield advance
    finally:
        if screen is not None:
            _disappear(screen, task)


def _appear() -> _Screen:
    with _changing:
        if not _screens:
            _screens.append(_Screen())
            _screens[0].live.start()
        _screens[0].users += 1
        return _screens[0]


def _disappear(screen: _Screen, task: Any) -> None:
    with _changing:
        screen.bars.remove_task(task)
        screen.users -= 1
        if not screen.users:
            screen.live.stop()
            _screens.remove(screen)
