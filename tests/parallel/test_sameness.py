"""What must be equal is compared: copies of a parameter between ranks, a step with its replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.checkpoint.rank_boxes import local
from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout
from bevatron.parallel.replica_check import check_replicas
from tests.processes import Pool
from tests.train_steps import Case, make_trainer, samples


def message(act: Callable[[], object]) -> str:
    try:
        act()
    except BevatronError as error:
        return str(error)
    return ""


def flip(tensor: Tensor) -> None:
    """The lowest bit of one number: a change that no loss would show."""
    tensor.view(-1)[:1].view(torch.int32)[0] ^= 1


def drifted(case: Case, name: str | None, rank: int) -> str:
    trainer = make_trainer(case)
    trainer.step(samples(trainer, 0), 1e-2)
    if name is not None and dist.get_rank() == rank:
        flip(local(trainer.placed.parameters[name].detach()))
    return message(lambda: check_replicas(trainer.placed))


@pytest.mark.parametrize(
    ("spec", "layout", "name", "rank", "others"),
    [
        ("homogeneous", Layout(dp_replicate=2, dp_shard=2), "layers.1.mlp.down.weight", 3, "1"),
        ("homogeneous", Layout(tp=2, dp_shard=2), "layers.2.mlp_norm.weight", 2, "3"),
        ("heterogeneous", Layout(pp=2, tp=2), "layers.6.mlp_norm.weight", 3, "2"),
    ],
    ids=str,
)
def test_a_flipped_bit_in_one_copy_names_parameter_and_ranks(
    pool: Pool, spec: str, layout: Layout, name: str, rank: int, others: str
) -> None:
    case = Case(spec, layout)
    said = pool.run(layout.world_size, drifted, case, name, rank)
    assert len(set(said)) == 1
    assert f"{name} (" in said[0]
    assert f"rank {rank}" in said[0] and f"rank {others}" in said[0], said[0]
    assert set(pool.run(layout.world_size, drifted, case, None, 0)) == {""}


def replayed(case: Case, rank: int | None) -> str:
    """A step that is computed twice; on `rank` a gradient has another bit in the first of them."""
    trainer = make_trainer(case)
    computed, compute = [0], trainer.runner.step

    def step(*args: object) -> Tensor:
        value: Tensor = compute(*args)  # type: ignore[arg-type]
        computed[0] += 1
        if computed[0] == 1 and dist.get_rank() == rank:
            grad = list(trainer.placed.parameters.values())[2].grad
            assert grad is not None
            flip(local(grad))
        return value

    trainer.runner.step = step  # type: ignore[method-assign, assignment]
    before = {n: local(p.detach()).clone() for n, p in trainer.placed.parameters.items()}
    said = message(lambda: trainer.step(samples(trainer, 0), 1e-2, replay=True))
    assert computed[0] == 2
    same = all(torch.equal(local(p), before[n]) for n, p in trainer.placed.parameters.items())
    assert same == (rank is not None), "an update, unless the replay differed"
    return said


def test_a_bit_that_flips_in_a_gradient_is_caught_by_the_replay(pool: Pool) -> None:
    case = Case("heterogeneous", Layout(tp=2, pp=2, dp_shard=2), precision="bf16")
    said = pool.run(8, replayed, case, 5)
    assert len(set(said)) == 1
    assert "rank 5: " in said[0] and ".weight" in said[0] and said[0].count("rank") == 1
    assert set(pool.run(8, replayed, case, None)) == {""}
