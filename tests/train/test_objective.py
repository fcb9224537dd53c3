"""The reported loss is the mean over tokens, and its gradients are F.cross_entropy's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bevatron.nn.comm import LOCAL
from bevatron.parallel.layout import Layout
from bevatron.train import cross_entropy
from bevatron.train.cross_entropy import IGNORE, cross_entropy_sum
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
            stage.make_compute = lambda comm, spec, kept: decoder.to_logits
            out = stage(batch[:, :-1], labels=batch[:, 1:])
            plain = float(F.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten()))
            stage.make_compute = trainer.objective.compute
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
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
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
    out = [trainer.evaluate(samples(trainer, 9))]
    for step in range(3):
        out.append(trainer.step(samples(trainer, step), 1e-2))
        out.append(trainer.evaluate(samples(trainer, 9)))
    return [x for pair in out for x in pair]


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
