"""Products of packed weights are those of the weights themselves, whatever their size."""

from __future__ import annotations

import pytest
import torch

from bevatron.generate import matrix_product as module
from bevatron.generate.matrix_product import Halves, Plain, halves_factor, matrix


@pytest.fixture(autouse=True)
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without products of bf16."""
    if not module.packs_halves():
        pytest.skip("needs FBGEMM")
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)


def wrong(weight: torch.Tensor) -> float:
    """The largest error of a row's results, relative to their size; vectors are fp32."""
    x = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(1))
    made = matrix(weight, batches=True)
    exact = x.double() @ weight.double().T
    return float(((made(x) - exact).norm(dim=0) / exact.norm(dim=0)).max())


def values(std: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(64, 48, generator=generator, dtype=torch.float64) * std).to(dtype)


@pytest.mark.parametrize("std", [1e-30, 1e-8, 1e-6, 1e-4, 0.02, 1.0, 1e3, 1e6])
def test_weights_of_any_size_keep_their_values(std: float) -> None:
    """Packed without a factor, 2% of 1e-6 was lost and 99% of 1e-8."""
    weight = values(std)
    assert isinstance(matrix(weight, batches=True), Halves)
    assert wrong(weight) < 2e-5  # LOST, and the sums in fp32


def test_an_outlier_does_not_cost_the_other_rows_theirs() -> None:
    weight = values(1e-6)
    weight[3, 5] = 10.0
    assert isinstance(matrix(weight, batches=True), Halves)
    assert wrong(weight) < 2e-5


def test_rows_too_far_apart_for_halves_are_not_packed() -> None:
    weight = values(1.0)
    weight[7] *= 1e-12
    assert isinstance(matrix(weight, batches=True), Plain)
    weight[7] = 0
    assert isinstance(matrix(weight, batches=True), Halves)


def test_usual_weights_are_packed_as_they_are() -> None:
    """So decoding them takes nothing more."""
    assert halves_factor(values(0.02).float()) == 1
    assert halves_factor(values(1e-3).float()) == 1
    assert halves_factor(values(1e-6, torch.float16).float()) == 1
    assert halves_factor(values(1e-6).float()) == 2.0**33
    assert halves_factor(torch.tensor([[1.0, float("inf")]])) is None
    assert halves_factor(torch.zeros(2, 2)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wide", [False, True])
def test_other_values_give_what_a_new_product_of_them_gives(dtype: torch.dtype, wide: bool) -> None:
    """fp32 ones in the memory of the old ones, whatever was prepared of those."""
    old, new = values(0.02, dtype), values(0.3, dtype).flip(0)
    if wide:
        old, new = old.T.contiguous(), new.T.contiguous()
    made = matrix(old.clone(), batches=True)
    filled = matrix(new, batches=True, old=made)
    assert (filled is made) == (dtype == torch.float32)
    for count in (1, 5, 40):
        x = torch.randn(count, new.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        assert torch.equal(filled(x), matrix(new, batches=True)(x))
