"""The one place that knows which box of a global tensor a rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box(tensor: Tensor) -> Box:
    """Offset and shape of this rank's part in the global tensor (DCP's protocol method)."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    chunks = tensor.__create_chunk_list__()
    if not chunks:
        return (0,) * tensor.ndim, (0,) * tensor.ndim
    return tuple(chunks[0].offsets), tuple(chunks[0].sizes)


def copies(tensor: Tensor) -> int:
    """How many ranks of the tensor's mesh hold the same box."""
    if not isinstance(tensor, DTensor):
        return 1
    n = 1
    for dim, place in enumerate(tensor.placements):
        n *= tensor.device_mesh.size(dim) if place.is_replicate() else 1
    return n


def is_first_copy(tensor: Tensor) -> bool:
    """Whether this rank is the one among those copies that writes it."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        at == 0 or not place.is_replicate()
        for at, place in zip(coordinate, tensor.placements, strict=True)
    )


def shares(items: Sequence[tuple[Tensor, int]]) -> list[bool]:
    """Which of these tensors' boxes this rank writes, so that each is written once and the ranks
    that hold copies share the work: the largest tensors first, each to the copy that has least.

    All holders of a box come to the same answer without asking each other: it depends on global
    shapes and placements alone. (With one copy of all, everyone writes what it has.)

    Args:
        items: tensors and the bytes per element that they are written with, in the same order on
            all ranks of their mesh.
    """
    out = [True] * len(items)
    loads: dict[DeviceMesh, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    order = sorted(range(len(items)), key=lambda i: -items[i][0].numel() * items[i][1])
    for i in order:
        tensor, itemsize = items[i]
        if not isinstance(tensor, DTensor):
            continue
        mesh, placements = tensor.device_mesh, tensor.placements
        copied = [place.is_replicate() for place in placements]
        load = loads.setdefault(mesh, np.zeros(tuple(mesh.shape)))
        cut = tuple(d for d, whole in enumerate(copied) if not whole)
        heard = load.sum(axis=cut, keepdims=True)  # what each copy's ranks write so far, together
        least = np.unravel_index(int(heard.argmin()), heard.shape)
        at = mesh.get_coordinate()
        assert at is not None
        out[i] = all(a == b for a, b, whole in zip(at, least, copied, strict=True) if whole)
        holders = tuple(int(b) if c else slice(None) for b, c in zip(least, copied, strict=True))
        parts = math.prod(mesh.shape[d] for d in cut)
        load[holders] += tensor.numel() * itemsize / parts
    return out
