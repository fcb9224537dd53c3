"""The norm of the gradients of all ranks together, correct on every mesh; and gradient clipping."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.checkpoint.rank_boxes import copies, local
from bevatron.parallel.placement import Placed


def squared_norm(placed: Placed) -> Tensor:
    """This rank's share of the squared L2 norm of the whole model's gradient, a float64 scalar: the
    sum over all ranks is the whole.

    A box that n ranks of a mesh hold counts 1/n on each; a tied head's second copy not at all."""
    total = torch.zeros((), dtype=torch.float64, device=placed.device)
    for parameter in placed.parameters.values():
        if not parameter.requires_grad:
            continue
        grad = parameter.grad
        assert grad is not None
        total += torch.linalg.vector_norm(local(grad), dtype=torch.float64) ** 2 / copies(parameter)
    for parameter in placed.added.values():
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
        total += norm**2 / dist.get_world_size()
    return total


def drop(placed: Placed) -> None:
    """Forget all gradients."""
    for parameter in placed.trained.values():
        parameter.grad = None


def clip(placed: Placed, norm: float, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`."""
    if limit > 0 and norm > limit:
        trained = placed.trained.values()
        grads: list[Tensor] = [local(p.grad) for p in trained if p.grad is not None]
        if grads:  # a stage may have no parameters
            torch._foreach_mul_(grads, limit / (norm + 1e-6))
