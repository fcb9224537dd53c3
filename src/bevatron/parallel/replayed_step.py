"""Computing a step's gradients twice, to notice a device that computes wrong numbers.

A faulty device rarely makes the same mistake twice. The check needs deterministic arithmetic: a CPU
has it; on a GPU set `torch.use_deterministic_algorithms(True)` and, for attention, a deterministic
SDPA backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bevatron.checkpoint.rank_boxes import local
from bevatron.errors import BevatronError
from bevatron.parallel.gradients import drop
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placement import Placed

SHOWN = 3


def check_replay(placed: Placed, value: Tensor, again: Callable[[], Tensor]) -> None:
    """Compare loss and gradients with those of a second computation, bit for bit. Collective.

    Holds a second copy of this rank's gradients for the time.

    Args:
        value: what the first computation returned; its gradients lie at the parameters.
        again: the same computation; its gradients stay.
    Raises a BevatronError on all ranks that names the tensors and ranks that differ.
    """
    first = {name: local(p.grad) for name, p in placed.trained.items() if p.grad is not None}
    drop(placed)
    second = again()
    differ = [] if _same(value, second) else ["the loss"]
    for name, parameter in placed.trained.items():
        assert parameter.grad is not None
        if not _same(first[name], local(parameter.grad)):
            differ.append(name)
    found = on_all(lambda: differ)
    if any(found):
        where = "; ".join(
            f"rank {rank}: {_some(names)}" for rank, names in enumerate(found) if names
        )
        raise BevatronError(
            f"the same step computed twice gave other numbers ({where}); nothing was updated. "
            "Either a device computes wrong numbers (take its machine out and start again), or "
            "kernels are in use that do not repeat (set safety.replay_every: 0)"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; NaN is equal to itself."""
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
