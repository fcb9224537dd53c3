"""Policy losses: advantages of groups, ratios, clipping, importance weights. Pure functions.

All work in the dtype of what they get. The names are those of TRL 1.16's GRPOTrainer, with which
the tests compare them. Of a batch of B answers of T tokens, `ours` [B, T] are the log-probabilities
of the policy that is trained, `old` [B, T] those of the policy that answered, both under the
sampling temperature, and `mask` [B, T] (bool) says which tokens are learned.

GRPO (Shao et al., arXiv 2402.03300), DAPO (Yu et al., 2503.14476), Dr. GRPO (Liu et al.,
2503.20783), RLOO (Ahmadian et al., 2402.14740), CISPO (MiniMax-M1, 2506.13585), GSPO (Zheng et al.,
2507.18071). BNPO is TRL's name for a mean over the tokens of a local batch; here every mean is over
the global batch, so it is DAPO's. `reinforce` is NanoChat's: -A log p, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

STD_EPSILON = 1e-4  # TRL's, added to a standard deviation that is divided by

Scale = Literal["group", "batch", "none"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Sum = Callable[[Tensor], Tensor]  # of [B], over ranks that share the sequences


@dataclass(frozen=True)
class Rule:
    """What the name of a loss stands for.

    Attributes:
        ratio: of what the probabilities are compared: each token; the geometric mean of a
            sequence's tokens; the whole sequence.
        clip: the product of ratio and advantage (PPO), the ratio as a weight without a gradient
            (CISPO), or none: then the loss is -A log p.
        mean: over all tokens; over sequences, of which each is the mean of its tokens; over
            sequences of a constant length.
        leave_one_out: whether an answer's baseline is the mean of the others of its group.
        scale: `scale_rewards` unless a run says otherwise.
    """

    ratio: Literal["token", "sequence_mean", "sequence"] = "token"
    clip: Literal["product", "weight", "none"] = "product"
    mean: Literal["tokens", "sequences", "constant"] = "tokens"
    leave_one_out: bool = False
    scale: Scale = "group"


RULES: dict[str, Rule] = {
    "grpo": Rule(mean="sequences"),
    "dapo": Rule(),
    "bnpo": Rule(),
    "dr_grpo": Rule(mean="constant", scale="none"),
    "rloo": Rule(ratio="sequence", mean="sequences", leave_one_out=True, scale="none"),
    "cispo": Rule(clip="weight"),
    "gspo": Rule(ratio="sequence_mean", mean="sequences"),
    "reinforce": Rule(clip="none", scale="none"),
}


def group_std(rewards: Tensor, size: int) -> Tensor:
    """The sample standard deviation [groups] of each `size` rewards [n]; NaN ones do not count.
    Exactly 0 where all are equal, and where there is but one."""
    groups = rewards.view(-1, size)
    known = ~groups.isnan()
    count = known.sum(1)
    mean = groups.nanmean(1, keepdim=True)
    squares = torch.where(known, (groups - mean).square(), 0.0).sum(1)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    highest = torch.where(known, groups, -math.inf).amax(1)
    lowest = torch.where(known, groups, math.inf).amin(1)
    return torch.where((count > 1) & (highest > lowest), std, 0.0)


def advantages(rewards: Tensor, size: int, rule: Rule, scale: Scale | None = None) -> Tensor:
    """A [n] of rewards [n], of which `size` consecutive ones answer the same prompt.

    NaN is a reward that nobody could give: it counts in no mean and its advantage is 0, as it is in
    groups that have no other one, or whose rewards are all equal."""
    groups, std = rewards.view(-1, size), group_std(rewards, size)
    known = ~groups.isnan()
    total, count = groups.nansum(1, keepdim=True), known.sum(1, keepdim=True)
    if rule.leave_one_out:
        found = groups - (total - groups) / (count - 1)
    else:
        found = groups - total / count
    scale = rule.scale if scale is None else scale
    if scale == "group":
        found = found / (std[:, None] + STD_EPSILON)
    elif scale == "batch":
        found = found / (group_std(rewards, len(rewards)) + STD_EPSILON)
    return torch.where(known & (std > 0)[:, None], found, 0.0).flatten()


def importance_weights(
    old: Tensor,
    sampled: Tensor,
    mask: Tensor,
    mode: Correction,
    most: float | None,
    total: Sum = lambda x: x,
) -> Tensor:
    """exp(old - sampled) [B, T], what the trainer's probabilities are to the engine's, bounded:
    truncated at `most`, or 0 above it, by token or by whole sequence. Truncated importance sampling
    (Ionides 2008; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", cap 2); TRL calls this vllm_importance_sampling_correction.

    Args:
        sampled: log-probabilities of the engine that answered.
        total: sums [B] over the ranks that share the sequences.
    """
    difference = torch.where(mask, old - sampled, 0.0)
    if mode.startswith("sequence"):
        difference = total(difference.sum(1))[:, None].expand_as(difference)
    weights = difference.exp()
    if most is not None:
        beyond = weights > most
        weights = weights.masked_fill(beyond, most if mode.endswith("truncate") else 0.0)
    return torch.where(mask, weights, 0.0)


def k3(reference: Tensor, ours: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - ours: an estimate of KL(ours || reference) from a token
    of ours, never negative, without bias (Schulman 2020, "Approximating KL divergence")."""
    difference = reference - ours
    return difference.exp() - difference - 1


class Terms(NamedTuple):
    """Of every token [B, T].

    Attributes:
        losses: to be averaged as the rule says; the KL term is in them.
        kl: k3 against the reference, without a gradient; 0 without one.
        low, high: where the bound below or above holds the gradient back (bool).
    """

    losses: Tensor
    kl: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Clip:
    """Bounds of a ratio: 1 - low to 1 + high (for CISPO `high` itself is the largest weight);
    `dual`: the largest ratio that a negative advantage sees (INTELLECT-2, arXiv 2505.07291)."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None


DEFAULT_CLIP = Clip()


def policy_terms(
    rule: Rule,
    ours: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    *,
    clip: Clip = DEFAULT_CLIP,
    importance: Tensor | None = None,
    reference: Tensor | None = None,
    beta: float = 0.0,
    unbiased_kl: bool = True,
    total: Sum = lambda x: x,
) -> Terms:
    """The loss of every token.

    Args:
        advantage: [B]; lengths: [B], learned tokens of each whole sequence.
        importance: [B, T] weights of the policy term.
        reference: [B, T] log-probabilities of the reference, for a KL term of weight `beta`.
        unbiased_kl: multiply k3 by the ratio, whose gradient is then that of the KL
            (DeepSeek-V3.2, arXiv 2512.02556; TRL's default).
        total: sums [B] over the ranks that share the sequences.
    """
    log_ratio = torch.where(mask, ours - old, 0.0)
    if rule.ratio != "token":
        whole = total(log_ratio.sum(1))
        if rule.ratio == "sequence_mean":
            whole = whole / lengths.clamp(min=1)
        log_ratio = whole[:, None].expand_as(log_ratio)
    ratio, a = log_ratio.exp(), advantage[:, None]
    nowhere = torch.zeros_like(mask)
    if rule.clip == "none":
        losses, low, high = -a * ours, nowhere, nowhere
    elif rule.clip == "weight":
        losses = -ratio.clamp(max=clip.high).detach() * a * ours
        low, high = nowhere, (ratio > clip.high) & (a > 0)
    else:
        bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
        seen = ratio if clip.dual is None else ratio.clamp(max=clip.dual)
        losses = -torch.minimum(seen * a, bounded * a)
        low, high = (ratio < 1 - clip.low) & (a < 0), (ratio > 1 + clip.high) & (a > 0)
    if importance is not None:
        losses = losses * importance
    kl = torch.zeros_like(ours)
    if reference is not None:
        each = k3(reference, ours)
        if unbiased_kl:
            each = each * ratio
        losses, kl = losses + beta * each, each.detach()
    return Terms(losses, kl, low & mask, high & mask)


def mean_sum(rule: Rule, losses: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """The sum of the tokens' losses [B, T], each as much as it counts, which over a whole batch is
    divided by `mean_count`."""
    if rule.mean == "sequences":
        losses = losses / lengths.clamp(min=1)[:, None]
    return torch.where(mask, losses, 0.0).sum()


def mean_count(rule: Rule, lengths: Tensor, longest: int) -> int:
    """What the sum over a whole batch is divided by. `longest`: max_completion_length."""
    if rule.mean == "tokens":
        return int(lengths.sum())
    return len(lengths) * (longest if rule.mean == "constant" else 1)
