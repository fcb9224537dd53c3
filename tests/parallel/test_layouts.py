"""The layout changes nothing but speed."""

from __future__ import annotations

import pytest

from bevatron.parallel.layout import Layout
from tests.processes import Pool
from tests.train_steps import Case, train

LAYOUTS = {
    "tp2": Layout(tp=2, sequence_parallel=False),
    "tp2-sp": Layout(tp=2),
    "pp2": Layout(pp=2),
    "fsdp2": Layout(dp_shard=2),
    "hsdp2x2": Layout(dp_replicate=2, dp_shard=2),
    "tp2-pp2": Layout(tp=2, pp=2),
    "tp2-fsdp2": Layout(tp=2, dp_shard=2),
    "pp2-fsdp2": Layout(pp=2, dp_shard=2),
    "tp2-pp2-fsdp2": Layout(tp=2, pp=2, dp_shard=2),
}
_reference: dict[Case, list[tuple[float, float]]] = {}


def reference(pool: Pool, case: Case) -> list[tuple[float, float]]:
    if case not in _reference:
        _reference[case] = pool.run(1, train, case)[0]
    return _reference[case]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("spec", ["homogeneous", "heterogeneous"])
def test_loss_and_gradient_norm_equal_one_process(pool: Pool, spec: str, name: str) -> None:
    """fp32, five AdamW steps, relative 1e-5: only the order of sums may differ."""
    layout = LAYOUTS[name]
    expected = reference(pool, Case(spec))
    ranks = pool.run(layout.world_size, train, Case(spec, layout))
    assert all(r == ranks[0] for r in ranks), "ranks report different numbers"
    for step, (got, want) in enumerate(zip(ranks[0], expected, strict=True)):
        assert got == pytest.approx(want, rel=1e-5), f"step {step}"


@pytest.mark.parametrize("spec", ["nanochat", "nemotron"])
def test_every_family_at_three_dimensions(pool: Pool, spec: str) -> None:
    layout = Layout(tp=2, pp=2, dp_shard=2)
    ranks = pool.run(layout.world_size, train, Case(spec, layout))
    for got, want in zip(ranks[0], reference(pool, Case(spec)), strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_recomputing_activations_changes_nothing(pool: Pool) -> None:
    """Bit-equal in one process; at a layout as close as the layout itself."""
    expected = reference(pool, Case("heterogeneous"))
    assert pool.run(1, train, Case("heterogeneous", recompute="full"))[0] == expected
    layout = Layout(tp=2, dp_shard=2)
    got = pool.run(4, train, Case("heterogeneous", layout, recompute="full"))[0]
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_micro_batches_change_nothing(pool: Pool) -> None:
    expected = reference(pool, Case("heterogeneous"))
    for micro_batch in (1, 8):
        got = pool.run(1, train, Case("heterogeneous", micro_batch=micro_batch))[0]
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_bf16_stays_near_fp32_at_every_layout(pool: Pool) -> None:
    """bf16 has 8 bits of mantissa: losses within 2%, at one process and in three dimensions."""
    expected = reference(pool, Case("heterogeneous"))
    for layout in (Layout(), Layout(tp=2, pp=2, dp_shard=2)):
        case = Case("heterogeneous", layout, precision="bf16")
        got = pool.run(layout.world_size, train, case)[0]
        for a, b in zip(got, expected, strict=True):
            assert a[0] == pytest.approx(b[0], rel=2e-2)
