"""Running Python that a model wrote, in a process that can do next to nothing else.

The program runs in `locked_child.py`: a fresh process in a temporary folder of its own, with limits
of memory, processor time and files, without network, without other processes, without the files of
this machine (see there for what the kernel enforces). Here its clock is watched and its output
bounded; at the end the process and everything in its session are killed and the folder is removed.

What is not promised: a program that finds a fault in the kernel or in Python gets further; it sees
that files exist, and how long things take. Where Landlock or seccomp are missing (Linux before
5.13, some containers, macOS), `Guards.missing` says so and the callers refuse.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bevatron.errors import BevatronError

CHILD = Path(__file__).with_name("locked_child.py")
MOST_OUTPUT = 1 << 20  # bytes of standard output, and of a reply
FILE_BYTES = 16 << 20  # of a file that it writes
PATIENCE = 60.0  # seconds by the clock, for a process to start on a busy machine
SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"),
    *("/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/dev/zero"),
)
TAMPERS = "interferes with the process that runs it"
GUARDS = {"files": "writing files", "processes": "starting processes", "network": "the network"}


class Stopped(Exception):
    """Why a program was ended, such as `takes more than 5 s`."""


@dataclass(frozen=True)
class Ran:
    """What a program did: `stopped` says why it was ended, if it was; `error` the last line that it
    wrote to standard error, if it failed."""

    output: str = ""
    error: str | None = None
    stopped: str | None = None

    @property
    def fine(self) -> bool:
        return self.error is None and self.stopped is None


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds by the clock, bytes of memory, whether it may import what is
    installed, and whether it may run where it cannot be locked in."""

    seconds: float = 10.0
    memory: int = 1 << 30
    site_packages: bool = False
    allow_unguarded: bool = False


class LockedPython:
    """A program that is running, or that one can talk to once its own lines have run. A context.

    Raises BevatronError where this system cannot lock it in, Stopped for what ends it."""

    def __init__(self, code: str, limits: Limits, *, stdin: str | None = None) -> None:
        self.limits, self.talks = limits, stdin is None
        self.folder = tempfile.TemporaryDirectory(prefix="locked-", ignore_cleanup_errors=True)
        self._held = bytearray()
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = self._started(theirs.fileno())
            self._until = time.monotonic() + PATIENCE
            paths = _packages() if limits.site_packages else []
            given: dict[str, Any] = {"paths": paths, "readable": [*_readable(), *paths]}
            given |= {"folder": self.folder.name, "seconds": limits.seconds}
            given |= {"memory": limits.memory, "file_bytes": FILE_BYTES}
            self._send(given)
            guards = self._line()["guards"]
            missing = [what for name, what in GUARDS.items() if not guards[name]]
            if missing and not limits.allow_unguarded:
                raise BevatronError(
                    f"this system cannot keep a model's code from {' and '.join(missing)} (that "
                    "takes Linux 5.13 or later with Landlock and seccomp, on x86-64 or arm64); set "
                    "allow_unguarded: true to run it all the same"
                )
            self._until = time.monotonic() + limits.seconds
            self._send({"code": code, "talk": self.talks})
            self._input = (stdin or "").encode("utf-8", "surrogatepass")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LockedPython:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def started(self) -> str | None:
        """Wait until the program's own lines have run: what they raise, if they do."""
        said = self._line()
        return str(said["error"]) if "error" in said else None

    def ask(self, **what: str) -> dict[str, Any]:
        """`value`: the repr of an expression there; `run`: run a statement. {"value"} or
        {"error"}. The program shares the process that replies, so it may lie; what it wrote to the
        connection before it was asked is no reply."""
        nonce = secrets.token_hex(16)
        self._send({**what, "nonce": nonce})
        said = self._line()
        if said.get("nonce") != nonce:
            raise Stopped(TAMPERS)
        return said

    def finish(self) -> Ran:
        """Give it its standard input and wait for its end."""
        try:
            output, error = self._communicate()
        except Stopped as stopped:
            return Ran(stopped=str(stopped))
        status = self.process.wait()
        text = output.decode("utf-8", "replace")
        if status == 0:
            return Ran(text)
        lines = error.decode("utf-8", "replace").strip().splitlines()
        if status < 0:
            return Ran(text, stopped=_ended(status))
        return Ran(text, error=lines[-1][:300] if lines else f"exit status {status}")

    def close(self) -> None:
        """End it, whatever it does, and remove its folder."""
        self.socket.close()
        if (process := getattr(self, "process", None)) is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        self.folder.cleanup()

    def _started(self, control: int) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        # `pass_fds` keeps a descriptor's number, and the child looks for its socket at 3.
        program = (
            f"import os; os.dup2({control}, 3, False); "
            f"exec(compile(open({str(CHILD)!r}).read(), {str(CHILD)!r}, 'exec'))"
        )
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", program],
            stdin=quiet if self.talks else subprocess.PIPE,
            stdout=quiet if self.talks else subprocess.PIPE,
            stderr=quiet if self.talks else subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "HOME": self.folder.name, "TMPDIR": self.folder.name}
            | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
            | {"PYTHONUTF8": "1", "LANG": "C.UTF-8"},
            cwd=self.folder.name,
            pass_fds=(control,),
            start_new_session=True,
        )

    def _send(self, what: dict[str, Any]) -> None:
        data = json.dumps(what).encode() + b"\n"
        self.socket.settimeout(max(0.01, self._until - time.monotonic()))
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise Stopped(self._why()) from error

    def _line(self) -> dict[str, Any]:
        while b"\n" not in self._held:
            if len(self._held) > 2 * MOST_OUTPUT:
                raise Stopped("gives a value that is too long")
            self.socket.settimeout(max(0.001, self._until - time.monotonic()))
            try:
                piece = self.socket.recv(1 << 16)
            except TimeoutError:
                raise Stopped(f"takes more than {self.limits.seconds:g} s") from None
            except OSError:
                piece = b""
            if not piece:
                raise Stopped(self._why())
            self._held += piece
        line, _, rest = bytes(self._held).partition(b"\n")
        self._held = bytearray(rest)
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Stopped(TAMPERS)
        return found

    def _why(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            return _ended(self.process.wait(1.0))
        return TAMPERS

    def _communicate(self) -> tuple[bytes, bytes]:
        process, found = self.process, {"out": bytearray(), "err": bytearray()}
        assert process.stdin and process.stdout and process.stderr
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ, "out")
            waiting.register(process.stderr, selectors.EVENT_READ, "err")
            os.set_blocking(process.stdin.fileno(), False)
            if self._input:
                waiting.register(process.stdin, selectors.EVENT_WRITE, "in")
            else:
                process.stdin.close()
            while waiting.get_map():
                left = self._until - time.monotonic()
                if left <= 0:
                    raise Stopped(f"takes more than {self.limits.seconds:g} s")
                for key, _ in waiting.select(left):
                    if key.data == "in":
                        self._feed(waiting)
                        continue
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        waiting.unregister(key.fileobj)
                    found[key.data] += piece
                    if len(found[key.data]) > MOST_OUTPUT:
                        raise Stopped("writes more than 1 MiB")
        return bytes(found["out"]), bytes(found["err"])

    def _feed(self, waiting: selectors.BaseSelector) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        try:
            self._input = self._input[os.write(pipe.fileno(), self._input[: 1 << 16]) :]
        except BlockingIOError:
            return
        except OSError:
            self._input = b""
        if not self._input:
            waiting.unregister(pipe)
            pipe.close()


def run_python(code: str, limits: Limits | None = None, stdin: str = "") -> Ran:
    """What a program writes, given this as its standard input. Raises BevatronError where this
    system cannot lock it in."""
    try:
        with LockedPython(code, limits or Limits(), stdin=stdin) as running:
            return running.finish()
    except Stopped as stopped:
        return Ran(stopped=str(stopped))


def _ended(status: int) -> str:
    if status == -signal.SIGXCPU:
        return "takes too much of the processor's time"
    if status == -signal.SIGXFSZ:
        return f"writes a file of more than {FILE_BYTES >> 20} MiB"
    if status < 0:
        return f"ends its process (signal {-status})"
    return f"ends its process (exit status {status})"


@cache
def _readable() -> tuple[str, ...]:
    """What a program may read: Python's own folders, not the packages beside it."""
    found = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sys.base_prefix]
    found.append(str(Path(sys.executable).resolve()))
    return tuple(dict.fromkeys(p for p in [*found, *SYSTEM] if p and p != "/usr"))


@cache
def _packages() -> list[str]:
    return [p for p in site.getsitepackages() if Path(p).is_dir()]
