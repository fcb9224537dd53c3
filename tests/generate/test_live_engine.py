"""The engine inside a run answers as the checkpoint of that moment would, at any two layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from bevatron.checkpoint.manifest import FILE_NAME
from bevatron.checkpoint.rank_tables import merge_tables
from bevatron.checkpoint.save_and_load import write_rank
from bevatron.errors import BevatronError
from bevatron.generate.engine import Engine
from bevatron.generate.live_engine import LiveEngine, engine_bytes
from bevatron.generate.request import Generation, Loglikelihood, Request
from bevatron.parallel import box_exchange
from bevatron.parallel.layout import Layout
from bevatron.spec.json import to_json
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.train_steps import Case, make_trainer, samples

Found = tuple[list[Generation], list[Loglikelihood]]
PROMPTS = [[7, 3, 50], [1], list(range(5, 40)), [90, 2, 2, 8], [60, 61]]
# One at a time: then what else is asked does not change a bit.
REQUESTS = [Request(tuple(p), 6, logprobs=2) for p in PROMPTS]


@dataclass(frozen=True)
class At:
    """A layout of the engine."""

    tp: int = 1
    pp: int = 1
    replicas: int | None = None


CASES = {
    "pipeline": Case("heterogeneous", Layout(tp=2, pp=2), precision="bf16"),
    "sharded": Case("nanochat", Layout(dp_shard=2)),
}
ENGINES = {
    "pipeline": [At(), At(tp=2), At(pp=2, replicas=1), At(replicas=3), At(tp=2, pp=2)],
    "sharded": [At(tp=2), At()],
}


def save(trainer: Trainer, folder: Path) -> None:
    """What the run would save now, as a native checkpoint of weights alone."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    weights = [tensor for tensor in trainer.to_save() if tensor.name.startswith("model/")]
    write_rank(folder, weights, dist.get_rank())
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "spec.json").write_text(to_json(trainer.spec))
        manifest = merge_tables(folder, dist.get_world_size(), "llama", 0).to_json()
        (folder / FILE_NAME).write_text(manifest)


def ask(engine: Engine | LiveEngine) -> Found:
    return engine.complete(REQUESTS), engine.loglikelihoods(PROMPTS)


# Several rounds, and some of a single parameter. Other tests use this process too: not for good.
@patch.object(box_exchange, "ROUND", 3000)
def rollouts(case: Case, engines: list[At], folder: Path) -> tuple[list[float], list[list[Found]]]:
    """The losses of two steps, and each engine's answers before, between and after them."""
    trainer = make_trainer(case)
    live = [
        LiveEngine(
            trainer.placed,
            tp=at.tp,
            pp=at.pp,
            replicas=at.replicas,
            max_batch=1,
            max_tokens=256,
        )
        for at in engines
    ]
    losses, answers = [], []
    for number in range(3):
        save(trainer, folder / f"{number}")
        for engine in live:
            engine.refresh()
        answers.append([ask(engine) for engine in live])
        if number < 2:
            found = trainer.step(samples(trainer, number), 1e-2)
            assert found is not None
            losses.append(found[0])
    for engine in live:
        engine.close()
    return losses, answers


def alone(case: Case) -> list[float]:
    trainer = make_trainer(case)
    found = [trainer.step(samples(trainer, number), 1e-2) for number in range(2)]
    return [step[0] for step in found if step is not None]


@pytest.mark.parametrize("name", list(CASES))
def test_the_engine_in_a_run_answers_as_its_checkpoint_would(
    name: str, pool: Pool, tmp_path: Path
) -> None:
    case, engines = CASES[name], ENGINES[name]
    ranks = case.layout.world_size
    first, *others = pool.run(ranks, rollouts, case, engines, tmp_path)
    assert all(other == first for other in others), "all ranks have all answers"
    losses, answers = first
    assert pool.run(ranks, alone, case)[0] == losses, "training goes on as if nothing had been"
    assert answers[0] != answers[1] != answers[2], "answers follow the weights"
    for number, found in enumerate(answers):
        with Engine.open(tmp_path / f"{number}", max_batch=1, max_tokens=256) as engine:
            expected = ask(engine)
        for at, ours in zip(engines, found, strict=True):
            assert at.tp > 1 or ours == expected, (at, number)
    with Engine.open(tmp_path / "2", tp=2, max_batch=1, max_tokens=256) as engine:
        expected = ask(engine)  # whose sums are rounded otherwise
    for at, ours in zip(engines, answers[2], strict=True):
        assert at.tp == 1 or ours == expected, at


def said(act: object) -> str:
    try:
        act()  # type: ignore[operator]
    except BevatronError as error:
        return str(error)
    return "nothing"


FAULTS = [(At(tp=2), 1), (At(tp=2), 0), (At(tp=2, pp=2), 2)]  # and the rank that has it


def failing(case: Case) -> list[str]:
    """What each of four ranks hears of failures at one of them."""
    trainer, heard, rank = make_trainer(case), [], dist.get_rank()

    def engine(at: At) -> LiveEngine:
        return LiveEngine(trainer.placed, tp=at.tp, pp=at.pp, replicas=at.replicas)

    def act(one: Engine, replica: int) -> list[Generation]:
        stream = one.submit(REQUESTS[0])
        if replica == 1:
            raise ValueError("no reward for that")
        return [stream.result()]

    def broken(*args: object) -> None:
        raise RuntimeError(f"a fault of rank {rank}")

    with engine(At(tp=2)) as live:
        heard.append(said(lambda: live.run(act)))
        assert len(live.complete(REQUESTS)) == len(REQUESTS), "it goes on after that"
        if rank == 3:
            live._reader.read = broken  # type: ignore[union-attr, assignment]
        heard.append(said(live.refresh))
    for at, where in FAULTS:
        with engine(at) as live:
            if rank == where:
                live._model.run = broken  # type: ignore[union-attr, assignment, method-assign]
            heard += [said(lambda it=live: it.complete(REQUESTS)), said(live.refresh)]
    heard.append(said(lambda: engine(At(replicas=5))))
    heard.append(said(lambda: engine(At(tp=2, pp=4))))
    assert trainer.step(samples(trainer, 0), 1e-2) is not None
    return heard


def test_a_failure_on_one_rank_is_told_by_all_and_training_can_go_on(pool: Pool) -> None:
    heard = pool.run(4, failing, CASES["pipeline"])
    assert all(other == heard[0] for other in heard)
    act, refresh, *steps, layout, team = heard[0]
    assert "the engine's tp 2 x pp 4 needs 8 processes, the run has 4" in team
    assert "unexpected ValueError" in act and "no reward for that" in act
    assert "a fault of rank 3" in refresh
    for (_, rank), step, after in zip(FAULTS, steps[::2], steps[1::2], strict=True):
        assert f"a fault of rank {rank}" in step
        assert after == "the engine failed; make another one"
    assert "5 replicas of tp 1 x pp 1, the run has 4 processes; use from 1 to 4" in layout


def held(case: Case, at: At) -> tuple[int, int, int, int]:
    """What a rank's engine holds, weights and cache per position, and what was said before."""
    trainer = make_trainer(case)
    with LiveEngine(trainer.placed, tp=at.tp, pp=at.pp) as engine:
        assert engine._model is not None
        seen = {id(t): t.numel() * t.element_size() for t in tensors(engine._model.weights)}
        rank, dtype = dist.get_rank() % (at.tp * at.pp), trainer.placed.dtype
        said = engine_bytes(trainer.spec, at.tp, at.pp, rank, 10, dtype)
        return sum(seen.values()), engine._model.cache.bytes_per_position * 10, *said


def tensors(value: object) -> list[torch.Tensor]:
    """All in a dataclass of lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for inner in value.values() for t in tensors(inner)]
    if isinstance(value, list | tuple):
        return [t for inner in value for t in tensors(inner)]
    return tensors(vars(value)) if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("at", [At(), At(tp=2, pp=2)], ids=str)
def test_what_an_engine_takes_is_known_before(pool: Pool, at: At) -> None:
    for weights, cache, said, said_cache in pool.run(4, held, CASES["pipeline"], at):
        assert cache == said_cache
        assert said == pytest.approx(weights, rel=0.05), "but for vectors made of others"


def crossing(case: Case) -> bool:
    """Whether any weight travels to an engine at the trainer's own layout."""
    with LiveEngine(make_trainer(case).placed, tp=2) as engine:
        return any(turn.crosses for turn in engine._exchange.rounds)


def test_a_rank_asks_nobody_for_what_it_holds(pool: Pool) -> None:
    assert pool.run(2, crossing, Case("homogeneous", Layout(tp=2))) == [False, False]
