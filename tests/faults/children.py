"""What needs a process of its own: being killed, racing, and disks that are full or read-only.

`python -m tests.faults.children WHAT VERB ROOT [OPTION]` prints one JSON object: how many `cases`
there were, and the `failures`, one sentence each. ROOT holds two Hugging Face folders, `a` and `b`.
No torch is loaded, so a process can be forked for every case.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bevatron.bridge import assemble, convert, import_hf
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.checkpoint import new_folder
from bevatron.compress import prune
from bevatron.compress.importance_scores import Scores, expected, spec_hash
from bevatron.compress.prune_targets import Targets
from bevatron.errors import BevatronError

Contents = dict[str, bytes | None]


def prune_half(source: Path, target: Path, *, overwrite: bool = False) -> Any:
    """Every tensor loses half of its rows, columns or both; the last ones stay."""
    shapes = expected(open_native(source).spec)
    rising = {name: np.arange(*shape, dtype=np.float32) for name, shape in shapes.items()}
    scores = Scores(rising, {"spec": spec_hash(open_native(source).spec)})
    targets = Targets(hidden_size=16, intermediate_size=24)
    return prune.prune(source, target, targets, scores=scores, overwrite=overwrite)


CALLS = {"import": import_checkpoint, "export": export_checkpoint, "prune": prune_half}


def contents(folder: Path) -> Contents | None:
    """Everything below a folder; None if there is no such folder."""
    if not os.path.lexists(folder):
        return None
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


class Job:
    """A conversion of `a` or of `b` to one target, or its pruning, and what each should give."""

    def __init__(self, verb: str, root: Path, target: Path) -> None:
        self.call: Callable[..., Any] = CALLS[verb]
        self.sources = {name: root / name for name in "ab"}
        self.target = target
        if verb != "import":
            for name, source in self.sources.items():
                self.sources[name] = root / f"native-{name}"
                import_checkpoint(source, self.sources[name])
        self.wanted: dict[str, Contents | None] = {None: None}
        for name, source in self.sources.items():
            self.call(source, root / f"wanted-{name}")
            self.wanted[name] = contents(root / f"wanted-{name}")
        self.root = root

    def reset(self, old: bool) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir(parents=True)
        if old:
            shutil.copytree(self.root / "wanted-a", self.target)

    def run(self, name: str, overwrite: bool) -> None:
        self.call(self.sources[name], self.target, overwrite=overwrite)

    def expect_back(self) -> None:
        """An old target that was moved aside is back before anything else happens."""
        try:
            self.run("b", False)
        except BevatronError as error:
            assert "already exists" in str(error) and not self.beside()
            assert contents(self.target) == self.wanted["a"]
        else:
            raise AssertionError("the old target is lost")

    def beside(self) -> list[str]:
        """What lies in the target's folder, the target apart."""
        return sorted(p.name for p in self.target.parent.iterdir() if p != self.target)


# --- killed at every write -----------------------------------------------------------------------

LAST = 40  # points


def arm(number: int) -> list[int]:
    """Let this process die at point `number`: before, in the middle of or after any call that
    changes a file or folder. Returns where the points passed are counted."""
    passed = [0]

    def tick() -> None:
        passed[0] += 1
        if passed[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # A thread syncs now and then: how often is a matter of the machine's load
            counted = real is not fsync or threading.current_thread() is threading.main_thread()
            if counted:
                tick()
            result = real(*args, **kwargs)
            if counted:
                tick()
            return result

        return call

    whole, fsync = os.pwrite, os.fsync

    def pwrite(fd: int, data: Any, at: int) -> int:
        tick()
        whole(fd, data[: len(data) // 2], at)
        tick()
        written = whole(fd, data, at)
        tick()
        return written

    os.pwrite = pwrite
    for name in ("mkdir", "rename", "unlink", "rmdir", "fsync", "ftruncate"):
        setattr(os, name, watched(getattr(os, name)))
    io.open = watched(io.open)
    fcntl.flock = watched(fcntl.flock)
    new_folder._exchange = watched(new_folder._exchange)
    return passed


def killed(verb: str, root: Path, option: str) -> tuple[int, list[str]]:
    """`option`: `new`, `overwrite`, or `overwrite-without-swap` for a system without renameat2."""
    job, overwrite = Job(verb, root, root / "work" / "target"), option != "new"
    swap = option != "overwrite-without-swap"
    if not swap:
        new_folder._exchange = lambda a, b: False
    failures: list[str] = []
    total = points(job, overwrite)
    if contents(job.target) != job.wanted["b"] or job.beside():
        failures.append(f"unharmed, it left {job.beside()}")
    # Some of the long way, and every point from the last files on over the commit to the end.
    chosen = sorted({*range(1, total, 7), *range(max(1, total - LAST), total + 1)})
    for number in chosen:
        job.reset(overwrite)
        child = os.fork()
        if not child:
            arm(number)
            job.run("b", overwrite)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = contents(job.target)
        whole = [job.wanted["b"], job.wanted["a"] if overwrite else None]
        if not swap and contents(job.target.parent / ".target.old") == job.wanted["a"]:
            whole.append(None)
        if status != -signal.SIGKILL:
            failures.append(f"point {number} of {total} was not reached: status {status}")
        if found not in whole:
            failures.append(f"killed at {number}: the target is neither old nor new")
        if set(job.beside()) - {".target.lock", ".target.partial", ".target.old"}:
            failures.append(f"killed at {number}: left {job.beside()}")
        if overwrite and found is None:
            job.expect_back()
        try:
            job.run("b", overwrite or found is not None)
        except BevatronError as error:
            failures.append(f"killed at {number}: the next run failed: {error}")
        if contents(job.target) != job.wanted["b"] or job.beside():
            failures.append(f"killed at {number}: the next run left {job.beside()}")
    return len(chosen), failures


def points(job: Job, overwrite: bool) -> int:
    """How many points a conversion has at which it can be killed."""
    job.reset(overwrite)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        passed = arm(0)
        job.run("b", overwrite)
        os.write(write, str(passed[0]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    total = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    return total


# --- several at once -----------------------------------------------------------------------------


def race(verb: str, root: Path, option: str) -> tuple[int, list[str]]:
    """Six processes write one target, begun at the same moment. `option`: `new` or `overwrite`."""
    job, overwrite = Job(verb, root, root / "work" / "target"), option == "overwrite"
    failures: list[str] = []
    rounds, lost = 25, 0
    for number in range(rounds):
        job.reset(overwrite)
        read, write = os.pipe()
        children = []
        for i in range(6):
            child = os.fork()
            if not child:
                os.close(write)
                os.read(read, 1)  # returns when the parent closes its end
                try:
                    job.run("ab"[i % 2], overwrite)
                except BevatronError as error:
                    known = "is being written by" in str(error)
                    known |= not overwrite and "already exists" in str(error)
                    os._exit(2 if known else 3)
                except BaseException:
                    os._exit(4)
                os._exit(0)
            children.append(child)
        os.close(read)
        os.close(write)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        won = statuses.count(0)
        lost += statuses.count(2)
        if set(statuses) - {0, 2} or not won or (won > 1 and not overwrite):
            failures.append(f"round {number}: exit statuses {statuses}")
        if contents(job.target) not in (job.wanted["a"], job.wanted["b"]) or job.beside():
            failures.append(f"round {number}: the target is mixed, or left {job.beside()}")
    if not lost:
        failures.append("no two of them ever met")
    return rounds, failures


# --- disks ---------------------------------------------------------------------------------------


def mount(disk: Path, *options: str) -> None:
    """A tmpfs, or a change of its options; needs a mount namespace (`unshare -rm`)."""
    fresh = [] if os.path.ismount(disk) else ["-t", "tmpfs"]
    disk.mkdir(exist_ok=True)
    kind = ["tmpfs"] if fresh else []
    command = ["mount", *fresh, "-o", ",".join(options), *kind, str(disk)]
    subprocess.run(command, check=True, capture_output=True)


def refusal(job: Job, word: str, overwrite: bool) -> str | None:
    """What is wrong with how a run of `b` over the old `a` fails; None if it does not fail."""
    try:
        job.run("b", overwrite)
    except BevatronError as error:
        if word not in str(error) or str(job.target) not in str(error) or "\n" in str(error):
            return f"said: {error}"
        if contents(job.target) != (job.wanted["a"] if overwrite else None) or job.beside():
            return f"the old target is harmed, or left {job.beside()}"
        return ""
    return None


def full(verb: str, root: Path, option: str) -> tuple[int, list[str]]:
    """A real disk with ever more room, until the conversion fits. `option`: `new`, `overwrite`."""
    disk, overwrite = root / "disk", option == "overwrite"
    job = Job(verb, root, disk / "folder" / "target")
    mount(disk, "size=64m")
    job.reset(overwrite)
    stat = os.statvfs(disk)
    used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    failures = []
    mount(disk, "remount", f"size={used + 8192}")
    early = refusal(job, "free some space", overwrite)
    if early or early is None:
        failures.append(f"the lack of room was not seen beforehand: {early}")
    # From here on as if others filled the disk after the check.
    for module in (import_hf, convert, prune, assemble):
        module.check_space = lambda *args: None
    cases = 0
    while True:
        mount(disk, "remount", f"size={used + 4096 * (cases + 1)}")  # a size of 0 is no limit
        wrong = refusal(job, "No space left", overwrite)
        if wrong is None:
            break
        if wrong:
            failures.append(f"{4 * cases + 4} KiB free: {wrong}")
        cases += 1
    if contents(job.target) != job.wanted["b"] or job.beside():
        failures.append(f"with enough room: left {job.beside()}")
    return cases, failures


def read_only(verb: str, root: Path, option: str) -> tuple[int, list[str]]:
    disk, overwrite = root / "disk", option == "overwrite"
    job = Job(verb, root, disk / "folder" / "target")
    mount(disk, "size=64m")
    job.reset(overwrite)
    mount(disk, "remount", "ro")
    wrong = refusal(job, "Read-only file system", overwrite)
    return 1, ["it was written"] if wrong is None else [wrong] if wrong else []


def main() -> None:
    what, verb, root, option = sys.argv[1:]
    os.fsync = lambda fd: None  # for speed: only lost power, unlike a kill, loses written pages
    known = {"killed": killed, "race": race, "full": full, "read-only": read_only}
    cases, failures = known[what](verb, Path(root), option)
    print(json.dumps({"cases": cases, "failures": failures}))


if __name__ == "__main__":
    main()
