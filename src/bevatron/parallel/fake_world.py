"""A world on paper: a process group with any number of ranks, all imagined by this one process.

torch's fake process group answers every collective at once with whatever the buffers hold. So
meshes, stages and placements of any size can be built and looked at, but nothing can be computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh

from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import MESH_DIMS


@contextmanager
def paper_world(size: int, rank: int) -> Iterator[None]:
    """As `rank` of `size` processes that do not exist."""
    # The only home of the fake backend: importing it registers the name (torch 2.11 to 2.13).
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    if dist.is_initialized():
        raise BevatronError("a dry run needs a process without a process group; run it on its own")
    dist.init_process_group("fake", store=HashStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def paper_mesh(layout: Layout) -> DeviceMesh:
    """The mesh as this rank sees it, with its own groups alone.

    `world.mesh` makes every group of every dimension, which at 16,384 ranks takes a second, and
    once per stage it would be most of a dry run."""
    sizes = [getattr(layout, name) for name in MESH_DIMS]
    grid = torch.arange(layout.world_size).view(sizes)
    here = [int(i) for i in torch.unravel_index(torch.tensor(dist.get_rank()), sizes)]
    groups = []
    for dim in range(len(sizes)):
        line = tuple(slice(None) if i == dim else at for i, at in enumerate(here))
        groups.append(dist.new_group(grid[line].tolist()))
    return DeviceMesh.from_group(groups, "cpu", grid, mesh_dim_names=MESH_DIMS)
