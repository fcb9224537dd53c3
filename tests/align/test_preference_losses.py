"""Losses on preferences: what they are to each other, to TRL's own code, and to their gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from bevatron.align.preference_losses import (
    hinge,
    ipo,
    robust,
    rpo_bwd_kl,
    rpo_fwd_kl,
    rpo_sq,
    rpo_sqloo,
    sigmoid,
    simpo,
)

BETA = 0.3


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def pair(margin: Tensor) -> Tensor:
    """[n, 2] with this margin, at any height."""
    low = draw(*margin.shape, seed=9)
    return torch.stack((low + margin, low), -1)


A, B = draw(50, seed=1), draw(50, seed=2)  # implicit and given margins


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x).sum(), x)
    return found


# -- identities --------------------------------------------------------------------------------


def test_rpo_of_certain_labels_is_dpo() -> None:
    """As eta grows, the given gap does, and what is left of the divergence is -log sigmoid(a)."""
    certain = torch.full_like(A, 800.0)
    torch.testing.assert_close(rpo_bwd_kl(pair(A), pair(certain)), sigmoid(A), rtol=1e-12, atol=0)
    nearly = rpo_bwd_kl(pair(A), pair(torch.full_like(A, 20.0)))
    torch.testing.assert_close(nearly, sigmoid(A), rtol=0, atol=1e-6)


def test_rpo_of_a_share_of_flipped_labels_is_cdpo_but_for_a_constant() -> None:
    e = 0.2
    b = torch.full_like(A, math.log((1 - e) / e))  # sigmoid(b) = 1 - e
    entropy = -(1 - e) * math.log(1 - e) - e * math.log(e)
    torch.testing.assert_close(rpo_bwd_kl(pair(A), pair(b)) + entropy, sigmoid(A, e))


def test_ipo_is_the_squared_form_with_a_constant_gap() -> None:
    half = torch.full_like(A, 0.5)
    wanted = BETA**2 * ipo(A / BETA, BETA)
    torch.testing.assert_close(rpo_sq(pair(A), pair(half)), wanted, rtol=1e-12, atol=1e-14)


def test_the_gradients_of_the_backward_divergence_is_the_difference_of_sigmoids() -> None:
    found = gradient(lambda a: rpo_bwd_kl(pair(a), pair(B)), A)
    torch.testing.assert_close(found, A.sigmoid() - B.sigmoid(), rtol=1e-10, atol=1e-14)


def test_bernoulli_formulas_as_nemo_aligner_writes_them() -> None:
    """Its order of terms: sigma(b)[log sigma(b) - log sigma(a)] + sigma(-b)[...]."""

    def bernoulli(b: Tensor, a: Tensor) -> Tensor:
        right = b.sigmoid() * (F.logsigmoid(b) - F.logsigmoid(a))
        return right + (-b).sigmoid() * (F.logsigmoid(-b) - F.logsigmoid(-a))

    torch.testing.assert_close(rpo_bwd_kl(pair(A), pair(B)), bernoulli(B, A))
    torch.testing.assert_close(rpo_fwd_kl(pair(A), pair(B)), bernoulli(A, B))
    torch.testing.assert_close(rpo_sq(pair(A), pair(B)), (A - B).square())


def test_two_answers_are_a_case_of_k() -> None:
    torch.testing.assert_close(rpo_sqloo(pair(A), pair(B)), rpo_sq(pair(A), pair(B)))


@pytest.mark.parametrize("form", [rpo_sq, rpo_sqloo, rpo_bwd_kl, rpo_fwd_kl])
def test_nothing_is_left_where_rewards_agree_but_for_a_constant(form: Any) -> None:
    k = 2 if form is rpo_sq else 5
    given = draw(20, k)
    at = given + draw(20, 1, seed=3)
    torch.testing.assert_close(form(at, given), torch.zeros(20, dtype=torch.float64))
    assert gradient(lambda p: form(p, given), at).abs().max() < 1e-12
    assert (form(draw(20, k, seed=4), given) > 0).all()


def test_leave_one_out_by_hand() -> None:
    implicit, given = draw(1, 3), draw(1, 3, seed=5)
    d = (implicit - given)[0].tolist()
    wanted = sum((d[k] - (sum(d) - d[k]) / 2) ** 2 for k in range(3)) / 3
    assert float(rpo_sqloo(implicit, given)[0]) == pytest.approx(wanted, rel=1e-12)


def test_its_gradient_at_the_reference_is_that_of_reinforce_with_a_leave_one_out_baseline() -> None:
    """At implicit rewards of zero, -gradient is proportional to the advantages of RLOO."""
    given = draw(7, 4)
    at = gradient(lambda p: rpo_sqloo(p, given), torch.zeros_like(given))
    advantages = given - (given.sum(-1, keepdim=True) - given) / 3
    torch.testing.assert_close(at, -2 / 3 * advantages)


def test_limits_of_settings() -> None:
    torch.testing.assert_close(robust(A, 0.0), sigmoid(A))
    torch.testing.assert_close(sigmoid(A, 0.5), sigmoid(-A, 0.5))
    torch.testing.assert_close(simpo(A, 0.0), sigmoid(A))
    # Robust: its mean over true and flipped labels is DPO's loss on the true ones.
    e = 0.1
    torch.testing.assert_close((1 - e) * robust(A, e) + e * robust(-A, e), sigmoid(A))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: sigmoid(x, 0.1),
        lambda x: robust(x, 0.1),
        lambda x: ipo(x, BETA),
        hinge,
        lambda x: simpo(x, 0.5),
        *(
            lambda x, form=form: form(torch.stack((x, x.flip(0)), -1), pair(B))
            for form in (rpo_sq, rpo_bwd_kl, rpo_fwd_kl)
        ),
        *(
            lambda x, form=form: form(x.view(10, 5), draw(10, 5))
            for form in (rpo_sqloo, rpo_bwd_kl, rpo_fwd_kl)
        ),
    ],
)
def test_gradients_are_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(loss, A.clone().requires_grad_())


# -- TRL's own code ----------------------------------------------------------------------------


class Accelerator:
    """What TRL's loss asks of it, in one process."""

    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def their_loss(loss: str, logps: Tensor, ref: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """`DPOTrainer._compute_loss` itself, on a model that answers log-probabilities [2n, T]; its
    first token is never predicted."""
    from trl.trainer.dpo_trainer import DPOTrainer

    zeros = torch.zeros_like(logps)
    said = SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
    )
    model = SimpleNamespace(training=True)
    trainer = SimpleNamespace(
        model=model,
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=None,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    for name, value in settings.items():
        setattr(trainer, name, value)
    n = len(logps) // 2
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.int64),
        "attention_mask": torch.ones_like(mask, dtype=torch.int64),
        "completion_mask": mask.long(),
        "ref_chosen_logps": ref[:n],
        "ref_rejected_logps": ref[n:],
    }
    found: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: said, inputs, False)
    return found


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "robust", "cdpo"])
def test_losses_are_those_of_trl(loss: str) -> None:
    n, t, e = 6, 9, 0.1
    mask = torch.arange(t + 1) >= torch.tensor([3, 5, 2, 8, 4, 6] * 2)[:, None]
    logps = -draw(2 * n, t).abs() * mask[:, 1:]
    ref = -draw(2 * n, seed=7).abs() * 6
    ratio = logps.sum(1) - ref
    difference = ratio[:n] - ratio[n:]
    each = ratio / mask.sum(1)
    ours = {
        "sigmoid": lambda: sigmoid(BETA * difference),
        "cdpo": lambda: sigmoid(BETA * difference, e),
        "robust": lambda: robust(BETA * difference, e),
        "hinge": lambda: hinge(BETA * difference),
        "ipo": lambda: ipo(each[:n] - each[n:], BETA),
    }[loss]().mean()
    if loss == "cdpo":  # their `aot` sorts the pairs of a batch, so of one pair it is cDPO
        parts = [
            their_loss("aot", *(x[[i, n + i]] for x in (logps, ref, mask)), label_smoothing=e)
            for i in range(n)
        ]
        theirs = torch.stack(parts).mean()
    else:
        theirs = their_loss(loss, logps, ref, mask, label_smoothing=e)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_simpo_is_that_of_trl() -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    chosen, rejected = -draw(8).abs(), -draw(8, seed=1).abs()  # means of an answer's tokens
    trainer = SimpleNamespace(
        accelerator=Accelerator(), alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0,
        label_smoothing=0.0,
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
    torch.testing.assert_close(simpo(2.0 * (chosen - rejected), 0.5), theirs, rtol=1e-12, atol=0)
