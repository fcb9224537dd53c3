"""Context parallel changes nothing but speed and memory."""

from __future__ import annotations

import pytest

from bevatron.parallel.layout import Layout
from tests.processes import Pool
from tests.train_steps import Case, train

LAYOUTS = {
    "cp2": Layout(cp=2),
    "cp4": Layout(cp=4),
    "cp2-tp2": Layout(cp=2, tp=2, sequence_parallel=False),
    "cp2-tp2-sp": Layout(cp=2, tp=2),
    "cp2-fsdp2": Layout(cp=2, dp_shard=2),
    "cp2-dp2": Layout(cp=2, dp_replicate=2),
    "cp2-pp2": Layout(cp=2, pp=2),
    "cp2-tp2-pp2": Layout(cp=2, tp=2, pp=2),
    "cp2-hsdp2x2": Layout(cp=2, dp_replicate=2, dp_shard=2),
}
_reference: dict[Case, list[tuple[float, float]]] = {}


def reference(pool: Pool, case: Case) -> list[tuple[float, float]]:
    if case not in _reference:
        _reference[case] = pool.run(1, train, case)[0]
    return _reference[case]


def check(pool: Pool, spec: str, layout: Layout, documents: bool) -> None:
    """Five AdamW steps in fp32, relative 1e-5: only the order of sums may differ."""
    expected = reference(pool, Case(spec, documents=documents))
    ranks = pool.run(layout.world_size, train, Case(spec, layout, documents=documents))
    assert all(r == ranks[0] for r in ranks), "ranks report different numbers"
    for step, (got, want) in enumerate(zip(ranks[0], expected, strict=True)):
        assert got == pytest.approx(want, rel=1e-5), f"step {step}"


@pytest.mark.parametrize(
    ("spec", "name", "documents"),
    [
        ("homogeneous", "cp4", False),
        ("heterogeneous", "cp2-tp2-sp", True),
    ],
)
def test_loss_and_gradient_norm_equal_one_process(
    pool: Pool, spec: str, name: str, documents: bool
) -> None:
    check(pool, spec, LAYOUTS[name], documents)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("spec", ["homogeneous", "heterogeneous", "nanochat", "nemotron"])
def test_every_spec_at_every_layout(pool: Pool, spec: str, name: str, documents: bool) -> None:
    check(pool, spec, LAYOUTS[name], documents)
