"""The loss of distillation is what its formulas say, however the vocabulary and the tokens are
cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bevatron.compress.logit_divergence import Divergence, Output, distillation_sums
from bevatron.nn import vocabulary_loss
from bevatron.nn.rank_communication import LOCAL, Comm
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.parallel.tensor_parallel import TensorParallel
from tests.processes import Pool
from tests.train.test_objective import Peak

ROWS = 53
KINDS = ["forward_kl", "reverse_kl", "jsd"]
CASES = [Divergence(kind, 1.0) for kind in KINDS]  # type: ignore[arg-type]
CASES += [Divergence(kind, 2.5, ce=0.3) for kind in KINDS]  # type: ignore[arg-type]
CASES += [Divergence(kind, 0.7, top_k=5, ce=0.3) for kind in KINDS]  # type: ignore[arg-type]
CASES += [Divergence(top_k=40)]
CASES += [Divergence("jsd", 1.3, top_k, 0.1, share) for top_k in (None, 6) for share in (0.1, 0.9)]


def models(dtype: torch.dtype = torch.float32) -> tuple[Output, Output, Tensor]:
    """A student and a teacher of another width, and labels of which some are ignored."""
    g = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    student = Output(tensor(2, 7, 8).requires_grad_(), tensor(ROWS, 8).requires_grad_())
    teacher = Output(tensor(2, 7, 12), tensor(ROWS, 12), 9.0)
    labels = torch.randint(ROWS, (2, 7), generator=g)
    labels[1, 2:4] = IGNORE
    return student, teacher, labels


def probabilities(output: Output, temperature: float) -> Tensor:
    logits = output.hidden @ output.weight.T
    logits = logits if output.cap is None else output.cap * torch.tanh(logits / output.cap)
    return torch.softmax(logits / temperature, -1).flatten(0, 1)


def naive(student: Output, teacher: Output, labels: Tensor, options: Divergence) -> Tensor:
    """The three sums from all probabilities at once, as the definitions are written."""
    p, q = (probabilities(x, options.temperature) for x in (teacher, student))
    if options.top_k is not None:
        best = p.topk(options.top_k, -1).indices
        p, q = (torch.cat((x.gather(1, best), 1 - x.gather(1, best).sum(-1, True)), 1)
                for x in (p, q))  # fmt: skip

    share = options.mixture
    mean = share * p + (1 - share) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    found = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: share * kl(p, mean) + (1 - share) * kl(q, mean),
    }[options.kind]()
    divergence = found[labels.flatten() != IGNORE].sum()
    chosen = probabilities(student, 1.0).log()
    ce = F.nll_loss(chosen, labels.flatten(), reduction="sum")
    return torch.stack((options.temperature**2 * divergence + options.ce * ce, divergence, ce))


def in_fp64(options: Divergence, cap: float | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    student, teacher, labels = models(torch.float64)
    student = replace(student, cap=cap)
    sums = naive(student, teacher, labels, options)
    return sums.detach(), torch.autograd.grad(sums[0] / 3, (student.hidden, student.weight))


def compared(comm: Comm, options: Divergence, cap: float | None) -> tuple[float, float, float]:
    """Distances to fp64: of the sums, and of both gradients, relative to their norms."""
    student, teacher, labels = models()
    first, last = comm.bounds(ROWS)
    part = student.weight[first:last].detach().requires_grad_()
    student = Output(student.hidden, part, cap)
    teacher = replace(teacher, weight=teacher.weight[first:last])
    sums = distillation_sums(student, teacher, labels, comm, ROWS, options)
    dx, dw = torch.autograd.grad(sums[0] / 3, (student.hidden, part))
    with torch.no_grad():
        alone = distillation_sums(student, teacher, labels, comm, ROWS, options)
    assert torch.equal(alone, sums), "a validation has the same sums"
    if comm.size > 1:
        dist.all_reduce(dx)
    want, (want_dx, want_dw) = in_fp64(options, cap)
    return (
        float((sums.detach() / want - 1).abs().max()),
        float((dx - want_dx).norm() / want_dx.norm()),
        float((dw - want_dw[first:last]).norm() / want_dw[first:last].norm()),
    )


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 1000])
def test_chunked_equals_the_definition_in_fp64(
    tokens: int, options: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", 2 * tokens * ROWS)
    for cap in (None, 6.0):
        value, dx, dw = compared(LOCAL, options, cap)
        assert value < 1e-6 and max(dx, dw) < 2e-6, (value, dx, dw)


def compared_on_ranks(options: list[Divergence]) -> list[tuple[float, float, float]]:
    comm = TensorParallel(init_device_mesh("cpu", (dist.get_world_size(),)), False)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", 2 * 4 * ROWS)
    try:
        return [compared(comm, one, 6.0) for one in options]
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_vocabulary_shared_by_ranks_changes_nothing(pool: Pool, ranks: int) -> None:
    """Unevenly; the top 40 are more than a rank of three has."""
    for found in pool.run(ranks, compared_on_ranks, CASES):
        for options, distances in zip(CASES, found, strict=True):
            assert max(distances) < 3e-6, (options, distances)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(
    kind: str, top_k: int | None
) -> None:
    student, _, labels = models()
    teacher = Output(student.hidden.detach(), student.weight.detach())
    options = Divergence(kind, 2.0, top_k)  # type: ignore[arg-type]
    sums = distillation_sums(student, teacher, labels, LOCAL, ROWS, options)
    grads = torch.autograd.grad(sums[0], (student.hidden, student.weight))
    zero = 0.0 if kind != "jsd" and top_k is None else 1e-6
    assert abs(float(sums[1])) <= zero * 12
    assert max(float(g.abs().max()) for g in grads) <= zero * 10


def test_the_divergence_is_a_mean_over_tokens_and_a_sum_over_the_vocabulary() -> None:
    """By hand: two tokens, a certain and an even teacher, an even student: log V, and 0. A mean
    over the vocabulary too, as of `F.kl_div(reduction="mean")`, would be V times smaller."""
    hidden = torch.tensor([[[1.0], [0.0]]])
    teacher = Output(hidden, torch.tensor([[100.0]] + [[0.0]] * (ROWS - 1)))
    student = Output(torch.zeros(1, 2, 1, requires_grad=True), torch.zeros(ROWS, 1))
    labels = torch.zeros(1, 2, dtype=torch.int64)
    sums = distillation_sums(student, teacher, labels, LOCAL, ROWS, Divergence())
    assert float(sums[1]) / 2 == pytest.approx(math.log(ROWS) / 2, rel=1e-6)


def test_top_k_of_nearly_all_tokens_is_nearly_the_whole() -> None:
    student, teacher, labels = models()
    whole = distillation_sums(student, teacher, labels, LOCAL, ROWS, Divergence())[1]
    found = [
        float(distillation_sums(student, teacher, labels, LOCAL, ROWS, Divergence(top_k=k))[1])
        for k in (1, 4, 16, ROWS - 1)
    ]
    assert found == sorted(found), "merging tokens can only bring distributions closer"
    assert found[-1] == pytest.approx(float(whole), rel=1e-5)


def test_full_logits_of_teacher_and_student_never_exist() -> None:
    """Peak bytes at a vocabulary of 128k are below 40% of the plain computation's."""
    options = Divergence(temperature=2.0, top_k=64, ce=0.5)
    rows, tokens, width = 128_000, 512, 4
    x, weight = (torch.randn(*s, requires_grad=True) for s in ((1, tokens, width), (rows, width)))
    teacher = Output(torch.randn(1, tokens, width), torch.randn(rows, width))
    labels = torch.randint(rows, (1, tokens))
    with Peak() as ours:
        distillation_sums(Output(x, weight), teacher, labels, LOCAL, rows, options)[0].backward()
    with Peak() as plain:
        s, t = (y.hidden @ y.weight.T for y in (Output(x, weight), teacher))
        F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="sum").backward()
    assert plain.peak >= 4 * 4 * tokens * rows, "or this instrument sees nothing"
    assert ours.peak < 0.4 * plain.peak, ours.peak / plain.peak
