"""Losses on preferences: which of several answers to one prompt is better, and by how much.

All are functions of numbers per sequence, in any floating dtype, and know nothing of models. The
implicit reward of an answer y is `beta * (log p(y) - log p_reference(y))`, log-probabilities summed
over the answer's tokens (or averaged, where said). The margin of a pair is the implicit reward of
the chosen answer minus that of the rejected one. All return one loss per sample.

The names of RPO's two divergences are NVIDIA's (NeMo-Aligner: `rpo_bwd_kl`, `rpo_fwd_kl`), and
the other way round than most of the field has them: *backward* is KL(target || model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, equation 7): -log sigmoid(margin) of margins [n].

    With `label_smoothing` e, the share of labels that are the wrong way round, it is cDPO
    (Mitchell, https://ericmitchell.ai/cdpo.pdf): -(1 - e) log sigmoid(m) - e log sigmoid(-m).
    """
    right = -F.logsigmoid(margin)
    if not label_smoothing:
        return right
    return (1 - label_smoothing) * right - label_smoothing * F.logsigmoid(-margin)


def robust(margin: Tensor, label_smoothing: float) -> Tensor:
    """Robust DPO (Ray Chowdhury et al., arXiv 2403.00409, equation 12): an unbiased estimate of
    DPO's loss on the true labels, of which a share `label_smoothing` < 1/2 was flipped."""
    wrong = -F.logsigmoid(-margin)
    right = (1 - label_smoothing) * sigmoid(margin)
    return (right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(difference: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, equation 17): (d - 1 / (2 beta))^2. `difference` [n] is
    the margin before it is multiplied by beta; TRL averages it per token, NeMo-Aligner does not.
    """
    return (difference - 1 / (2 * beta)).square()


def hinge(margin: Tensor) -> Tensor:
    """SLiC's hinge on the margin (Zhao et al., arXiv 2305.10425): relu(1 - margin)."""
    return torch.relu(1 - margin)


def simpo(margin: Tensor, gamma: float) -> Tensor:
    """SimPO (Meng et al., arXiv 2405.14734, equation 6): -log sigmoid(margin - gamma). The margin
    is of rewards without a reference, beta * the mean log-probability of an answer's tokens."""
    return sigmoid(margin - gamma)


# Reward-aware preference optimisation (Adler et al., arXiv 2406.11704, section 3.3.3; Sun et al.,
# arXiv 2502.00203): the implicit rewards [n, K] of K answers are drawn to the given ones [n, K],
# which are scaled by eta already, up to a constant for each prompt.


def rpo_sq(implicit: Tensor, given: Tensor) -> Tensor:
    """(a - b)^2 of two answers: a is the margin of the implicit rewards, b that of the given ones.
    (The paper has a factor of 1/2, NVIDIA's code has none.)"""
    margin = (implicit - given).diff(dim=-1)
    return margin.square().squeeze(-1)


def rpo_sqloo(implicit: Tensor, given: Tensor) -> Tensor:
    """The mean over K answers of the squared difference between an answer's implicit and given
    reward, each less its mean over the K - 1 other answers. Of two answers it is `rpo_sq`."""
    difference = implicit - given
    count = difference.shape[-1]
    others = (difference.sum(-1, keepdim=True) - difference) / (count - 1)
    return (difference - others).square().mean(-1)


def rpo_bwd_kl(implicit: Tensor, given: Tensor) -> Tensor:
    """KL(softmax(given) || softmax(implicit)) over K answers. Of two it is the divergence between
    Bernoulli distributions KL(sigmoid(b) || sigmoid(a)), whose gradient by a is sigmoid(a) -
    sigmoid(b)."""
    return _divergence(given, implicit)


def rpo_fwd_kl(implicit: Tensor, given: Tensor) -> Tensor:
    """KL(softmax(implicit) || softmax(given)) over K answers."""
    return _divergence(implicit, given)


def _divergence(left: Tensor, right: Tensor) -> Tensor:
    """KL(softmax(left) || softmax(right)) over the last dimension."""
    log_left, log_right = left.log_softmax(-1), right.log_softmax(-1)
    return (log_left.exp() * (log_left - log_right)).sum(-1)


# The forms of RPO by name.
Form = Callable[[Tensor, Tensor], Tensor]
RPO_FORMS: Mapping[str, Form] = {
    "rpo_sq": rpo_sq,
    "rpo_sqloo": rpo_sqloo,
    "rpo_bwd_kl": rpo_bwd_kl,
    "rpo_fwd_kl": rpo_fwd_kl,
}
