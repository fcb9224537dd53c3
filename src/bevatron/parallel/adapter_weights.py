"""The weights of a placed model with its adapter merged in, and the lengths of their rows.

A rank merges only the parts of weights that it holds. For that it needs the whole of the adapter's
matrices of its own stages, which are small: they are gathered.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from bevatron.checkpoint.rank_boxes import box, copies, is_first_copy, local
from bevatron.nn.adapted_map import AdaptedMap
from bevatron.parallel.placement import Placed

Slices = tuple[slice, ...]


class MergedWeights:
    """What the weights of this rank are with the adapter, as it is when this is made. Collective to
    make, over the ranks that share the stages."""

    def __init__(self, placed: Placed, dora: bool = True) -> None:
        self.parameters, self.grid = placed.parameters, placed.grid
        self.changes: dict[str, tuple[AdaptedMap, Tensor, Tensor]] = {}
        self.factors: dict[str, Tensor] = {}
        for stage in placed.mine.values():
            for name, module in stage.decoder.named_modules():
                if isinstance(module, AdaptedMap):
                    a, b = (self._whole(f"{name}.lora_{x}") for x in "ab")
                    self.changes[f"{name}.weight"] = module, a, module.spread(b)
        for name, (module, _, _) in self.changes.items():
            stored = f"{name.removesuffix('weight')}magnitude"
            if dora and stored in self.parameters:
                self.factors[name] = module.factor(self._whole(stored), self.lengths(name))

    @torch.no_grad()
    def _whole(self, name: str) -> Tensor:
        """All of one of the adapter's parameters, in fp32. (`DTensor.full_tensor` warns where both
        FSDP and tensor parallelism cut the rows.)"""
        parameter = self.parameters[name]
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        mine = local(parameter.detach())
        if mine.numel() and is_first_copy(parameter):
            whole[tuple(_within(parameter, (slice(None),) * mine.ndim))] = mine.float()
        return self._sum(whole, parameter)

    def _sum(self, values: Tensor, parameter: Tensor) -> Tensor:
        """Added up over the ranks that share a parameter, in place. (Its own mesh may be an equal
        one of an earlier process group, see `Placed.grid`.)"""
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        for name in (mesh.mesh_dim_names or ()) if mesh is not None else ():
            dist.all_reduce(values, group=self.grid.get_group(name))
        return values

    @torch.no_grad()
    def values(self, name: str, part: Slices = ()) -> Tensor:
        """Of a parameter, what lies here of it, or a part of that, in fp32 where it is merged."""
        parameter = self.parameters[name]
        mine = local(parameter.detach())
        part = part or (slice(None),) * mine.ndim
        if name not in self.changes:
            return mine[part]
        *rows, columns = _within(parameter, part)
        module, a, b = self.changes[name]
        merged = mine[part].float() + module.scale * (b[tuple(rows)] @ a[:, columns])
        if name in self.factors:
            merged *= self.factors[name][tuple(rows)].unsqueeze(-1)
        return merged

    @torch.no_grad()
    def lengths(self, name: str) -> Tensor:
        """Of every row of a whole weight, with B A added, its length. Collective."""
        parameter = self.parameters[name]
        squared = torch.zeros(parameter.shape[:-1], dtype=torch.float64, device=parameter.device)
        mine = local(parameter.detach())
        if mine.numel():
            *rows, _ = _within(parameter, (slice(None),) * mine.ndim)
            merged = MergedWeights.values(self, name)
            squared[tuple(rows)] += merged.square().sum(-1, dtype=torch.float64)
        return self._sum(squared / copies(parameter), parameter).sqrt().float()


def _within(parameter: Tensor, part: Slices) -> list[slice]:
    """Where a part of what lies here of a parameter is in the whole."""
    offset, shape = box(parameter)
    out = []
    for begin, size, wanted in zip(offset, shape, part, strict=True):
        first, last, _ = wanted.indices(size)
        out.append(slice(begin + first, begin + last))
    return out


def fill_magnitudes(placed: Placed, only: Collection[str]) -> None:
    """Make the new ones of these magnitudes the lengths of their rows, so that an adapter begins as
    its base. Collective."""
    if not any(name.endswith(".magnitude") for name in only):
        return
    merged = MergedWeights(placed, dora=False)
    for name, (module, _, _) in merged.changes.items():
        stored = f"{name.removesuffix('weight')}magnitude"
        lengths = merged.lengths(name)
        if stored in only:
            magnitude = placed.parameters[stored]
            offset, shape = box(magnitude)
            whole = module.of_parts(lengths)
            mine = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            local(magnitude.detach()).copy_(mine)
