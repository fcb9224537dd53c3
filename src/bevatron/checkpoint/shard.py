"""The one place that knows which box of a global tensor a rank holds."""

from __future__ import annotations

from torch import Tensor
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
