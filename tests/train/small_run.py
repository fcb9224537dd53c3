"""A run small enough to be started many times, and ways to trouble it on one rank at one step."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from bevatron.checkpoint.rank_boxes import local
from bevatron.errors import BevatronError
from bevatron.parallel.pipeline import Runner
from bevatron.spec.json import to_json
from bevatron.train.config_file import load_config
from bevatron.train.launch import layout_of, work
from bevatron.train.save_steps import Saver
from bevatron.train.token_feed import TokenFeed
from bevatron.train.trainer import Trainer
from tests.data.test_store import write_store
from tests.specs import HOMOGENEOUS

CONFIG = """\
model: {{spec: {folder}/spec.json}}
data: {{train: [{{path: {folder}/tokens}}], validation: [{{path: {folder}/tokens}}], seq_len: 16}}
train: {{steps: 8, global_batch: 8, micro_batch: 2, precision: fp32, val_every: 0}}
optimizer: {{lr: 1.0e-3}}
schedule: {{name: constant}}
checkpoint: {{every: 2, keep: 9}}
run: {{dir: {folder}/run}}
"""


def make(folder: Path) -> Path:
    """A spec, tokens and run.yaml in `folder`; returns the latter."""
    (folder / "spec.json").write_text(to_json(HOMOGENEOUS))
    source = random.Random(0)
    documents = [[source.randrange(97) for _ in range(source.randrange(5, 80))] for _ in range(200)]
    write_store(folder / "tokens", documents, 97)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "run.yaml"


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def losses(run: Path) -> list[tuple[int, float, float]]:
    """What decides the trajectory, of every update."""
    return [(x["step"], x["loss"], x["grad_norm"]) for x in lines(run) if "lr" in x]


def events(run: Path) -> list[tuple[int, str]]:
    return [(x["step"], x["event"]) for x in lines(run) if "event" in x]


Trouble = tuple[str, int, int]  # what, on which rank, at which step (from 1)


def train(config: Path, overrides: list[str], trouble: Trouble | None = None) -> str:
    """Run in this process's group, with trouble on the way. Returns how it ended: `done`, `exit N`
    or the error's message."""
    loaded = load_config(config, overrides)
    try:
        with troubled(trouble) if trouble else _untroubled():
            work(loaded, layout_of(loaded, dist.get_world_size()), False)
    except BevatronError as error:
        return str(error)
    except SystemExit as left:
        return f"exit {left.code}"
    return "done"


@contextmanager
def _untroubled() -> Iterator[None]:
    yield


@contextmanager
def troubled(trouble: Trouble) -> Iterator[None]:
    """Cause `trouble` while the context lasts, each time that the step is met."""
    what, rank, step = trouble
    at = [0]
    batch, compute, evaluate = TokenFeed.batch, Runner.step, Trainer.evaluate
    update, save = Trainer.step, Saver.save

    def here(name: str) -> bool:
        return what == name and rank == dist.get_rank() and at[0] == step

    def feeding(self: TokenFeed, number: int) -> Any:
        at[0] = number + 1
        if here("raise"):
            raise OSError(5, "Input/output error", "tokens.bin")
        if here("bug"):
            raise ValueError("a bug")
        if here("fifo"):
            Path(os.environ["FIFO"]).read_text()  # nobody ever writes
        if here("signal in batch"):
            os.kill(os.getpid(), signal.SIGTERM)
        if here("signal in data wait"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return batch(self, number)

    def computing(self: Runner, *args: Any, **more: Any) -> Any:
        value = compute(self, *args, **more)
        grad = next(local(p.grad) for p in self.placed.trained.values() if p.grad is not None)
        if here("nan loss"):
            value.fill_(float("nan"))
        if here("inf gradient"):
            grad.view(-1)[3] = float("inf")
        if here("spike"):
            for parameter in self.placed.trained.values():
                assert parameter.grad is not None
                local(parameter.grad).mul_(1e4)
        return value

    def send(moment: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def sending(*args: Any, **more: Any) -> Any:
            if here(f"signal in {moment}"):
                os.kill(os.getpid(), signal.SIGTERM)
            return act(*args, **more)

        return sending

    with (
        patch.object(TokenFeed, "batch", feeding),
        patch.object(Runner, "step", computing),
        patch.object(Trainer, "step", send("step", update)),
        patch.object(Trainer, "evaluate", send("evaluation", evaluate)),
        patch.object(Saver, "save", send("save", save)),
    ):
        yield


def stepped(config: Path, batches: list[int]) -> dict[str, torch.Tensor]:
    """One process, no loop: the weights after one update from each of these batches (from 0)."""
    from bevatron.parallel.layout import Layout
    from bevatron.parallel.process_groups import mesh
    from bevatron.train.objectives import Pretrain

    loaded, device = load_config(config, []), torch.device("cpu")
    trainer = Trainer(HOMOGENEOUS, Layout(), mesh(Layout(), device), Pretrain(),
                      seq_len=loaded.data.seq_len, train=loaded.train,
                      optimizer=loaded.optimizer, device=device)  # fmt: skip
    trainer.fill_random(loaded.train.seed)
    feed = TokenFeed(loaded.data, HOMOGENEOUS, global_batch=loaded.train.global_batch,
                seed=loaded.train.seed, dp_rank=0, dp=1, device=device)  # fmt: skip
    for number in batches:
        trainer.step(feed.batch(number), loaded.optimizer.lr)
    saved = {s.name: s.values for s in trainer.to_save()}
    return {n: local(v).detach().clone() for n, v in saved.items()}
