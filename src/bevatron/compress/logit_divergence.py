"""How far a student's distribution over the vocabulary is from its teacher's.

Both sets of logits exist for one chunk of tokens at a time. Ranks may share the vocabulary: they
then exchange a few numbers per token, which is also enough for the gradient with respect to a
rank's own logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import IGNORE, capped_logits, chunk_tokens, sums_of_chunks
from bevatron.parallel.placement import AtEnd
from bevatron.spec import ModelSpec

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
MODELS = 2  # whose logits exist together
TINY = 1e-38  # a tail that holds less holds nothing


@dataclass(frozen=True)
class Divergence:
    """Which one, between softmax(teacher / temperature) and softmax(student / temperature).

    Attributes:
        kind: forward_kl, KL(teacher || student); reverse_kl, KL(student || teacher); jsd,
            mixture * KL(teacher || m) + (1 - mixture) * KL(student || m), where m is mixture *
            teacher + (1 - mixture) * student (Agarwal et al., arXiv 2306.13649, equation 1).
        top_k: compare the teacher's k likeliest tokens, and the mass of all others as one more;
            None compares all tokens.
        ce: weight of the cross-entropy with the data's own next token, at temperature 1.
    """

    kind: Kind = "forward_kl"
    temperature: float = 1.0
    top_k: int | None = None
    ce: float = 0.0
    mixture: float = 0.5


@dataclass(frozen=True)
class Output:
    """One model's end: logits are softcap(hidden @ weight.T, cap).

    Attributes:
        hidden: [B, T, h], the whole sequence on every rank that shares the vocabulary.
        weight: [V/size, h], this rank's rows.
    """

    hidden: Tensor
    weight: Tensor
    cap: float | None = None

    def logits(self, piece: slice) -> Tensor:
        x = self.hidden.flatten(0, 1)[piece]
        return capped_logits(x, self.weight, self.cap, False)[0]


@dataclass(frozen=True)
class Top:
    """Of distributions over the vocabulary, the likeliest tokens and the rest; the same on every
    rank that shares the vocabulary.

    Attributes:
        values: [N, k] log-probabilities, fp32; highest first.
        ids: [N, k] token ids.
        tail: [N] the logarithm of all other tokens' mass, fp32.
    """

    values: Tensor
    ids: Tensor
    tail: Tensor

    def logits(self, piece: slice) -> Top:
        """Those of some tokens, as `Output.logits`."""
        return Top(self.values[piece], self.ids[piece], self.tail[piece])

    def first(self, k: int) -> Top:
        """The same of fewer tokens."""
        if k == self.values.shape[1]:
            return self
        rest = torch.cat((self.values[:, k:], self.tail[:, None]), 1)
        return Top(self.values[:, :k], self.ids[:, :k], rest.logsumexp(1))

    def normalised(self) -> Top:
        """With a mass of 1, which rounding may have changed."""
        mass = torch.cat((self.values, self.tail[:, None]), 1).logsumexp(1)
        return Top(self.values - mass[:, None], self.ids, self.tail - mass)


def top_of(model: Output, comm: Comm, rows: int, temperature: float, k: int) -> Top:
    """The k likeliest of all tokens of a model's end, N = B * T of them."""
    count, step = model.hidden.flatten(0, 1).shape[0], chunk_tokens(rows, comm, MODELS)
    first, _ = comm.bounds(rows)
    found = []
    for begin in range(0, count, step):
        t = model.logits(slice(begin, begin + step))
        t -= comm.max_(t.amax(-1))[:, None]
        _log_softmax([t], temperature, comm)
        found.append(_top(t, k, first, comm))
    parts = ([getattr(top, name) for top in found] for name in ("values", "ids", "tail"))
    return Top(*(torch.cat(part) for part in parts))


def top_tokens(temperature: float, k: int) -> AtEnd:
    """To ask a forward for: of every token's distribution the k likeliest next tokens, as
    `values` and `ids` [B, T, k] and `tail` [B, T], see `Top`."""

    def at_end(comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def compute(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            model = Output(hidden, weight, spec.logit_softcap)
            top = top_of(model, comm, spec.vocab_size, temperature, k)
            rows = {"values": top.values, "ids": top.ids, "tail": top.tail}
            return {name: flat.unflatten(0, hidden.shape[:2]) for name, flat in rows.items()}

        return compute

    return at_end


def distillation_sums(
    student: Output,
    teacher: Output | Top,
    labels: Tensor,
    comm: Comm,
    rows: int,
    options: Divergence,
) -> Tensor:
    """Three sums over all tokens whose label is not IGNORE, fp32 [3]: what is minimised, which is
    temperature^2 * divergence + ce * cross-entropy; the divergence; the cross-entropy. Only the
    first has a gradient, to the student's hidden states and weight.

    Temperature^2 keeps the gradient's size when the temperature changes (Hinton et al., arXiv
    1503.02531, section 2). Under tensor parallelism the gradient of `hidden` is this rank's partial
    sum.

    Args:
        teacher: its end; or what is known of its distributions at this temperature, N = B * T,
            of which all of the k tokens are compared.
        labels: [B, T] int64.
        rows: of the whole vocabulary.
    """
    flat, targets = student.hidden.flatten(0, 1), labels.flatten()
    first, _ = comm.bounds(rows)

    def chunk(x: Tensor, w: Tensor, piece: slice, keep: bool) -> tuple[Tensor, Tensor | None]:
        s, slope = capped_logits(x, w, student.cap, keep)  # [n, V]
        sums, gradient = _chunk(
            s, teacher.logits(piece), targets[piece], first, comm, options, keep
        )
        if gradient is not None and slope is not None:
            gradient *= slope
        return sums, None if gradient is None else gradient.to(x.dtype)

    return sums_of_chunks(flat, student.weight, chunk_tokens(rows, comm, MODELS), 3, chunk)


def _chunk(
    s: Tensor,
    t: Tensor | Top,
    labels: Tensor,
    first: int,
    comm: Comm,
    options: Divergence,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sums [3] of a chunk, and the first's gradient with respect to the student's logits.

    Overwrites the logits s and t [n, V], this rank's columns from token id `first` on."""
    temperature, valid = options.temperature, labels != IGNORE
    logits = [s] if isinstance(t, Top) else [s, t]
    highest = comm.max_(torch.stack([x.amax(-1) for x in logits]))
    for x, most in zip(logits, highest, strict=True):
        x.sub_(most[:, None])
    own = _own(torch.where(valid, labels, -1)[:, None], first, s.shape[1])
    entropy, gradient = _cross_entropy(s, own, comm, keep and options.ce > 0)
    _log_softmax(logits, temperature, comm)
    if not isinstance(t, Top) and options.top_k is not None:
        t = _top(t, options.top_k, first, comm)
    if isinstance(t, Top):
        value, towards = _compare_top(s, t, first, options, comm, keep)
    else:
        value, towards = _compare(s, t, options, comm, keep)
    value, entropy = (value * valid).sum(), (entropy * valid).sum()
    sums = torch.stack((temperature**2 * value + options.ce * entropy, value, entropy))
    if towards is None:
        return sums, None
    towards *= temperature  # its square, and 1/temperature of the logits
    if gradient is not None:
        towards.add_(gradient, alpha=options.ce)
    return sums, towards.mul_(valid[:, None])


def _log_softmax(logits: list[Tensor], temperature: float, comm: Comm) -> None:
    """Turn logits whose highest is 0 into log-probabilities, in place."""
    if temperature != 1:
        for x in logits:
            x.div_(temperature)
    mass = comm.sum_(torch.stack([x.exp().sum(-1) for x in logits]))
    for x, total in zip(logits, mass, strict=True):
        x.sub_(total.log()[:, None])


# Columns [n, k] of this rank's logits, 0 where a token is another rank's, and whether it is not.
Own = tuple[Tensor, Tensor]


def _own(ids: Tensor, first: int, width: int) -> Own:
    mine = (ids >= first) & (ids < first + width)
    return torch.where(mine, ids - first, 0), mine


def _cross_entropy(s: Tensor, label: Own, comm: Comm, keep: bool) -> tuple[Tensor, Tensor | None]:
    """-log p(label) [n] of logits whose highest is 0, and its gradient."""
    columns, mine = label
    e, target = s.exp(), (s.gather(1, columns) * mine)[:, 0]
    denominator, target = comm.sum_(torch.stack((e.sum(-1), target)))
    value = denominator.log() - target
    if not keep:
        return value, None
    return value, e.div_(denominator[:, None]).scatter_add_(1, columns, -mine.to(e.dtype))


def _slopes(s: Tensor, t: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Of log-probabilities: the terms whose sum is the divergence D, and g = dD / ds with each
    probability on its own, up to a constant times exp(s). Through the softmax, the gradient is
    g - exp(s) * sum(g)."""
    if options.kind == "forward_kl":
        p = t.exp()
        return p * (t - s), p.neg()
    if options.kind == "reverse_kl":
        terms = s.exp() * (s - t)
        return terms, terms
    share = options.mixture
    if share == 0.5:
        mean = torch.logaddexp(s, t) - math.log(2)
    else:
        mean = torch.logaddexp(s + math.log1p(-share), t + math.log(share))
    g = (1 - share) * s.exp() * (s - mean)
    return share * t.exp() * (t - mean) + g, g


def _compare(
    s: Tensor, t: Tensor, options: Divergence, comm: Comm, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence [n] of log-probabilities, and its gradient [n, V]."""
    terms, g = _slopes(s, t, options)
    value, total = comm.sum_(torch.stack((terms.sum(-1), g.sum(-1))))
    if not keep:
        return value, None
    return value, g - s.exp() * _total(total, options.kind)[:, None]


def _total(total: Tensor, kind: Kind) -> Tensor:
    """The sum of g: of a forward KL it is -1, and not merely nearly, so that equal distributions
    have no gradient at all."""
    return torch.full_like(total, -1.0) if kind == "forward_kl" else total


def _compare_top(
    s: Tensor, t: Top, first: int, options: Divergence, comm: Comm, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`_compare` of k + 1 probabilities: of the teacher's k likeliest tokens and of all others
    together."""
    columns, mine = _own(t.ids, first, s.shape[1])
    p = s.exp()
    tail = comm.sum_(_others(p.clone(), columns, mine)).clamp_(min=TINY)
    chosen = comm.sum_(s.gather(1, columns).mul_(mine))
    few_s = torch.cat((chosen, tail.log()[:, None]), 1)  # [n, k + 1]
    few_t = torch.cat((t.values, t.tail[:, None]), 1)
    terms, g = _slopes(few_s, few_t, options)
    value, total = terms.sum(-1), _total(g.sum(-1), options.kind)
    if not keep:
        return value, None
    # The tail's g falls to its tokens by their probabilities.
    per_mass = (g[:, -1] / tail)[:, None]
    at_top = g[:, :-1] - chosen.exp() * per_mass
    return value, (p * (per_mass - total[:, None])).scatter_add_(1, columns, at_top * mine)


def _others(p: Tensor, columns: Tensor, mine: Tensor) -> Tensor:
    """[n]: the mass of this rank's tokens but those of these columns. Overwrites p."""
    return p.scatter_add_(1, columns, -p.gather(1, columns) * mine).sum(-1)


def _top(t: Tensor, k: int, first: int, comm: Comm) -> Top:
    """The k highest of log-probabilities t [n, V] over all ranks' columns, and the rest."""
    values, ids = _highest(t, k, first, comm)
    columns, mine = _own(ids, first, t.shape[1])
    tail = comm.sum_(_others(t.exp(), columns, mine)).clamp_(min=TINY).log()
    return Top(values, ids, tail)


def _highest(t: Tensor, k: int, first: int, comm: Comm) -> tuple[Tensor, Tensor]:
    """The k highest of t [n, V] over all ranks' columns: values and token ids [n, k]."""
    values, ids = t.topk(min(k, t.shape[1]), dim=1)
    ids = ids + first
    if comm.size == 1:
        return values, ids
    found = t.new_zeros(2, len(t), comm.size, k, dtype=torch.float64)
    found[0, :, comm.rank] = -torch.inf  # where a rank has fewer than k columns
    found[0, :, comm.rank, : values.shape[1]] = values
    found[1, :, comm.rank, : values.shape[1]] = ids
    found = comm.sum_(found).flatten(2)
    values, best = found[0].topk(k, dim=1)
    return values.to(t.dtype), found[1].gather(1, best).long()
