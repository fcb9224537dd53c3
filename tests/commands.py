"""`bevatron ARGUMENTS` in processes of their own that start in a fraction of a second: forked from
a server that has imported torch already, each the leader of a session."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import PRELOAD

TIMEOUT_S = 1800  # of a command that hangs


def _serve(
    folder: Path, arguments: list[str], output: Path, errors: Path, environment: dict[str, str]
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with output.open("ab") as out, errors.open("ab") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    from bevatron.cli.main import main

    sys.argv = ["bevatron", *arguments]
    main()


class Command:
    """A command that has been started in this process's environment; what it says goes to a file in
    `folder`, and what it says on stderr to `errors`, if that is given."""

    count = 0

    def __init__(self, folder: Path, *arguments: str, errors: Path | None = None) -> None:
        Command.count += 1
        self.output = folder / f"said-{Command.count}.txt"
        environment = dict(os.environ)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.process = context.Process(
            target=_serve,
            args=(folder, list(arguments), self.output, errors or self.output, environment),
        )
        self.process.start()

    def wait(self) -> int:
        """Its exit status."""
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode is not None, f"no end after {TIMEOUT_S} s"
        return self.process.exitcode

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_until(self, seen: Callable[[], bool]) -> bool:
        """Wait until something is seen, or it has ended; whether it is still running."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.is_alive() and not seen():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)
        return self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL, to it and to all that it started."""
        assert self.process.pid is not None
        for pid in [self.process.pid, *_descendants(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.join()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        own = children.get(left.pop(), [])
        found += own
        left += own
    return found


def bevatron(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run to the end: exit status, and what it said on stdout and stderr."""
    command = Command(folder, *arguments)
    status = command.wait()
    return status, command.said()


def ran(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same as `subprocess.run` tells it, stdout and stderr apart."""
    with tempfile.TemporaryDirectory() as apart:
        errors = Path(apart) / "errors"
        command = Command(folder, *arguments, errors=errors)
        status = command.wait()
        said = errors.read_text() if errors.exists() else ""
        done = subprocess.CompletedProcess(arguments, status, command.said(), said)
        command.output.unlink(missing_ok=True)
    return done
