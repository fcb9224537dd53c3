"""The layout changes nothing but speed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bevatron.parallel.layout import Layout
from tests.parallel.layouts import FEW, Piece, case, pairs, train_and_collect, whole
from tests.processes import Pool
from tests.train_steps import Case, make_trainer, samples

Outcome = tuple[list[tuple[float, float]], dict[str, Tensor]]
_reference: dict[str, Outcome] = {}

# The moments' difference from one process, relative to the parameter's own, in the L2 norm. Adam
# divides gradients by their size, so rounding that moves tiny ones moves weights, and those later
# gradients: after five steps the worst of all layouts was 6e-5.
STATE_TOLERANCE = 1e-3


def outcome(results: list[tuple[list[tuple[float, float]], list[Piece]]]) -> Outcome:
    steps = [r[0] for r in results]
    assert all(s == steps[0] for s in steps), "ranks report different numbers"
    return steps[0], whole(r[1] for r in results)


def reference(pool: Pool, spec: str) -> Outcome:
    if spec not in _reference:
        _reference[spec] = outcome(pool.run(1, train_and_collect, Case(spec)))
    return _reference[spec]


def assert_equals_one_process(pool: Pool, spec: str, layout: Layout) -> None:
    """fp32, five AdamW steps: loss and gradient norm to relative 1e-5 (only the order of sums
    differs), and the optimizer's state tensor by tensor."""
    steps, state = reference(pool, spec)
    got, got_state = outcome(pool.run(layout.world_size, train_and_collect, case(spec, layout)))
    for step, (a, b) in enumerate(zip(got, steps, strict=True)):
        assert a == pytest.approx(b, rel=1e-5), f"step {step}"
    assert got_state.keys() == state.keys()
    worst = max(_difference(got_state[name], state[name]) for name in state)
    print(f"state differs by {worst:.1e}")
    assert worst < STATE_TOLERANCE


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("spec", "layout"), FEW, ids=str)
def test_training_equals_one_process(pool: Pool, spec: str, layout: Layout) -> None:
    assert_equals_one_process(pool, spec, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "layout"), pairs(), ids=str)
def test_training_equals_one_process_at_every_layout(pool: Pool, spec: str, layout: Layout) -> None:
    assert_equals_one_process(pool, spec, layout)


def test_micro_batches_change_nothing(pool: Pool) -> None:
    expected, _ = reference(pool, "heterogeneous")
    for micro_batch in (1, 8):
        many = Case("heterogeneous", micro_batch=micro_batch)
        got = pool.run(1, train_and_collect, many)[0][0]
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_bf16_stays_near_fp32_at_every_layout(pool: Pool) -> None:
    """bf16 has 8 bits of mantissa: losses within 2%, at one process and in three dimensions."""
    expected, _ = reference(pool, "heterogeneous")
    for layout in (Layout(), Layout(tp=2, pp=2, dp_shard=2, schedule="zbv")):
        rounded = Case("heterogeneous", layout, precision="bf16", micro_batch=1)
        got = pool.run(layout.world_size, train_and_collect, rounded)[0][0]
        for a, b in zip(got, expected, strict=True):
            assert a[0] == pytest.approx(b[0], rel=2e-2)


def evaluate_between_steps(case: Case) -> list[float]:
    """Sums of the objective over a batch before and after an update."""
    trainer, out = make_trainer(case), []
    for step in range(2):
        out.append(float(trainer.evaluate(samples(trainer, 9))[0][0]))
        trainer.step(samples(trainer, step), 1e-2)
        out.append(float(trainer.evaluate(samples(trainer, 9))[0][0]))
    return out


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, shard="gradients"),
        Layout(pp=2, dp_shard=2, schedule="interleaved_1f1b"),
        Layout(pp=2, tp=2, schedule="zbv"),
    ],
    ids=str,
)
def test_validation_between_steps_equals_one_process(pool: Pool, layout: Layout) -> None:
    """Over several stages per rank too, with a tied embedding, and without stale parameters."""
    expected = pool.run(1, evaluate_between_steps, Case("heterogeneous"))[0]
    for got in pool.run(layout.world_size, evaluate_between_steps, case("heterogeneous", layout)):
        assert got == pytest.approx(expected, rel=1e-5)


def lost_gradient(case: Case) -> str:
    """What a step says after a parameter was left out of the backward."""
    from bevatron.errors import BevatronError

    trainer = make_trainer(case)
    layers = trainer.placed.stage.decoder.layers
    first = layers[min(layers, key=int)]
    first.run = lambda x, rotations, mask: x
    try:
        trainer.step(samples(trainer, 0), 1e-2)
    except BevatronError as error:
        return str(error)
    return ""


def test_a_parameter_without_a_gradient_stops_the_step(pool: Pool) -> None:
    assert "no gradient arrived at layers.0." in pool.run(1, lost_gradient, Case("homogeneous"))[0]


def test_tensors_of_the_comparison_are_whole(pool: Pool) -> None:
    _, state = reference(pool, "heterogeneous")
    assert "optimizer/exp_avg/embed.weight" in state
    assert not any(tensor.isnan().any() for tensor in state.values())
    assert not any(torch.count_nonzero(tensor) == 0 for tensor in state.values())
