"""Context parallelism: the ranks of a group share every sequence, and attention sees all of it.

A sequence is cut into 2n chunks, of which rank r holds chunks r and 2n-1-r ("zig-zag"): under a
causal mask all ranks then compute the same number of scores. Only attention looks beyond a rank's
own tokens: keys and values are gathered before it, and their gradients reduce-scattered. Parameters
are sharded over the context-parallel ranks as over data-parallel ones, which sums their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from bevatron.nn.rank_communication import Context, Run
from bevatron.parallel.layout import Layout

SHARDING_DIMS = ("pp", "dp_replicate", "dp_shard", "tp")


class ContextParallel(Context):
    """The ranks of one context-parallel group."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.size, self.rank = mesh.size(), mesh.get_local_rank()

    def runs(self, length: int) -> tuple[Run, ...]:
        chunk = length // 2
        early, late = self.rank * chunk, (2 * self.size - 1 - self.rank) * chunk
        return (early, early + chunk), (late, late + chunk)

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        mine = torch.stack((key, value))[None]  # [1, 2, B, G, T, D]
        shared = DTensor.from_local(mine, self.mesh, [Shard(0)], run_check=False)
        full = shared.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        early, late = full.chunk(2, dim=-2)  # [n, 2, B, G, chunk, D] each
        ordered = torch.cat((early, late.flip(0)))  # [2n, 2, B, G, chunk, D]
        whole = ordered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)  # [2, B, G, S, D]
        return whole[0], whole[1]

    def sum(self, x: Tensor) -> Tensor:
        d = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        return d.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def starts(self, documents: Tensor) -> Tensor:
        return documents  # `take` has put their starts in place of their numbers

    def take(self, ids: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's tokens of ids [B, S] and of every tensor of `batch` that goes with them."""
        runs = self.runs(ids.shape[1] // self.size)

        def mine(name: str, whole: Tensor) -> Tensor:
            if whole.shape[:2] != ids.shape:
                return whole
            # A document may begin in another rank's chunk: only here is the whole row at hand.
            row = super(ContextParallel, self).starts(whole) if name == "documents" else whole
            return torch.cat([row[:, a:b] for a, b in runs], dim=1)

        return mine("ids", ids), {name: mine(name, whole) for name, whole in batch.items()}


def sharding_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The mesh on which parameters lie: `mesh`, with its cp dimension folded into dp_shard.

    (`DeviceMesh._flatten` would do it, but is private, and HSDP over a flattened dimension is
    deprecated. FSDP wants its mesh and tensor parallel's to be of one root.)"""
    if layout.cp == 1:
        return mesh
    sizes = (layout.pp, layout.dp_replicate, layout.shards, layout.tp)
    return init_device_mesh(mesh.device_type, sizes, mesh_dim_names=SHARDING_DIMS)
