"""The process that renders chat templates: starting and ending it, and its limits.

A process that renders chats has one such worker, or one for each thread that makes many at a time
(`own_processes`). The worker starts at the first chat (in about
0.1 s, it imports no torch), and again after a template went beyond a limit and the worker was
stopped. It ends with its parent, however the parent ends, because it reads from a socket whose
other end then closes. The program that runs in it is `template_worker.py`.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bevatron.chat.chat_messages import ChatError
from bevatron.errors import UnexpectedError

SECONDS = 5.0  # on the processor; a busy machine stops no template
PATIENCE = 120.0  # seconds by the clock, for a process that does not even compute
MEMORY, MEMORY_PER_BYTE = 64 << 20, 64  # bytes that a rendering may take, and per byte of its input
CHARACTERS, CHARACTERS_PER_BYTE = 8 << 20, 16  # of its text, likewise
WATCH = 0.2  # seconds between looks at its memory, where the system does not limit it
ENDS = "ends the process that renders it"
ENVIRONMENT = ("PATH", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


@dataclass(frozen=True)
class Rendered:
    """The text of a chat, and where in it (from, to) `{% generation %}` was."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Outline:
    """A template's literal texts, and the variables that it takes."""

    literals: tuple[str, ...]
    variables: frozenset[str]


def outline(source: str) -> Outline:
    """What a template is made of. Raises ChatError if it has a mistake."""
    answer = _ask(source, None)
    return Outline(tuple(answer["literals"]), frozenset(answer["variables"]))


def render(source: str, variables: dict[str, Any], now: datetime) -> Rendered:
    """The text of a template for plain data; `now` is what it gets as the time.

    Raises ChatError that says why there is none, beginning with "the chat template".
    """
    answer = _ask(source, variables, now.isoformat())
    return Rendered(answer["text"], [(a, b) for a, b in answer["spans"]])


def render_beginnings(
    source: str, variables: dict[str, Any], cuts: Sequence[tuple[int, bool]], now: datetime
) -> list[Rendered]:
    """The same for beginnings of one conversation, in one go: of each how many messages, and
    whether the next answer is asked for. Raises ChatError if one of them has no text."""
    answers = _ask(source, variables, now.isoformat(), cuts)["answers"]
    return [Rendered(a["text"], [(x, y) for x, y in a["spans"]]) for a in answers]


class _Gone(Exception):
    """The process has ended, or does not answer."""


class _Worker:
    """A process that is running."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("template_worker.py")
        specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
        paths = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # By its path, without `site` and what the environment adds: nothing else is in it.
                [sys.executable, "-I", "-S", str(program), *dict.fromkeys(paths)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C is not for it, nor is the terminal
            )
        self.limits_memory = True
        try:
            hello = self._receive(1024)
        except _Gone as gone:
            why = self.why(gone)
            raise UnexpectedError(f"the process for chat templates {why} when it starts") from gone
        self.limits_memory = bool(hello["limits_memory"])

    def ask(self, request: bytes, most: int) -> dict[str, Any]:
        """Its answer, of so many bytes at the most."""
        try:
            self.socket.settimeout(PATIENCE)
            self.socket.sendall(len(request).to_bytes(8, "big") + request)
        except OSError as error:
            raise _Gone("does not take its input") from error
        return self._receive(most)

    def why(self, gone: _Gone) -> str:
        """Why it does not answer; it is stopped if it has not ended."""
        status = None
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(1.0 if str(gone) == ENDS else 0.0)
        self.stop()
        if status == -signal.SIGPROF:
            return f"takes more than {SECONDS:g} s"
        return str(gone) if status is None else f"{ENDS} (exit status {status})"

    def stop(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        """In a forked process: this one is its parent's."""
        self.socket.close()
        self.process.returncode = 0

    def _receive(self, most: int) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        size = int.from_bytes(self._exactly(8, until), "big")
        if size > most:
            raise _Gone("gives more than was asked for")
        answer: dict[str, Any] = json.loads(self._exactly(size, until))
        return answer

    def _exactly(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            left = until - time.monotonic()
            if left <= 0:
                raise _Gone(f"does not answer within {PATIENCE:g} s")
            self.socket.settimeout(left if self.limits_memory else min(left, WATCH))
            try:
                piece = self.socket.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                if not self.limits_memory:
                    self._check_memory()
                continue
            except OSError:
                piece = b""
            if not piece:
                raise _Gone(ENDS)
            data += piece
        return bytes(data)

    def _check_memory(self) -> None:
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if said.isdigit() and int(said) * 1024 > 8 * MEMORY:
            raise _Gone("takes more memory than a chat can need")


class _Renderer:
    """One process at a time, which is started when it is needed, and answers one thread after
    another."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: _Worker | None = None
        _renderers.add(self)

    def ask(self, request: bytes, most: int) -> dict[str, Any]:
        """An answer. Raises ChatError if the process had to be stopped."""
        with self.lock:
            if self.worker is None or self.worker.process.poll() is not None:
                self.stop()
                self.worker = _Worker()
            try:
                answer = self.worker.ask(request, most)
            except _Gone as gone:
                raise ChatError(f"the chat template {self.worker.why(gone)}; stopped") from None
            except BaseException:  # such as Ctrl-C: the answer would be taken for the next one's
                self.stop()
                raise
            if answer.get("exhausted"):
                self.stop()
        return answer

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.worker = None

    def start_anew(self) -> None:
        """In a forked process."""
        if self.worker is not None:
            self.worker.leave()
        self.lock, self.worker = threading.Lock(), None


_renderers: weakref.WeakSet[_Renderer] = weakref.WeakSet()
_shared = _Renderer()
_own = threading.local()


@contextmanager
def own_processes() -> Iterator[Callable[[], None]]:
    """For threads that render at the same time: what each has to call first, to have a process of
    its own. They end with the context."""
    made: list[_Renderer] = []

    def begin() -> None:
        _own.renderer = _Renderer()
        made.append(_own.renderer)

    try:
        yield begin
    finally:
        for renderer in made:
            renderer.stop()


def _ask(
    source: str,
    variables: dict[str, Any] | None,
    now: str = "",
    cuts: Sequence[tuple[int, bool]] | None = None,
) -> dict[str, Any]:
    limits = {"seconds": SECONDS, "memory": MEMORY, "memory_per_byte": MEMORY_PER_BYTE}
    limits |= {"characters": CHARACTERS, "characters_per_byte": CHARACTERS_PER_BYTE}
    given = {"source": source, "variables": variables, "cuts": cuts, "now": now, "limits": limits}
    try:
        request = json.dumps(given).encode()
    except ValueError as error:  # a number with more digits than Python prints
        why = shortened(str(error))
        raise ChatError(f"the chat template cannot be given this: {why}") from error
    # 12: bytes of a character outside of the 16-bit plane, as JSON escapes it
    each = 12 * (CHARACTERS + CHARACTERS_PER_BYTE * len(request)) + (1 << 20)
    most = each * (1 if cuts is None else max(1, len(cuts)))
    renderer: _Renderer = getattr(_own, "renderer", _shared)
    answer = renderer.ask(request, most)
    if "error" in answer:
        raise ChatError(f"the chat template {shortened(str(answer['error']))}")
    return answer


def _start_anew() -> None:
    """In a forked process."""
    for renderer in list(_renderers):
        renderer.start_anew()


def _stop() -> None:
    for renderer in list(_renderers):
        renderer.stop()


atexit.register(_stop)
os.register_at_fork(after_in_child=_start_anew)


def shortened(text: str, limit: int = 300) -> str:
    """One line of a text that somebody else wrote, safe to print."""
    flat = " ".join(text.split())
    flat = "".join(c if c.isprintable() else "\ufffd" for c in flat)
    return flat if len(flat) <= limit else flat[:limit] + "..."
