"""Linear maps with an adapter beside their weight: LoRA and DoRA (see `bevatron.spec.adapter`).

r rank, m how many A there are. Of a map that fuses several matrices with an A for each, B is spread
out to [out, m*r], with zeros where a row is not of the matrix that the A is for; so one product
does all.

Where tensor-parallel ranks share the rows, every rank computes A x of the whole x, and its own rows
of B times that; its gradient of A is a part of a sum. Where they share the columns, a rank's A x is
a part of the sum over the ranks, and so is B A x, which is added up together with W x; its gradient
of B is a part of a sum. Nothing else travels between the ranks than without an adapter, but for
these gradients, and the lengths of DoRA's rows where columns are shared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.nn.linear_map import Chosen, Here, LinearMap
from bevatron.nn.rank_communication import Comm, empty
from bevatron.spec import Adapter, ModelSpec, ParameterSpec
from bevatron.spec.adapter import adds_up_columns


class AdaptedMap(LinearMap):
    """A linear map together with its adapter.

    Attributes:
        on: whether the adapter takes part. Switched off, it is the map of the base."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor

    def __init__(
        self, base: LinearMap, weight: ParameterSpec, layer: int, adapter: Adapter, comm: Comm
    ) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.on = adapter.scale, True
        self.comm, self.adds_up = comm, adds_up_columns(weight)
        self.sizes = weight.fused[1] if weight.fused is not None else (weight.shape[0],)
        self.parts = adapter.parts(weight, layer)
        self.lefts = adapter.lefts(self.parts)
        for parameter in adapter.beside(weight, layer):
            setattr(self, parameter.name.rpartition(".")[2], empty(*parameter.shape))

    def product(
        self, x: Tensor, here: Here, chosen: Chosen | None = None, *, biased: bool = True
    ) -> Tensor:
        if not self.on:
            return super().product(x, here, chosen, biased=biased)
        a_here, b_here = (here, self.comm.whole) if self.adds_up else (self.comm.whole, here)
        a = a_here(self.lora_a)  # [m*r, in]
        b = self.spread(b_here(self.lora_b))
        b = b if chosen is None else chosen(b)  # [out, m*r]
        added = F.linear(F.linear(x, a) * self.scale, b)
        if "magnitude" not in self._parameters:
            return super().product(x, here, chosen, biased=biased) + added
        with torch.no_grad():  # section 4.3 of the paper
            weight = here(self.weight)
            weight = weight if chosen is None else chosen(weight)
            changed = weight.float() + self.scale * (b.float() @ a.float())
            squared = changed.square().sum(-1)
            lengths = (self.comm.sum_(squared) if self.adds_up else squared).sqrt()
        factor = self.factor(b_here(self.magnitude), lengths, chosen)
        y = (super().product(x, here, chosen, biased=False) + added) * factor
        if not biased or self.bias is None:
            return y
        bias = here(self.bias)
        return y + (bias if chosen is None else chosen(bias))

    def factor(self, magnitude: Tensor, lengths: Tensor, chosen: Chosen | None = None) -> Tensor:
        """magnitude / |W + s B A| of every row [out], 1 for rows that are not adapted.

        Args:
            magnitude: of the adapted parts' rows, in the shape that is stored.
            lengths: of the rows that this rank multiplies with.
        """
        both = torch.stack((magnitude, torch.ones_like(magnitude)), -1)
        both = self._rows_of_all(both, 1)
        both = both if chosen is None else chosen(both)
        stored, adapted = both.unbind(-1)
        factor: Tensor = stored / lengths + (1 - adapted)
        return factor.to(magnitude.dtype)

    def of_parts(self, rows: Tensor) -> Tensor:
        """What belongs to all rows of the whole weight -> to those of the adapted parts alone."""
        if len(self.parts) == len(self.sizes):
            return rows
        if rows.ndim == 2:
            chosen: Tensor = rows[list(self.parts)]
            return chosen
        pieces = rows.unflatten(0, (-1, sum(self.sizes))).split(list(self.sizes), 1)
        return torch.cat([pieces[part] for part in self.parts], 1).flatten()

    def spread(self, right: Tensor) -> Tensor:
        """B [rows of the adapted parts, r] -> [all rows of the weight, m*r]."""
        return self._rows_of_all(right, self.lefts)

    def _rows_of_all(self, right: Tensor, lefts: int) -> Tensor:
        """Rows of the adapted parts [..., r] -> all rows of the weight [..., lefts * r]: each part
        beside zeros where the others' columns are, zeros for parts that are not adapted."""
        whole = len(self.sizes)
        if len(self.parts) == whole and lefts == 1:
            return right
        r, n = right.shape[-1], len(self.parts)
        if right.ndim == 3:  # [parts, rows, r]
            flat = right.flatten(0, 1)[None]
            sizes = [right.shape[1]] * whole
        else:  # [groups * rows of the parts, r]
            sizes = list(self.sizes)
            flat = right.unflatten(0, (-1, sum(sizes[part] for part in self.parts)))
        found = iter(flat.split([sizes[part] for part in self.parts], 1))
        columns, number, out = lefts * r, 0, []
        for part in range(whole):
            if part not in self.parts:
                out.append(flat.new_zeros(flat.shape[0], sizes[part], columns))
                continue
            before = number * r if lefts == n else 0
            out.append(F.pad(next(found), (before, columns - r - before)))
            number += 1
        spread: Tensor = torch.cat(out, 1)  # [groups, rows of all parts, columns]
        return spread[0].unflatten(0, (whole, -1)) if right.ndim == 3 else spread.flatten(0, 1)


def adapt(layers: nn.ModuleDict, spec: ModelSpec, comm: Comm) -> None:
    """Put the model's adapter beside the linear maps of these layers."""
    adapter, base = spec.adapter, spec.base
    if adapter is None:
        return
    for number, layer in layers.items():
        for weight in base.layer_parameters(int(number)):
            if not adapter.parts(weight, int(number)):
                continue
            where, _, name = weight.name.split(".", 2)[2].rpartition(".")[0].rpartition(".")
            owner = layer.get_submodule(where)
            found = getattr(owner, name)
            assert isinstance(found, LinearMap), f"{weight.name} is no linear map"
            setattr(owner, name, AdaptedMap(found, weight, int(number), adapter, comm))


def adapted_maps(module: nn.Module) -> list[AdaptedMap]:
    """All maps of a module that have an adapter."""
    return [found for found in module.modules() if isinstance(found, AdaptedMap)]
