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
