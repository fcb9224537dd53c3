"""Cross-entropy over a vocabulary that ranks may share, without ever holding all logits.

At most `chunk x V/tp` fp32 logits exist at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bevatron.nn.rank_communication import Comm
from bevatron.train.chunked_loss import CHUNK_LOGITS, sums_of_chunks

IGNORE = -100


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, comm: Comm, softcap: float | None, rows: int
) -> Tensor:
    """Sum of -log p(label) over all labels that are not IGNORE, fp32 scalar.

    Args:
        hidden: [B, T, h]; under tensor parallelism its gradient is this rank's partial sum.
        weight: [V/size, h], this rank's rows of a vocabulary of `rows`.
        labels: [B, T] int64.
    """
    return cross_entropy_and_z(hidden, weight, labels, comm, softcap, rows, 0.0)[0]


def cross_entropy_and_z(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    comm: Comm,
    softcap: float | None,
    rows: int,
    z_loss: float,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum of -log p(label) + z_loss * logsumexp(logits)^2, and its second term's share without
    a gradient, to report it apart (Chowdhery et al., arXiv 2204.02311, section 5). Arguments as of
    `cross_entropy_sum`; `compiled`: what is done with the logits is compiled, where no other rank
    takes part in it."""
    first, _ = comm.bounds(rows)
    # By the largest share of an uneven vocabulary, so that all ranks have as many chunks.
    tokens = max(1, CHUNK_LOGITS // -(-rows // comm.size))
    flat, targets = hidden.flatten(0, 1), labels.flatten()
    compute = _compiled_chunk() if compiled and comm.size == 1 else _chunk

    def chunk(x: Tensor, w: Tensor, piece: slice, keep: bool) -> tuple[Tensor, Tensor | None]:
        loss, z, dlogits = compute(x, w, targets[piece], first, comm, softcap, z_loss, keep)
        return torch.stack((loss + z, z)), dlogits

    sums = sums_of_chunks(flat, weight, tokens, 2, chunk)
    return sums[0], sums[1].detach()


@cache
def _compiled_chunk() -> Any:
    return torch.compile(_chunk, dynamic=False)


def _chunk(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    comm: Comm,
    cap: float | None,
    z_loss: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of one chunk, its z-loss, and the gradient of their sum with respect to the uncapped
    logits [n, V]."""
    logits = (x @ weight.T).float()  # [n, V]
    slope = None
    if cap is not None:
        squashed = torch.tanh(logits / cap)
        slope, logits = 1 - squashed.square(), cap * squashed
    highest = comm.max_(logits.amax(-1))  # [n]
    logits -= highest[:, None]
    valid = labels != IGNORE
    mine = valid & (labels >= first) & (labels < first + len(weight))
    column = torch.where(mine, labels - first, 0)[:, None]
    target = logits.gather(1, column)[:, 0] * mine
    probabilities = logits.exp_()
    denominator, target = comm.sum_(torch.stack((probabilities.sum(-1), target)))
    relative = denominator.log()
    loss = ((relative - target) * valid).sum()
    normaliser = relative + highest  # log sum exp of the capped logits
    z = (z_loss * normaliser.square() * valid).sum()
    if not keep:
        return loss, z, None
    dlogits = probabilities.div_(denominator[:, None])
    if z_loss:
        dlogits *= (1 + 2 * z_loss * normaliser)[:, None]
    dlogits.scatter_add_(1, column, -mine[:, None].float())
    dlogits *= valid[:, None]
    if slope is not None:
        dlogits *= slope
    return loss, z, dlogits.to(x.dtype)
