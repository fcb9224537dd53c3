"""Compiling and recomputing layers changes no numbers, and both do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bevatron.errors import BevatronError
from bevatron.parallel import compile_and_recompute
from bevatron.parallel.layout import Layout
from bevatron.spec import MLP, LayerSpec
from bevatron.train.trainer import Trainer
from tests.parallel.layouts import case
from tests.processes import Pool
from tests.specs import ALL, HETEROGENEOUS, HOMOGENEOUS
from tests.train_steps import Case, make_trainer, samples, train

# More than the eight artefacts that Dynamo keeps of one code object unless told otherwise: one for
# training and one for evaluation of each.
MANY = replace(HOMOGENEOUS, layers=tuple(LayerSpec(None, MLP(24 + i)) for i in range(5)))
# Cut KV heads, biases, an empty layer; few shapes, because each takes seconds to compile.
SHORT = replace(HETEROGENEOUS, layers=tuple(HETEROGENEOUS.layers[i] for i in (0, 3, 4)))


def make(case: Case, backend: str) -> Trainer:
    ALL.update(many=MANY, short=SHORT)
    torch._dynamo.reset()
    compile_and_recompute.BACKEND = backend
    return make_trainer(case)


def steps(case: Case, backend: str) -> tuple[list[float], int]:
    """Losses and gradient norms of two steps with a validation between, and how many graphs were
    compiled for it."""
    from torch._dynamo.utils import counters

    trainer = make(case, backend)
    counters.clear()
    out = [*trainer.step(samples(trainer, 0), 1e-2)]
    out.append(float(trainer.evaluate(samples(trainer, 1))[0][0]))
    out += trainer.step(samples(trainer, 1), 1e-2)
    assert not counters["graph_break"] and not counters["unimplemented"]
    return out, counters["stats"]["unique_graphs"]


def assert_compiled_equals_eager(
    pool: Pool, spec: str, layout: Layout, recompute: str, backend: str
) -> int:
    expected, none = pool.run(1, steps, Case(spec), backend)[0]
    assert none == 0
    compiled = replace(case(spec, layout), compile=True, recompute=recompute)
    ranks = pool.run(layout.world_size, steps, compiled, backend)
    for got, _ in ranks:
        assert got == pytest.approx(expected, rel=1e-5)
    return ranks[0][1]


def test_a_model_with_many_shapes_is_compiled_to_the_last_layer(pool: Pool) -> None:
    """Every shape once for training and once for evaluation."""
    graphs = assert_compiled_equals_eager(pool, "many", Layout(), "none", "aot_eager")
    assert graphs == 2 * len(set(MANY.layers))


def test_equal_layers_share_what_was_compiled(pool: Pool) -> None:
    assert assert_compiled_equals_eager(pool, "homogeneous", Layout(), "none", "aot_eager") == 2


@pytest.mark.slow
def test_compiled_and_recomputed_layers_equal_eager_ones(pool: Pool) -> None:
    """Compiled inside, recomputed outside, under tensor and data parallelism."""
    layout = Layout(tp=2, dp_shard=2)
    assert_compiled_equals_eager(pool, "short", layout, "full", "aot_eager")


COMPILED = [Layout(tp=2), Layout(dp_shard=2), Layout(pp=2), Layout(tp=2, dp_shard=2)]
COMPILED += [Layout(pp=2, tp=2, dp_shard=2, schedule="interleaved_1f1b")]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", COMPILED, ids=str)
def test_compiled_layers_equal_eager_ones(pool: Pool, layout: Layout, recompute: str) -> None:
    assert_compiled_equals_eager(pool, "heterogeneous", layout, recompute, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("layout", COMPILED, ids=str)
def test_inductors_layers_equal_eager_ones(pool: Pool, layout: Layout) -> None:
    assert_compiled_equals_eager(pool, "short", layout, "none", "inductor")


def beyond_the_limit(case: Case) -> str:
    trainer = make(case, "aot_eager")
    with torch._dynamo.config.patch(recompile_limit=3):
        try:
            trainer.step(samples(trainer, 0), 1e-2)
        except BevatronError as error:
            return str(error)
    return ""


def test_a_layer_that_is_not_compiled_stops_the_run(pool: Pool) -> None:
    said = pool.run(1, beyond_the_limit, Case("many", compile=True))[0]
    assert "train.compile: a layer could not be compiled" in said


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_nothing(pool: Pool, recompute: str) -> None:
    """Bit-equal in one process; at a layout as close as the layout itself."""
    expected = pool.run(1, train, Case("heterogeneous"))[0]
    assert pool.run(1, train, Case("heterogeneous", recompute=recompute))[0] == expected
    layout = Layout(pp=2, tp=2, schedule="interleaved_1f1b" if recompute == "selective" else "zbv")
    for a, b in zip(
        pool.run(4, train, replace(case("heterogeneous", layout), recompute=recompute))[0],
        expected,
        strict=True,
    ):
        assert a == pytest.approx(b, rel=1e-5)


def kept_bytes(case: Case) -> int:
    """Memory that is held between the forward and the backward."""
    from torch.profiler import profile

    trainer = make(case, "aot_eager_decomp_partition")
    ids, batch = trainer.objective.batch(samples(trainer, 0))
    trainer.placed.stage(ids, **batch).backward()  # gathers parameters, compiles
    with profile(profile_memory=True) as trace:
        loss = trainer.placed.stage(ids, **batch)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in trace.key_averages())


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_keeps_less(pool: Pool, compiled: bool) -> None:
    none, selective, full = (
        pool.run(1, kept_bytes, Case("homogeneous", recompute=recompute, compile=compiled))[0]
        for recompute in ("none", "selective", "full")
    )
    assert full < 0.6 * selective
    assert selective < 0.8 * none


def test_layers_that_are_frozen_in_part_or_whole_are_compiled_each(pool: Pool) -> None:
    """Equal layers that differ in what is frozen are not the same code."""
    freeze = ("embed.*", "layers.0.*", "layers.2.attention.*")
    case = Case("homogeneous", freeze=freeze)
    ((expected, _),) = pool.run(1, steps, case, "eager")
    ((found, graphs),) = pool.run(1, steps, replace(case, compile=True), "aot_eager")
    assert found == pytest.approx(expected, rel=1e-5) and graphs >= 4
