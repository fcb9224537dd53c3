"""Gathering sharded tensors into whole ones, each on one owning rank, and sharding them again.

This is for work that needs a whole matrix (Muon's orthogonalisation). Every matrix is worked on
once per sharding group, by its owner, and all ranks have about the same share of the work. A tensor
that is cut along several mesh dimensions travels along one dimension after the other, with one
all-to-all of all tensors for each, so the mesh's own groups suffice. Every replica has its own
owners, and nothing is sent between replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bevatron.checkpoint.rank_boxes import local
from bevatron.spec.sublayer import cut_range

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Hop:
    """One mesh dimension to travel along. Lists and maps are by tensor number.

    Attributes:
        shapes: of the tensor after this hop, where its owner has all parts of this dimension.
        dims: which dimension of the tensor this mesh dimension cuts.
        owners: the rank of the group that gets the tensor. Tensors whose owner lies elsewhere in
            an earlier dimension never come here and are not listed.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    shapes: dict[int, Shape]
    dims: dict[int, int]
    owners: dict[int, int]

    def piece(self, number: int, rank: int) -> Shape:
        """Shape of the part that a rank of the group holds before the hop."""
        shape, dim = list(self.shapes[number]), self.dims[number]
        first, last = cut_range(shape[dim], self.size, rank)
        shape[dim] = last - first
        return tuple(shape)

    def of(self, owner: int) -> list[int]:
        return [i for i, at in self.owners.items() if at == owner]


class Owners:
    """Assigns tensors of one mesh to owners.

    Args:
        tensors: DTensors over one mesh, all cut along the same mesh dimensions.
        costs: of what the owner will do with each.
        mesh: which that one is a part of.
    """

    def __init__(self, tensors: Sequence[Tensor], costs: Sequence[float], mesh: DeviceMesh) -> None:
        self.hops: list[_Hop] = []
        self.owned = list(range(len(tensors)))
        cut = _cut(tensors, mesh)
        sizes = [line.size() for _, line, _ in cut]
        slots = _balance(costs, math.prod(sizes))
        shapes: list[Shape] = [tuple(t.shape) for t in tensors]
        # FSDP's mesh dimension comes before tensor parallelism's and was cut after it: in the order
        # of the mesh each hop undoes the latest cut. Shapes are found the other way round.
        for at, (dims, line, rank) in reversed(list(enumerate(cut))):
            below = math.prod(sizes[at + 1 :])
            hop = _Hop(
                line.get_group(),
                rank,
                sizes[at],
                dict(enumerate(shapes)),
                dict(enumerate(dims)),
                {i: slot // below % sizes[at] for i, slot in enumerate(slots)},
            )
            self.hops.insert(0, hop)
            shapes = [hop.piece(i, rank) for i in range(len(tensors))]
        for tensor, shape in zip(tensors, shapes, strict=True):
            assert tuple(local(tensor).shape) == shape, "a shard is not cut as torch.chunk cuts"
        for hop in self.hops:
            for number in set(hop.owners) - set(self.owned):
                del hop.owners[number]
            self.owned = hop.of(hop.rank)

    def gather(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """This rank's parts of all tensors -> those that it owns, whole, by number. Collective."""
        held = dict(enumerate(parts))
        for hop in self.hops:
            mine, order = hop.of(hop.rank), range(hop.size)
            out = [[held[i] for i in hop.of(owner)] for owner in order]
            back = [[hop.piece(i, sender) for i in mine] for sender in order]
            came = _all_to_all(hop.group, out, back, parts[0])
            held = {i: torch.cat([p[n] for p in came], hop.dims[i]) for n, i in enumerate(mine)}
        return held

    def scatter(self, wholes: Mapping[int, Tensor], like: Tensor) -> list[Tensor]:
        """The reverse. `like` says device and dtype where a rank owns nothing. Collective."""
        held = dict(wholes)
        for hop in reversed(self.hops):
            mine, order = hop.of(hop.rank), range(hop.size)
            pieces = {i: _chunks(held[i], hop, i) for i in mine}
            out = [[pieces[i][receiver] for i in mine] for receiver in order]
            back = [[hop.piece(i, hop.rank) for i in hop.of(owner)] for owner in order]
            came = _all_to_all(hop.group, out, back, like)
            held = {
                i: p for owner in order for i, p in zip(hop.of(owner), came[owner], strict=True)
            }
        return [held[i] for i in sorted(held)]


def _cut(tensors: Sequence[Tensor], mesh: DeviceMesh) -> list[tuple[list[int], DeviceMesh, int]]:
    """Per mesh dimension that cuts the tensors: which dimension of each, the mesh, our rank."""
    if not tensors:
        return []
    found = []
    first = tensors[0]
    assert isinstance(first, DTensor)
    names = first.device_mesh.mesh_dim_names
    assert names is not None
    for at, name in enumerate(names):
        placements = [t.placements[at] for t in tensors if isinstance(t, DTensor)]
        line = mesh[name]
        if line.size() > 1 and not placements[0].is_replicate():
            dims = [int(place.dim) for place in placements]  # type: ignore[attr-defined]
            found.append((dims, line, line.get_local_rank()))
    return found


def _balance(costs: Sequence[float], slots: int) -> list[int]:
    """A slot for each tensor: the costliest first, each to the slot that has least."""
    load = [0.0] * slots
    chosen = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        slot = load.index(min(load))
        chosen[number] = slot
        load[slot] += costs[number]
    return chosen


def _chunks(whole: Tensor, hop: _Hop, number: int) -> list[Tensor]:
    dim = hop.dims[number]
    sizes = [hop.piece(number, rank)[dim] for rank in range(hop.size)]
    return list(whole.split(sizes, dim))


def _all_to_all(
    group: dist.ProcessGroup, out: list[list[Tensor]], back: list[list[Shape]], like: Tensor
) -> list[list[Tensor]]:
    """Send `out[rank]` to each rank of the group; what came from each, in the shapes `back`."""
    flat = [t.reshape(-1) for tensors in out for t in tensors]
    send = torch.cat(flat) if flat else like.new_empty(0)
    counts = [[math.prod(shape) for shape in shapes] for shapes in back]
    received = [sum(c) for c in counts]
    came = like.new_empty(sum(received))
    sent = [sum(t.numel() for t in tensors) for tensors in out]
    dist.all_to_all_single(came, send, received, sent, group=group)
    return [
        [piece.view(shape) for piece, shape in zip(part.split(count), shapes, strict=True)]
        for part, count, shapes in zip(came.split(received), counts, back, strict=True)
    ]
