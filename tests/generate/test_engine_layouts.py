"""The layout changes nothing: the same answers from any number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bevatron.bridge.open_weights import open_weights
from bevatron.errors import BevatronError
from bevatron.generate.engine import Engine
from bevatron.generate.engine_processes import Plan, WorkerGroup, join
from bevatron.generate.request import Generation, Request, Sampling
from tests.generate.engine_models import make
from tests.generate.test_engine import prompts
from tests.processes import Pool

Answers = tuple[list[Generation], list[list[float]]]
LAYOUTS = [(2, 1), (1, 2), (2, 2)]
KINDS = ["one-kv-head", "three-kv-heads", "llama", "nemotron", "nanochat", "llama-nemotron"]


def requests() -> list[Request]:
    sampled = Sampling(0.9, top_k=30, top_p=0.95, repetition_penalty=1.2, seed=4)
    asked = [Request(p, 9 + i) for i, p in enumerate(prompts(1, 5, 17, 33))]
    asked.append(Request(prompts(8)[0], 12, sampled, logprobs=2, prompt_logprobs=3))
    return asked


def answers(engine: Engine) -> Answers:
    likelihoods = engine.loglikelihoods(prompts(3, 40, 2))
    return engine.complete(requests()), [found.logprobs for found in likelihoods]


def on_ranks(folders: list[Path], tp: int, pp: int) -> list[Answers]:
    """Of rank 0, for each model."""
    out = []
    for folder in folders:
        opened = open_weights(folder)
        group = join(opened, Plan(str(folder), tp, pp, "cpu", None, False, True))
        if group is not None:
            with Engine(opened, group, max_batch=4, max_tokens=None, queue=8) as engine:
                out.append(answers(engine))
    return out


def numbers(given: list[Generation], likelihoods: list[list[float]]) -> list[float]:
    out = [value for logprobs in likelihoods for value in logprobs]
    for answer in given:
        for one in [*(answer.logprobs or []), *(answer.prompt_logprobs or [])]:
            if one is not None:
                out += [one.logprob, *(value for _, value in one.top)]
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Answers]:
    """The answers of one process, by the model's folder."""
    out = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        make(folder, kind)
        with Engine.open(folder, max_batch=4) as engine:
            out[folder] = answers(engine)
    return out


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_layout_gives_the_same_answers(
    tp: int, pp: int, pool: Pool, alone: dict[Path, Answers]
) -> None:
    got, *others = pool.run(tp * pp, on_ranks, list(alone), tp, pp)
    assert others == [[]] * (tp * pp - 1)
    for (folder, expected), found in zip(alone.items(), got, strict=True):
        for ours, theirs in zip(found[0], expected[0], strict=True):
            assert (ours.text, ours.tokens) == (theirs.text, theirs.tokens), folder
        assert numbers(*found) == pytest.approx(numbers(*expected), abs=1e-4), folder


def test_the_engine_starts_and_ends_its_own_processes(tmp_path: Path) -> None:
    make(tmp_path, "llama-nemotron")
    with Engine.open(tmp_path, max_batch=4) as engine:
        expected, _ = answers(engine)
    with ThreadPoolExecutor() as threads:  # its processes outlive the thread that started them
        opened = threads.submit(Engine.open, tmp_path, tp=2, max_batch=4).result()
    with opened as engine:
        assert isinstance(engine.group, WorkerGroup)
        workers = engine.group.workers
        assert [a.tokens for a in answers(engine)[0]] == [a.tokens for a in expected]
        stream = engine.submit(Request((1,), 4000))
        next(stream)
        workers[0].send_signal(signal.SIGKILL)
        with pytest.raises(BevatronError, match="rank 1 ended by signal 9"):
            list(stream)
        with pytest.raises(BevatronError, match="rank 1"):
            engine.submit(Request((1,), 1))
    assert all(worker.poll() is not None for worker in workers)
    assert not torch.distributed.is_initialized()


def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    with pytest.raises(BevatronError, match="6 query heads, which tp=4 does not divide"):
        Engine.open(tmp_path, tp=4)
    with pytest.raises(BevatronError, match="pp is 0"):
        Engine.open(tmp_path, pp=0)


OPEN = """
import sys, time
from bevatron.generate.engine import Engine
engine = Engine.open(sys.argv[1], tp=2)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("moment", ["started", pytest.param("ready", marks=pytest.mark.slow)])
def test_workers_end_with_a_killed_parent(tmp_path: Path, moment: str) -> None:
    """Also one that is killed as they start: they do not wait for it until their time is over."""
    make(tmp_path, "llama")
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if moment == "ready":
        assert parent.stdout is not None
        assert parent.stdout.readline()
    while not (found := children.read_text().split()):
        assert parent.poll() is None
        time.sleep(0.002)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{found[0]}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{found[0]}").exists()


@pytest.mark.slow
def test_the_first_cause_is_told_when_a_worker_cannot_load(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    code = (
        "import sys, bevatron.generate.engine_processes as w\n"
        "real = w._start\n"
        "def start(plan, rank, port):\n"
        "    import dataclasses\n"
        "    return real(dataclasses.replace(plan, ckpt='/nowhere'), rank, port)\n"
        "w._start = start\n"
        "from bevatron.generate.engine import Engine\n"
        "try:\n"
        "    Engine.open(sys.argv[1], pp=2)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, check=False, env={**os.environ}
    )
    assert "BevatronError rank 1: " in done.stdout, done.stderr
    assert "/nowhere" in done.stdout
