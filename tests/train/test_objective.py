"""The reported loss is the mean over tokens, and its gradients are F.cross_entropy's."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from bevatron.nn import vocabulary_loss
from bevatron.nn.rank_communication import LOCAL
from bevatron.nn.vocabulary_loss import IGNORE, cross_entropy_and_z, cross_entropy_sum
from bevatron.parallel.layout import Layout
from bevatron.parallel.tensor_parallel import TensorParallel
from bevatron.train.objectives import Pretrain
from tests.processes import Pool
from tests.train_steps import GLOBAL_BATCH, SEQ_LEN, Case, make_trainer, samples, train


def loss_and_logits_loss(case: Case) -> tuple[float, float | None]:
    """The first step's reported loss; in one process also that of the decoder's own logits."""
    trainer = make_trainer(case)
    batch = samples(trainer, 0)["tokens"]
    plain = None
    if case.layout.world_size == 1:
        decoder = trainer.placed.stage.decoder
        with torch.no_grad():
            stage = trainer.placed.stage
            stage.at_end = lambda comm, spec, kept: decoder.to_logits
            out = stage(batch[:, :-1], labels=batch[:, 1:])
            plain = float(F.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten()))
            stage.at_end = trainer.objective.compute
    return trainer.step({"tokens": batch}, 0.0)[0], plain


@pytest.mark.parametrize("spec", ["homogeneous", "nanochat"])
def test_the_loss_is_the_mean_over_tokens(pool: Pool, spec: str) -> None:
    reported, plain = pool.run(1, loss_and_logits_loss, Case(spec))[0]
    assert plain is not None
    assert reported == pytest.approx(plain, rel=1e-5)
    layout = Layout(tp=2, pp=2, dp_shard=2)
    for got, _ in pool.run(layout.world_size, loss_and_logits_loss, Case(spec, layout)):
        assert got == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 7 * 50, 10**9])
def test_chunked_cross_entropy_equals_the_plain_one(
    cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and both gradients in fp32, ignored labels among them; sums differ in order only."""
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(GLOBAL_BATCH, SEQ_LEN, 24, generator=generator, requires_grad=True)
    weight = torch.randn(50, 24, generator=generator, requires_grad=True)
    labels = torch.randint(50, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    labels[0, :5] = IGNORE
    got = cross_entropy_sum(x, weight, labels, LOCAL, cap, 50)
    got_grads = torch.autograd.grad(got / 3, (x, weight))
    logits = x @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for a, b in zip(got_grads, torch.autograd.grad(want / 3, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def evaluate_between_steps(case: Case) -> list[float]:
    """Validation before, between and after updates, and the losses of the updates."""
    trainer = make_trainer(case)
    out = [*trainer.evaluate(samples(trainer, 9))]
    for step in range(3):
        out += trainer.step(samples(trainer, step), 1e-2)
        out += trainer.evaluate(samples(trainer, 9))
    return [float(np.sum(x)) for x in out]


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1, 2**22])
def test_a_mean_in_bf16_is_the_sum_over_the_count(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1/count has no place in bf16 (1/3 is off by 0.2%), and must not be rounded to it."""
    monkeypatch.setattr(vocabulary_loss, "SCALED", elements)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 24, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 24, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(50, (4, 32), generator=generator)
    for count in (3, 12345.0):
        total, mean = (
            torch.autograd.grad(
                cross_entropy_sum(x, weight, labels, LOCAL, None, 50) * factor, (x, weight)
            )
            for factor in (torch.tensor(1.0), torch.tensor(1 / count))
        )
        for whole, part in zip(total, mean, strict=True):
            slope = float((whole.double() * part).sum() / whole.double().square().sum())
            # Each element is rounded by 2^-9 at most, up or down: over 1,200 of them 2^-9 / 60
            assert slope * count == pytest.approx(1, abs=1e-4)


def test_validation_is_the_same_at_every_layout_and_disturbs_nothing(pool: Pool) -> None:
    """It sees each update, and the updates do not see it."""
    expected = pool.run(1, evaluate_between_steps, Case("heterogeneous"))[0]
    trained = pool.run(1, train, Case("heterogeneous"))[0]
    assert [expected[i] for i in (2, 6, 10)] == [loss for loss, _ in trained[:3]]
    assert len({expected[i] for i in (0, 4, 8, 12)}) == 4
    for layout in (Layout(dp_shard=2), Layout(tp=2, pp=2, dp_shard=2), Layout(pp=4)):
        micro = 1 if layout.pp == 4 else 2
        case = Case("heterogeneous", layout, micro_batch=micro)
        for got in pool.run(layout.world_size, evaluate_between_steps, case):
            assert got == pytest.approx(expected, rel=1e-5)


def naive(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float | None, z: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the loss and of the z-loss, from all logits at once."""
    logits = x @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    squares = logits.logsumexp(-1).square()[labels != IGNORE]
    return loss, z * squares.sum()


def inputs(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(GLOBAL_BATCH, SEQ_LEN, 24, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 24, generator=generator, requires_grad=True)
    labels = torch.randint(vocabulary, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    labels[0, :5] = IGNORE
    return x, weight, labels


def z_loss_on_ranks(cap: float | None, chunk: int) -> tuple[float, float, float, float]:
    """Distances of loss and z-loss, relative, and of both gradients, relative to their norms."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", chunk)
    size = dist.get_world_size()
    comm = TensorParallel(init_device_mesh("cpu", (size,)), False) if size > 1 else LOCAL
    x, weight, labels = inputs(51)
    want, want_z = naive(x, weight, labels, cap, 1e-2)
    want_dx, want_dw = torch.autograd.grad((want + want_z) / 7, (x, weight))
    first, last = comm.bounds(51)
    part = weight[first:last].detach().requires_grad_()
    got, got_z = cross_entropy_and_z(x, part, labels, comm, cap, 51, 1e-2)
    dx, dw = torch.autograd.grad(got / 7, (x, part))
    if size > 1:
        dist.all_reduce(dx)
    monkeypatch.undo()
    return (
        float(got / (want + want_z)) - 1,
        float(got_z / want_z) - 1,
        float((dx - want_dx).norm() / want_dx.norm()),
        float((dw - want_dw[first:last]).norm() / want_dw.norm()),
    )


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("ranks", [1, 2])
def test_z_loss_equals_the_plain_one_over_shared_vocabularies(
    pool: Pool, ranks: int, cap: float | None
) -> None:
    for found in pool.run(ranks, z_loss_on_ranks, cap, 7 * 51):
        assert max(map(abs, found)) < 1e-5


def steps_with_z_loss(z_loss: float, layout: Layout) -> list[float]:
    """Loss, z-loss and gradient norm of two updates, and of a validation between them."""
    trainer = make_trainer(Case("nanochat", layout), Pretrain(z_loss))
    out = []
    for step in range(2):
        out += [*trainer.step(samples(trainer, step), 1e-2), *trainer.reported.values()]
        found = trainer.objective.report(*trainer.evaluate(samples(trainer, 9)))
        out += found.values()
    return [float(np.sum(x)) for x in out]


def test_z_loss_is_reported_apart_and_changes_the_gradient(pool: Pool) -> None:
    without = pool.run(1, steps_with_z_loss, 0.0, Layout())[0]
    one = pool.run(1, steps_with_z_loss, 0.1, Layout())[0]
    loss, norm, _, z_loss, *_ = one
    assert loss == pytest.approx(without[0], rel=1e-6), "the loss alone, as without"
    assert z_loss > 0.1
    assert norm != pytest.approx(without[1], rel=1e-3)
    layout = Layout(tp=2, pp=2)
    for got in pool.run(layout.world_size, steps_with_z_loss, 0.1, layout):
        assert got == pytest.approx(one, rel=1e-5)


class Peak(TorchDispatchMode):
    """The most bytes of tensors made under it that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_cross_entropy_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the z-loss: a few chunks of logits and the two gradients, while the plain one holds all
    logits several times over."""
    tokens, vocabulary, width = 1024, 4096, 16
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", 32 * vocabulary)
    x = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))
    with Peak() as ours:
        cross_entropy_and_z(x, weight, labels, LOCAL, 5.0, vocabulary, 1e-4)[0].backward()
    with Peak() as plain:
        sum(naive(x, weight, labels, 5.0, 1e-4)).backward()
    logits, chunk = 4 * tokens * vocabulary, 4 * 32 * vocabulary
    gradients = 4 * 2 * 2 * width * (tokens + vocabulary)
    assert plain.peak >= 2 * logits, "or this instrument sees nothing"
    assert ours.peak <= 6 * chunk + gradients < logits / 3
