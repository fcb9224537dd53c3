"""SIGKILL at random moments of a run that saves at every step: what is continued is the run that
was never interrupted, bit for bit, and no folder looks like a step without being one."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Command, bevatron
from tests.train.tiny_run import check_steps, metrics, prepare


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("killed"))


def moment(run: Path, kind: str) -> Callable[[], bool]:
    """When to kill: in a save after a step, after a step, or half a second after the start."""
    lines, began = len(metrics(run)), time.monotonic()

    def seen() -> bool:
        if kind == "start":
            return time.monotonic() > began + 0.5
        stepped = len(metrics(run)) > lines
        return stepped and (kind == "step" or any(run.glob(".step-*partial")))

    return seen


RUNS = 8  # at the most, until one was killed often enough, and once in a save


def survive(work: Path, kills: int, steps: int, *more: str) -> None:
    """Run to the end once, then again with so many kills; compare."""
    options = [f"train.steps={steps}", "checkpoint.every=1", "checkpoint.async=true", *more]
    options += ["checkpoint.weights_every=3", "checkpoint.weights_keep=2"]
    whole, run = work / f"whole-{kills}", work / f"run-{kills}"
    status, said = bevatron(work, "train", "run.yaml", f"run.dir={whole}", *options)
    assert status == 0, said
    expected = {step: line for step, *line in metrics(whole)}
    assert list(expected) == list(range(1, steps + 1))
    randomly, killed, inside, newest, runs = random.Random(0), 0, 0, 0, 1
    while True:
        command = Command(work, "train", "run.yaml", f"run.dir={run}", *options)
        if killed < kills:
            if command.wait_until(moment(run, randomly.choice(("save", "step", "start")))):
                time.sleep(randomly.choice((0, 0, 0.003, 0.01, 0.05, 0.2)) * randomly.random())
                command.kill()
                killed += 1
            inside += any(run.glob(".step-*partial"))
        status = command.wait()
        found = check_steps(run)
        assert max(found, default=0) >= newest, "a step that was complete is gone"
        newest = max(found, default=0)
        for step, *line in metrics(run):
            assert line == expected[step]
        if status == 0 and ((killed == kills and inside) or runs == RUNS):
            break
        if status == 0:  # the machine was too quick, or too slow to look: once more
            shutil.rmtree(run)
            killed, newest, runs = 0, 0, runs + 1
            continue
        assert status == -9, command.said()
    assert [step for step, *_ in metrics(run)] == list(expected)
    assert killed == kills, "it was too quick to be killed so often"
    assert inside, "no save was interrupted"
    assert not [p.name for p in run.iterdir() if p.name.startswith((".", "damaged"))]
    assert found == [steps - 1, steps]


def test_a_killed_run_continues_bit_equal(work: Path) -> None:
    survive(work, 4, 16)


@pytest.mark.slow
def test_a_run_killed_thirty_times_continues_bit_equal(work: Path) -> None:
    survive(work, 30, 120)


@pytest.mark.slow
def test_two_ranks_killed_six_times_continue_bit_equal(work: Path) -> None:
    survive(work, 6, 40, "parallel.tp=2", "--nproc", "2")
