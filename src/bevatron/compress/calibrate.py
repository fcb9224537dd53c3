"""Measuring the importance of heads, neurons, channels and layers during a forward pass.

For each sample, activations are aggregated over the sequence to one number per head, neuron or
channel. Only the sums and the sums of squares of these numbers over samples are kept, in fp64. So
memory does not depend on the number of samples, and data-parallel ranks add up their sums.

Definitions (Minitron, arXiv 2407.14679, section 2.2; as NVIDIA ModelOpt measures them):
- neuron: the input of the down projection, after activation and gate
- head: the L2 norm over head_dim of its output before the output projection, at every token
- channel: a norm's output; the norms' scores are summed
- block influence of a layer: 1 - mean over tokens of cos(its input, its output)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bevatron.compress.importance_scores import (
    CHANNELS,
    INFLUENCE,
    Floats,
    expected,
    units_name,
)
from bevatron.errors import BevatronError
from bevatron.nn.norm import Norm
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placement import Placed

KINDS = ("mean", "l2", "var")


@dataclass(frozen=True)
class Aggregation:
    """How numbers become one: over the sequence first, then over samples (the batch).

    mean: of absolute values; l2: root of the sum of squares; var: variance (divided by n)."""

    batch: str = "l2"
    sequence: str = "mean"

    @classmethod
    def parse(cls, text: str) -> Aggregation:
        """`batch,sequence`. Raises BevatronError."""
        parts = tuple(text.split(","))
        if len(parts) != 2 or not set(parts) <= set(KINDS):
            raise BevatronError(
                f"the aggregation is {text!r}, expected BATCH,SEQUENCE of {', '.join(KINDS)}, such "
                "as l2,mean"
            )
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.batch},{self.sequence}"

    def parts(self, x: Tensor) -> Tensor:
        """Sums over some of a sequence's tokens, x [B, t, n] -> [1 or 2, B, n]; those of other
        tokens may be added."""
        if self.sequence == "mean":
            return x.float().abs().sum(1)[None]
        if self.sequence == "l2":
            return x.float().square().sum(1)[None]
        wide = x.double()  # a difference of large sums
        return torch.stack((wide.sum(1), wide.square().sum(1)))

    def over_sequence(self, parts: Tensor, length: int) -> Tensor:
        """Sums over all of `length` tokens -> [B, n], fp64."""
        parts = parts.double()
        if self.sequence == "mean":
            return parts[0] / length
        if self.sequence == "l2":
            return parts[0].sqrt()
        return (parts[1] / length - (parts[0] / length).square()).clamp(min=0)

    def over_batch(self, sums: Tensor, samples: int) -> Tensor:
        """[2, n] sums and sums of squares over samples (none is negative) -> [n]."""
        if self.batch == "mean":
            return sums[0] / samples
        if self.batch == "l2":
            return sums[1].sqrt()
        return (sums[1] / samples - (sums[0] / samples).square()).clamp(min=0)


class Calibration:
    """The sums of this rank's layers. `tapped` around forwards of no gradient; `end_batch` after
    each of them."""

    def __init__(self, placed: Placed, aggregation: Aggregation, seq_len: int) -> None:
        self.placed, self.aggregation, self.seq_len = placed, aggregation, seq_len
        self.comm = placed.stage.decoder.comm
        self.sums: dict[str, Tensor] = {}  # of heads, neurons and norms: [2, n], fp64
        self.similarity: dict[int, Tensor] = {}  # sums of cosines by layer, fp64
        self.valid = torch.empty(0)
        self._norms: dict[str, Tensor] = {}  # what this micro-batch's norms gave

    def begin_batch(self, valid: Tensor) -> None:
        """`valid` [B]: 1 for samples, 0 for rows that only fill a micro-batch."""
        self.valid = valid.double()

    def end_batch(self) -> None:
        """Finish the norms, of whose outputs sequence-parallel ranks see a part each: one exchange
        for all of them."""
        if not self._norms:
            return
        parts = torch.stack(list(self._norms.values()))
        if self.comm.sequence_shares > 1:
            parts = self.comm.sum_(parts)
        for name, own in zip(self._norms, parts, strict=True):
            self._add(name, own)
        self._norms = {}

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Look at the activations of all of this rank's layers and norms meanwhile."""
        taps: list[Any] = []
        hooks = []
        for stage in self.placed.mine.values():
            for name, module in stage.decoder.named_modules():
                if isinstance(module, Norm):
                    hooks.append(module.register_forward_hook(partial(self._norm, name)))
            for i, layer in stage.decoder.layers.items():
                for place, sublayer in layer.spec.present:  # type: ignore[union-attr]
                    if sublayer.units:
                        taps.append(getattr(layer, place))
                        name = units_name(int(i), place, sublayer)
                        taps[-1].tap = partial(self._units, name, sublayer.unit_width)
                hooks.append(layer.register_forward_hook(partial(self._block, int(i))))
        try:
            yield
        finally:
            for tap in taps:
                tap.tap = None
            for hook in hooks:
                hook.remove()

    def _units(self, name: str, width: int, y: Tensor) -> None:
        """y [B, T, units * width]: of units of several entries, such as heads, the norms."""
        if width > 1:
            y = y.float().unflatten(-1, (-1, width)).norm(dim=-1)  # [B, T, units]
        self._add(name, self.aggregation.parts(y))

    def _norm(self, name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        self._norms[name] = self.aggregation.parts(out)

    def _block(self, layer: int, module: nn.Module, args: Any, out: Tensor) -> None:
        x: Tensor = args[0]
        if layer == 0 and self.placed.spec.embedding_norm:
            self._norms["embedding_norm"] = self.aggregation.parts(x)
        cosines = F.cosine_similarity(x.float(), out.float(), dim=-1).double().sum(1) @ self.valid
        self.similarity[layer] = self.similarity.get(layer, 0) + cosines

    def _add(self, name: str, parts: Tensor) -> None:
        s = self.aggregation.over_sequence(parts, self.seq_len) * self.valid[:, None]  # [B, n]
        new = torch.stack((s.sum(0), s.square().sum(0)))
        self.sums[name] = self.sums[name] + new if name in self.sums else new

    def scores(self, samples: int) -> dict[str, Floats]:
        """The scores of the whole model after `samples` of them on all ranks. Collective; the same
        on every rank."""
        self._add_up()
        shapes = expected(self.placed.spec)
        whole = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
        for pieces in on_all(lambda: self._pieces(samples)):
            for name, (begin, values) in pieces.items():
                whole[name][begin : begin + len(values)] += values
        tokens = samples * self.seq_len
        whole[INFLUENCE] = 1 - whole[INFLUENCE] / tokens
        for i, layer in enumerate(self.placed.spec.layers):
            if layer.attention is None and layer.mlp is None:
                whole[INFLUENCE][i] = 0.0  # the identity, but for rounding
        return {name: values.float().numpy() for name, values in whole.items()}

    def _add_up(self) -> None:
        """Over the data-parallel ranks, which have the same layers and saw other samples."""
        mine = [*self.sums.values(), *self.similarity.values()]
        if not mine:
            return
        flat = torch.cat([t.flatten() for t in mine])
        for dim in ("dp_replicate", "dp_shard"):
            dist.all_reduce(flat, group=self.placed.mesh.get_group(dim))
        parts = iter(flat.split([t.numel() for t in mine]))
        self.sums = {name: next(parts).view(2, -1) for name in self.sums}
        self.similarity = {i: next(parts).squeeze() for i in self.similarity}

    def _pieces(self, samples: int) -> dict[str, tuple[int, Tensor]]:
        """What this rank adds to the whole: name -> begin and values. Every part comes from one
        rank alone, or is a part of a sum."""
        comm, spec = self.comm, self.placed.spec
        if self.placed.dp_rank > 0:
            return {}
        pieces: dict[str, tuple[int, Tensor]] = {}
        channels = torch.zeros(spec.hidden_size, dtype=torch.float64)
        sizes = expected(spec)
        for name, sums in self.sums.items():
            values = self.aggregation.over_batch(sums, samples).cpu()
            if name in sizes:
                pieces[name] = comm.bounds(sizes[name][0])[0], values
            else:
                channels += values
        if comm.rank == 0:
            pieces[CHANNELS] = 0, channels
        if comm.rank == 0 or comm.sequence_shares > 1:
            similarity = torch.zeros(len(spec.layers), dtype=torch.float64)
            for i, total in self.similarity.items():
                similarity[i] = total
            pieces[INFLUENCE] = 0, similarity
        return pieces
