"""A run's life as its processes see it: signals, dead ranks, hung ranks. Nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import Command
from tests.processes import Pool
from tests.train import small_run

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
TIMEOUT_S = 1800
Start = Callable[..., "Started"]


class Warm:
    """`bevatron`, whose process had its imports before, with the methods of a Popen."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = Command(folder, *arguments)
        self._process, self.output = command.process, command.output
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        assert self.returncode is not None, self.output.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


class Started:
    """A command in a session of its own, whose output is kept. bevatron itself starts warm; what it
    starts does not."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder, self.output = folder, folder / f"output-{time.monotonic_ns()}"
        self.process: Warm | subprocess.Popen[bytes]
        if command[:3] == (sys.executable, "-m", "bevatron"):
            self.process = Warm(folder, *command[3:])
            self.output = self.process.output
            self.output.touch()
            return
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def reach(self, step: int) -> None:
        """Wait until metrics.jsonl has that step."""
        deadline = time.monotonic() + TIMEOUT_S
        while not any(line["step"] >= step for line in self.lines()):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.02)

    def lines(self) -> list[dict[str, object]]:
        try:
            return small_run.lines(self.folder / "run")  # type: ignore[return-value]
        except ValueError:  # a line that is being written
            return []

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> str:
        """Wait for the end; returns all that was said."""
        self.process.wait(TIMEOUT_S)
        return self.output.read_text()

    def kill(self) -> None:
        """If a test has failed and left it behind."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def gone(pids: list[int], within_s: float = 120) -> bool:
    """Whether all processes have ended."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + within_s
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return small_run.make(tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Started] = []

    def begin(*arguments: str) -> Started:
        started.append(Started(tmp_path, sys.executable, "-m", *arguments))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def uninterrupted(pool: Pool, config: Path, steps: int) -> list[tuple[int, float, float]]:
    run = config.parent / "whole"
    seldom = [f"run.dir={run}", f"train.steps={steps}", "checkpoint.every=100000"]
    pool.run(2, small_run.train, config, seldom)
    return small_run.losses(run)


def test_sigterm_saves_and_the_run_goes_on_from_there(
    pool: Pool, config: Path, start: Start
) -> None:
    seldom = ["train.steps=100000", "checkpoint.every=100000"]
    run = start("bevatron", "train", str(config), "--nproc", "2", *seldom)
    run.reach(5)
    workers = run.workers()
    run.process.send_signal(signal.SIGTERM)
    said = run.end()
    assert run.process.returncode == 128 + signal.SIGTERM, said
    assert gone(workers) and "Traceback" not in said
    found = re.search(r"stopped by SIGTERM after step (\d+): saved", said)
    assert found is not None, said
    stopped = int(found[1])
    assert (config.parent / "run" / "latest").read_text() == f"step-{stopped:08d}\n"
    more = [*seldom, f"train.steps={stopped + 3}"]
    assert pool.run(2, small_run.train, config, more) == ["done"] * 2
    expected = uninterrupted(pool, config, stopped + 3)
    assert small_run.losses(config.parent / "run") == expected, "bit for bit"


@pytest.mark.slow
def test_a_killed_worker_is_restarted_from_the_newest_step(
    pool: Pool, config: Path, start: Start
) -> None:
    """torchrun restarts all; what they write together is what an uninterrupted run writes."""
    run = start(*TORCHRUN, "2", "--max-restarts", "1", "-m", "bevatron", "train", str(config),
                "train.steps=40", "checkpoint.every=5")  # fmt: skip
    run.reach(7)
    os.kill(run.workers()[1], signal.SIGKILL)
    said = run.end()
    assert run.process.returncode == 0, said
    assert "restart 1" in said
    assert small_run.losses(config.parent / "run") == uninterrupted(pool, config, 40)


@pytest.mark.parametrize("what", ["raise", pytest.param("bug", marks=pytest.mark.slow)])
def test_one_of_four_ranks_that_fails_stops_all_with_its_message(
    config: Path, start: Start, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second or two later on an idle machine; torchrun would kill whoever does not end, which it
    is told to do after the end of this test."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(2 * TIMEOUT_S))
    run = start(*TORCHRUN, "4", "-m", "tests.train.faulty", what, "2", "3", "train", str(config))
    said = run.end()
    assert run.process.returncode != 0
    if what == "raise":
        assert "error: rank 2: tokens.bin: Input/output error" in said
    else:
        assert re.search(r"error: rank 2: unexpected ValueError at \S+: a bug \(set BEVA", said)
    assert not re.search(r"error: rank [013]", said), "the others only lost a peer"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(
    config: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 waits for data that never comes; the other one in a collective for it."""
    os.mkfifo(config.parent / "fifo")
    monkeypatch.setenv("FIFO", str(config.parent / "fifo"))
    run = start(*TORCHRUN, "2", "-m", "tests.train.faulty", "fifo", "1", "3", "train", str(config),
                "safety.hang_timeout_s=20")  # fmt: skip
    said = run.end()
    assert run.process.returncode != 0
    assert re.search(r"nothing moved for 20 s .*the others wait for rank 1 \(.*waiting for data, "
                     r"step 3\), which is behind", said), said  # fmt: skip
    assert re.search(r"rank 1: waiting for data \(step 3\) at .*small_run.py:\d+ feeding", said)
    assert re.search(r"rank 0: in its step \(step 3\) at .*all_reduce", said)


@pytest.mark.slow
def test_a_stopped_process_is_named(config: Path, start: Start) -> None:
    """It cannot say anything itself; torch's agent kills it 30 s after the others have ended."""
    run = start("bevatron", "train", str(config), "--nproc", "2", "train.steps=100000",
                "safety.hang_timeout_s=20")  # fmt: skip
    run.reach(3)
    workers = run.workers()
    os.kill(workers[1], signal.SIGSTOP)
    said = run.end()
    assert re.search(r"rank 1 \(.*\) is silent", said) and run.process.returncode == 1, said
    assert gone(workers)


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_ends_at_once(config: Path, start: Start) -> None:
    arguments = ["bevatron", "train", str(config), "--nproc", "4", "train.steps=100000"]
    once = start(*arguments)
    once.reach(3)
    workers = once.workers()
    os.killpg(once.process.pid, signal.SIGINT)
    said = once.end()
    assert once.process.returncode == 130 and "saved; start again" in said
    assert "stopped by SIGINT after step" in said, said
    assert gone(workers) and "Traceback" not in said
    twice = start(*arguments)
    twice.reach(small_run.losses(config.parent / "run")[-1][0] + 3)
    workers = twice.workers()
    for _ in range(2):
        os.killpg(twice.process.pid, signal.SIGINT)
        time.sleep(0.05)
    said = twice.end()
    assert twice.process.returncode == 130 and "error: interrupted" in said
    assert "saved; start again" not in said
    assert gone(workers) and "Traceback" not in said


def maps(pid: int, name: str) -> bool:
    """Whether a process has loaded a library."""
    try:
        return name in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


MOMENTS: dict[str, Callable[[Started], bool]] = {
    "started": lambda run: bool(run.workers()),
    "loads torch": lambda run: any(maps(pid, "libtorch_cpu") for pid in run.workers()),
    "has joined": lambda run: "training " in run.output.read_text(),
}


@pytest.mark.parametrize(
    "moment", ["started", "loads torch", pytest.param("has joined", marks=pytest.mark.slow)]
)
def test_a_launcher_killed_as_its_workers_start_leaves_none(
    config: Path, start: Start, moment: str
) -> None:
    """They have nothing to save and end within a second or so, whatever they wait for; without
    their launcher's store they would do so for minutes."""
    run = start("bevatron", "train", str(config), "--nproc", "2", "train.steps=100000")
    deadline = time.monotonic() + TIMEOUT_S
    while not MOMENTS[moment](run):
        assert run.process.poll() is None and time.monotonic() < deadline, run.output.read_text()
        time.sleep(0.002)
    workers = run.workers()
    run.process.kill()
    assert workers and gone(workers)


def test_ctrl_c_before_the_first_step_says_so_at_once(config: Path, start: Start) -> None:
    run = start("bevatron", "train", str(config), "--nproc", "2", "train.steps=100000")
    deadline = time.monotonic() + TIMEOUT_S
    while len(run.workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(run.process.pid, signal.SIGINT)
    while "saving after this step" not in run.output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    said = run.end()
    assert run.process.returncode == 130
    assert "nothing to save yet" in said  # of the launcher, or of a run that had just begun
    assert not (config.parent / "run").exists() or not list((config.parent / "run").glob("step-*"))


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_workers(config: Path, start: Start) -> None:
    """They save, as at any other SIGTERM."""
    run = start("bevatron", "train", str(config), "--nproc", "2", "train.steps=100000")
    run.reach(3)
    workers = run.workers()
    run.process.kill()
    assert gone(workers, TIMEOUT_S)
    assert small_run.events(config.parent / "run")[-1][1] == "stopped"


@pytest.mark.slow
def test_the_launcher_restarts_a_killed_worker(pool: Pool, config: Path, start: Start) -> None:
    run = start("bevatron", "train", str(config), "--nproc", "2", "--max-restarts", "1",
                "train.steps=40", "checkpoint.every=5")  # fmt: skip
    run.reach(7)
    os.kill(run.workers()[0], signal.SIGKILL)
    said = run.end()
    assert run.process.returncode == 0, said
    assert small_run.losses(config.parent / "run") == uninterrupted(pool, config, 40)
