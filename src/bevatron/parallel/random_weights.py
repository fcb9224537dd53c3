"""Random weights that do not depend on the layout.

Every parameter is drawn in blocks of whole rows, each from its own seed made of the run's seed, the
parameter's name and the block's number. A rank draws only the blocks that meet its own box.
The block size is part of what a seed means: changing it changes all random weights.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from itertools import product

import torch
from torch import Tensor

from bevatron.checkpoint.rank_boxes import box, local
from bevatron.spec import ModelSpec, ParameterSpec

BLOCK_ELEMENTS = 2**22


def fill(tensor: Tensor, parameter: ParameterSpec, spec: ModelSpec, seed: int) -> None:
    """Write this rank's part of a freshly initialised parameter, in place."""
    mine = local(tensor.detach())
    offset, shape = box(tensor)
    if parameter.role == "lora_a":  # as peft draws it, and torch the weight of a Linear
        bound = 1 / math.sqrt(parameter.shape[-1])
        _random(mine, parameter, 2 * bound, seed, offset, shape, uniform=True)
    elif parameter.role in ("bias", "lora_b") or parameter.name.endswith("norm.bias"):
        mine.zero_()
    elif parameter.role == "norm":
        mine.fill_(0.0 if spec.norm.kind == "layernorm1p" else 1.0)
    elif parameter.role == "magnitude":  # it follows from the weights
        mine.fill_(math.nan)
    else:
        std = spec.init.std_of(parameter.role, spec.sublayers)
        _random(mine, parameter, std, seed, offset, shape)


def fill_normal(tensor: Tensor, name: str, std: float, seed: int) -> None:
    """Write this rank's part of normal random numbers that depend on the seed and the name alone,
    in place; a tensor of rows and columns."""
    parameter = ParameterSpec(name, tuple(tensor.shape), "linear", ("other", "other"))
    _random(local(tensor.detach()), parameter, std, seed, *box(tensor))


def _random(
    out: Tensor,
    parameter: ParameterSpec,
    scale: float,
    seed: int,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    *,
    uniform: bool = False,
) -> None:
    """`scale` times standard normal numbers, or uniform ones from -1/2 to 1/2."""
    if 0 in shape:
        return
    *lead, columns = parameter.shape
    per_block = max(1, BLOCK_ELEMENTS // columns)
    rows_in_all = math.prod(lead)
    keep = slice(offset[-1], offset[-1] + shape[-1])
    # A box is one run of rows for every index of the dimensions before the last row dimension.
    outer = [range(o, o + n) for o, n in zip(offset[:-2], shape[:-2], strict=True)]
    for where in product(*outer):
        target = out[tuple(w - o for w, o in zip(where, offset, strict=False))]
        base = _flat(where, lead)
        begin, end = base + offset[-2], base + offset[-2] + shape[-2]
        for block in range(begin // per_block, -(-end // per_block)):
            first = block * per_block
            count = min(per_block, rows_in_all - first)
            a, b = max(begin, first), min(end, first + count)
            values = _draw(parameter.name, block, seed, count, columns, uniform)
            target[a - begin : b - begin] = values[a - first : b - first, keep] * scale


def _flat(where: tuple[int, ...], lead: list[int]) -> int:
    """Row number of the first row under the leading indices `where`."""
    row = 0
    for i, size in enumerate(lead):
        row = row * size + (where[i] if i < len(where) else 0)
    return row


def _draw(name: str, block: int, seed: int, rows: int, columns: int, uniform: bool) -> Tensor:
    digest = blake2b(f"{seed}/{name}#{block}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if uniform:
        return torch.rand(rows, columns, generator=generator) - 0.5
    return torch.randn(rows, columns, generator=generator)
