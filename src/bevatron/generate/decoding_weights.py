"""One rank's weights as the engine uses them.

They are read from files, or from the parameters of a model that is being trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.save_and_load import DTYPES, ReadBox, box_reader
from bevatron.errors import BevatronError
from bevatron.generate.decoding_sublayers import DECODINGS, Decoding
from bevatron.generate.matrix_product import Matrix, matrix
from bevatron.nn.norm import NormFunction, norm_function
from bevatron.progress import Advance, progress
from bevatron.spec import ModelSpec
from bevatron.spec.sublayer import cut_range


@dataclass
class ModelWeights:
    """`dtype`: of the activations too; embed, head and final_norm where this stage has them.
    `layers`: of each its sublayers, with the norms before them."""

    dtype: torch.dtype
    embed: Tensor | None
    layers: dict[int, list[tuple[NormFunction, Decoding]]]
    final_norm: NormFunction | None
    head: Matrix | None


@dataclass(frozen=True)
class Share:
    """Which part of a model a rank has."""

    layers: range
    first: bool
    last: bool
    tp: int = 1
    tp_rank: int = 0

    def holds(self, name: str) -> bool:
        """Whether a parameter is in this part, whole or cut."""
        if name.startswith("layers."):
            return int(name.split(".")[1]) in self.layers
        return self.last if name.startswith(("head.", "final_norm.")) else self.first

    def bounds(self, n: int) -> tuple[int, int]:
        """This rank's range of a dimension of size n, cut as training cuts it."""
        return cut_range(n, self.tp, self.tp_rank)


class Reader:
    """Reads this rank's part of each parameter, in the dtype and on the device that are asked for,
    in the order in which the spec lists them. It may read again when they have changed: matrices
    then take the new values in the memory that they have.

    Args:
        read: gives any box of any parameter.
        batches: whether several sequences will run at once.
        advance: gets the elements that have been read, if anybody wants to know.
    """

    def __init__(
        self,
        spec: ModelSpec,
        share: Share,
        read: ReadBox,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batches: bool,
        int8: bool = False,
        advance: Advance | None = None,
    ) -> None:
        self.read, self.advance = read, advance
        self.spec, self.share, self.dtype, self.device = spec, share, dtype, device
        self.batches, self.int8 = batches, int8
        self.parameters = {p.name: p for p in spec.parameters()}
        self.embedding: Tensor | None = None
        self.matrices: dict[str, Matrix] = {}

    def box(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        values = self.read(name, offset, shape).to(self.device, self.dtype)
        if self.advance is not None:
            self.advance(values.numel())
        return values

    def part(self, name: str) -> Tensor:
        """This rank's part of a parameter."""
        parameter = self.parameters[name]
        offset, shape = [0] * len(parameter.shape), list(parameter.shape)
        dim = self.spec.cut(parameter, self.share.tp)
        if dim is not None:
            first, last = self.share.bounds(shape[dim])
            offset[dim], shape[dim] = first, last - first
        return self.box(name, tuple(offset), tuple(shape))

    def matrix(self, name: str, weight: Tensor | None = None) -> Matrix:
        """The product with a parameter, or with `weight` in its place."""
        weight = self.part(name) if weight is None else weight
        made = matrix(
            weight.flatten(0, -2),
            batches=self.batches,
            int8=self.int8,
            old=self.matrices.get(name),
        )
        self.matrices[name] = made
        return made

    def bias(self, name: str) -> Tensor | None:
        if name not in self.parameters:
            return None
        return self.part(name).flatten()

    def model(self) -> ModelWeights:
        share, spec = self.share, self.spec
        embed = None
        if share.first or (share.last and spec.tied):
            embed = self.part("embed.weight")
            if self.embedding is not None:
                embed = self.embedding.copy_(embed)
            self.embedding = embed
        layers = {i: self.layer(i) for i in share.layers}
        norm = self.norm("final_norm") if share.last else None
        head = None
        if share.last:
            head = self.matrix("head.weight", embed if spec.tied else None)
        return ModelWeights(self.dtype, embed if share.first else None, layers, norm, head)

    def norm(self, name: str) -> NormFunction:
        weight = bias = None
        if f"{name}.weight" in self.parameters:
            weight = self.part(f"{name}.weight")
            bias = self.bias(f"{name}.bias")
        return norm_function(self.spec.norm, self.spec.hidden_size, weight, bias)

    def layer(self, index: int) -> list[tuple[NormFunction, Decoding]]:
        made = []
        for part, sublayer in self.spec.layers[index].present:
            if sublayer.kind not in DECODINGS:
                raise BevatronError(
                    f"layers.{index}.{part} is of kind {sublayer.kind!r}, which nothing decodes: "
                    "add it to bevatron.generate.decoding_sublayers.DECODINGS"
                )
            norm = self.norm(f"layers.{index}.{part}_norm")
            made.append((norm, DECODINGS[sublayer.kind](sublayer, index, part, self)))
        return made


def read_weights(
    opened: Opened,
    share: Share,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    batches: bool,
    int8: bool = False,
    show: bool = False,
) -> ModelWeights:
    """A rank's weights, in `dtype` or in that of most of the stored ones; shows its progress."""
    total = sum(p.numel for p in opened.spec.parameters() if share.holds(p.name)) // share.tp
    read = box_reader(opened.folder, opened.manifest, "model/")
    with progress("loading weights", total, "elements", show=show) as advance:
        return Reader(
            opened.spec,
            share,
            read,
            dtype or DTYPES[opened.dtype],
            device,
            batches=batches,
            int8=int8,
            advance=advance,
        ).model()
