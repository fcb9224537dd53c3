"""A tied embedding whose head is on another pipeline stage: one parameter, and a copy of it.

The embedding is the parameter: only it has optimizer state, and only it is saved, loaded and
counted. The head is filled from the embedding before a forward, and its gradient is sent to the
embedding after the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bevatron.checkpoint.rank_boxes import local
from bevatron.parallel.layout import Layout


@dataclass(frozen=True)
class Tied:
    """What this rank has of the pair.

    Attributes:
        embedding, head: None on ranks without that stage.
        group: the two ranks that have them at this rank's other coordinates, the embedding's
            first; None where both are on one rank (V schedules), or neither is here.
    """

    embedding: Tensor | None
    head: Tensor | None
    group: dist.ProcessGroup | None

    def fill_head(self) -> None:
        """Make the head equal to the embedding."""
        if self.group is not None:
            part = self.embedding if self.embedding is not None else self.head
            assert part is not None
            dist.broadcast(local(part.detach()), group_src=0, group=self.group)
        elif self.embedding is not None and self.head is not None:
            local(self.head.detach()).copy_(local(self.embedding.detach()))

    def sum_gradients(self) -> None:
        """Give the embedding the sum of both gradients, and drop the head's."""
        grads = [
            local(p.grad)
            for p in (self.embedding, self.head)
            if p is not None and p.grad is not None
        ]
        if not grads:  # frozen, or neither is here
            return
        if self.group is not None:
            dist.reduce(grads[0], group_dst=0, group=self.group)
        elif len(grads) == 2:
            grads[0] += grads[1]
        if self.head is not None:
            self.head.grad = None


def tie(layout: Layout, mesh: DeviceMesh, embedding: Tensor | None, head: Tensor | None) -> Tied:
    """Pair the embedding with its copy. Collective: all ranks create all groups, in one order."""
    last = layout.rank_of_stage(layout.num_stages - 1)
    mine = None
    if last != 0:
        grid = mesh.mesh.flatten(1)  # [pp, everything else]
        for first_rank, last_rank in torch.stack((grid[0], grid[last])).T.tolist():
            group = dist.new_group([first_rank, last_rank])
            if dist.get_rank() in (first_rank, last_rank):
                mine = group
    return Tied(embedding, head, mine)
