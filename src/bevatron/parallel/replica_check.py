"""Do ranks that hold the same part of a parameter hold the same numbers?

A flipped bit in one of several copies raises no error: each rank goes on with its own copy, and the
loss drifts. Copies are found by their boxes, at any layout: along a dimension of the mesh, ranks
with the same box of a parameter must have equal bytes.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from bevatron.checkpoint.rank_boxes import box, local
from bevatron.errors import BevatronError
from bevatron.parallel.placement import Placed

DIMENSIONS = ("dp_replicate", "dp_shard", "cp", "tp")
SHOWN = 3


def check_replicas(placed: Placed) -> None:
    """Compare all copies of all parameters by hashes of their bytes. Collective.

    Sends 16 bytes per parameter and dimension of the mesh, and reads every parameter once.
    Raises a BevatronError on all ranks that names parameters and ranks, if copies differ."""
    parameters = {**placed.parameters, **placed.added}
    boxes = [_number(repr(box(p)).encode()) for p in parameters.values()]
    values = [_hash(local(p.detach())) for p in parameters.values()]
    device = placed.mesh.device_type
    differ: set[str] = set()
    for dimension in DIMENSIONS:
        if placed.mesh.size(placed.mesh.mesh_dim_names.index(dimension)) == 1:  # type: ignore[union-attr]
            continue
        group = placed.mesh.get_group(dimension)
        same_box, same_value = (_agree(numbers, group, device) for numbers in (boxes, values))
        differ |= {
            name
            for name, copied, equal in zip(parameters, same_box, same_value, strict=True)
            if copied and not equal
        }
    wrong = torch.tensor(len(differ), device=device)
    dist.all_reduce(wrong)
    if int(wrong):
        hashes = dict(zip(parameters, zip(boxes, values, strict=True), strict=True))
        _explain({name: hashes[name] for name in differ})


def _explain(mine: dict[str, tuple[int, int]]) -> None:
    """Raise with every differing parameter and who holds what. `mine`: its box and hash here."""
    found: list[dict[str, tuple[int, int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    held: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, names in enumerate(found):
        for name, (where, value) in names.items():
            held[name, where][value].append(rank)
    said = {
        name: " against ".join(_ranks(r) for r in sorted(by_value.values(), key=len))
        for (name, _), by_value in held.items()
        if len(by_value) > 1
    }
    shown = "; ".join(f"{name} ({who})" for name, who in list(said.items())[:SHOWN])
    more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    raise BevatronError(
        f"copies of one parameter differ between ranks: {shown}{more}. Memory or a device failed "
        "since they were last compared; start again from a step saved before that, without the "
        "machine of the odd rank"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _agree(numbers: list[int], group: dist.ProcessGroup, device: str) -> list[bool]:
    """For each number, whether all ranks of the group have the same: largest equals smallest."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    both = torch.cat([mine, ~mine])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    largest, smallest = both[: len(mine)], ~both[len(mine) :]
    return [bool(x) for x in largest == smallest]


def _hash(tensor: Tensor) -> int:
    raw = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return _number(raw.data)


def _number(data: bytes | memoryview) -> int:
    """63 bits, so that it fits an int64."""
    return xxhash.xxh3_64_intdigest(data) >> 1
