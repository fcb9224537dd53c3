"""Per-token log-probabilities are torch's log_softmax at the label, and so are their gradients,
whatever gradient each token gets and however ranks share the vocabulary and the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bevatron.nn import vocabulary_loss
from bevatron.nn.rank_communication import LOCAL, Comm, Context
from bevatron.nn.vocabulary_loss import (
    IGNORE,
    cross_entropy_sum,
    log_probabilities,
    log_probabilities_and_entropies,
)
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.parallel.tensor_parallel import TensorParallel
from tests.processes import Pool
from tests.train.test_objective import Peak

ROWS, B, T, H = 51, 3, 8, 12
FAR = {torch.float64: 1e-12, torch.float32: 1e-5}  # of sums in another order, relative to norms


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float64
    cap: float | None = None
    chunk: int = 7 * ROWS
    tp: int = 1
    cp: int = 1
    temperature: float = 1.0


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, T, H], weight [ROWS, H], labels [B, T] with some ignored, and what each token's
    log-probability is multiplied by: of both signs, and one of none."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, H, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(ROWS, H, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(ROWS, (B, T), generator=g)
    labels[0, :3] = IGNORE
    factors = torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype)
    factors[1, 2] = 0
    return x.requires_grad_(), weight.requires_grad_(), labels, factors


def plain(
    x: Tensor, weight: Tensor, labels: Tensor, cap: float | None, temperature: float = 1.0
) -> Tensor:
    kept = labels != IGNORE
    chosen = torch.where(kept, labels, 0)[..., None]
    return distribution(x, weight, cap, temperature).gather(-1, chosen)[..., 0] * kept


def distribution(x: Tensor, weight: Tensor, cap: float | None, temperature: float) -> Tensor:
    logits = x @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return (logits / temperature).log_softmax(-1)


def loss_of(found: Tensor, factors: Tensor, context: Context) -> Tensor:
    """Something of each token's own, and something of each whole sequence: a logarithm of a sigmoid
    of its sum, as preference losses have it. Of the latter a rank gives its share."""
    sequence = context.sum(found.sum(1))  # [B]
    shared = torch.nn.functional.logsigmoid(0.1 * sequence).sum() / context.size
    return (found * factors + 0.1 * found.square() * factors).sum() + shared


def distances(case: Case) -> list[float]:
    """From torch's own: of the values, both gradients, the entropies, and the loss."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", case.chunk)
    x, weight, labels, factors = inputs(case.dtype)
    want = plain(x, weight, labels, case.cap, case.temperature)
    each = distribution(x, weight, case.cap, case.temperature).detach()
    want_entropies = -(each.exp() * each).sum(-1)
    want_loss = loss_of(want, factors, Context())
    want_dx, want_dw = torch.autograd.grad(want_loss, (x, weight))

    comm: Comm = LOCAL
    mesh = init_device_mesh("cpu", (case.cp, case.tp), mesh_dim_names=("cp", "tp"))
    if case.tp > 1:
        comm = TensorParallel(mesh["tp"], False)
    context = ContextParallel(mesh["cp"]) if case.cp > 1 else Context()
    at = torch.cat([torch.arange(*run) for run in context.runs(T // case.cp)])
    first, last = comm.bounds(ROWS)
    mine, part = (v.detach().requires_grad_() for v in (x[:, at], weight[first:last]))
    arguments = (mine, part, labels[:, at], comm, case.cap, ROWS, case.temperature)
    got, entropies = log_probabilities_and_entropies(*arguments)
    assert got.dtype == entropies.dtype == case.dtype and not entropies.requires_grad
    assert torch.equal(got, log_probabilities(*arguments))
    loss = loss_of(got, factors[:, at], context)
    dx, dw = torch.autograd.grad(loss, (mine, part))
    if case.tp > 1:  # a rank has a partial sum, as what is entered wants it
        dist.all_reduce(dx, group=mesh["tp"].get_group())
    dw = context.sum(dw)
    monkeypatch.undo()

    def far(a: Tensor, b: Tensor) -> float:
        return float((a.detach() - b.detach()).norm() / b.detach().norm())

    own = [far(got, want[:, at]), far(dx, want_dx[:, at]), far(dw, want_dw[first:last])]
    own.append(far(entropies, want_entropies[:, at]))
    return [*own, far(context.sum(loss.detach()), want_loss)]


CASES = [
    Case(),
    Case(cap=5.0),
    Case(torch.float32, chunk=1),
    Case(torch.float32, cap=5.0, chunk=10**9),
    Case(cap=5.0, temperature=0.7),
    Case(tp=2, cap=5.0),
    Case(tp=2, temperature=1.7),
    Case(cp=2),
    Case(torch.float32, tp=2, cp=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_log_softmax(pool: Pool, case: Case) -> None:
    for found in pool.run(case.tp * case.cp, distances, case):
        assert max(found) < FAR[case.dtype]


def test_their_sum_is_the_cross_entropy() -> None:
    """Bit for bit in the values; gradients are computed in two ways."""
    x, weight, labels, _ = inputs(torch.float32)
    each = log_probabilities(x, weight, labels, LOCAL, 5.0, ROWS)
    total = cross_entropy_sum(x, weight, labels, LOCAL, 5.0, ROWS)
    assert torch.equal(-each.flatten().sum(), total)
    ours, theirs = (torch.autograd.grad(v, (x, weight)) for v in (-each.sum(), total))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_in_bf16_a_small_gradient_is_not_rounded_away() -> None:
    """1/12345 of each token, which no bf16 is: the gradient as a whole is that of the sum."""
    x, weight, labels, _ = (v.detach() for v in inputs(torch.bfloat16))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    found = log_probabilities(x, weight, labels, LOCAL, None, ROWS)
    assert found.dtype == torch.float32
    total, mean = (
        torch.autograd.grad(found.sum() * f, (x, weight), retain_graph=True)
        for f in (torch.tensor(1.0), torch.tensor(1 / 12345))
    )
    for whole, part in zip(total, mean, strict=True):
        slope = float((whole.double() * part).sum() / whole.double().square().sum())
        assert slope * 12345 == pytest.approx(1, abs=1e-3)


def test_no_forward_or_backward_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, width = 1024, 4096, 16
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", 32 * vocabulary)
    x = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))
    with Peak() as ours:
        found = log_probabilities(x, weight, labels, LOCAL, 5.0, vocabulary)
        found.square().sum().backward()
    with Peak() as theirs:
        plain(x, weight, labels, 5.0).square().sum().backward()
    logits, chunk = 4 * tokens * vocabulary, 4 * 32 * vocabulary
    gradients = 4 * 2 * 2 * width * (tokens + vocabulary)
    assert theirs.peak >= 2 * logits, "or this instrument sees nothing"
    assert ours.peak <= 6 * chunk + gradients < logits / 3
