"""Placing a decoder on a mesh, in one visible order.

meta decoder for my stage -> frozen parameters in the run's dtype -> tensor-parallel cut from the
spec -> re-tie -> no gradients for frozen ones -> recompute, compile -> fully_shard (FSDP2), always,
also over one rank -> memory -> (the caller fills it) -> (the caller builds the pipeline stage and
the optimizer)

Parameters are fp32 shards: they are the masters. With precision bf16 or fp16, FSDP gathers them as
such for the forward and the backward, and reduces and accumulates gradients in fp32. Frozen ones
have no masters: their shards are in the dtype that they are gathered in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from bevatron.nn.decoder import (
    EMBEDDING,
    NO_CHOICES,
    NO_VARIANTS,
    Choices,
    Decoder,
    Tap,
    Variants,
)
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.parallel import tensor_parallel
from bevatron.parallel.compile_and_recompute import Recompute, prepare
from bevatron.parallel.context_parallel import ContextParallel, sharding_mesh
from bevatron.parallel.layout import Layout
from bevatron.parallel.stage_split import stage_ranges
from bevatron.parallel.tied_embedding import Tied, tie
from bevatron.spec import ModelSpec, ParameterSpec

Batch = dict[str, Tensor]  # what goes with a micro-batch's token ids, all [B, ...]
# From a micro-batch's tensors to what the last stage computes of its hidden states and the head;
# None for the hidden states themselves.
AtEnd = Callable[[Comm, ModelSpec, Batch], Compute | None]
# From the same to what every stage does between its layers.
MakeTap = Callable[[Comm, ModelSpec, Batch], Tap]
NOTHING: Mapping[str, nn.Parameter] = MappingProxyType({})
VARIANTS = ".variants."  # in the name of a parameter that belongs to one

PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
COMPUTED = {name: dtype for dtype, name in PRECISION.items()}


class Stage(nn.Module):
    """A decoder slice together with what is computed at the end: one FSDP root, one pipeline stage.

    forward(ids or hidden, **batch) -> hidden states, or on the last stage the objective's sums;
    without anything to compute, there too hidden states.

    Attributes:
        at_end, make_tap: the objective's; a call may name others."""

    def __init__(
        self, decoder: Decoder, at_end: AtEnd | None, make_tap: MakeTap | None = None
    ) -> None:
        super().__init__()
        self.decoder, self.at_end, self.make_tap = decoder, at_end, make_tap

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        at_end: AtEnd | None = None,
        tap: Tap | None = None,
        choices: Choices = NO_CHOICES,
        **batch: Tensor,
    ) -> Tensor:
        decoder, at_end, compute = self.decoder, at_end or self.at_end, None
        if decoder.head is not None and at_end is not None:
            compute = at_end(decoder.comm, decoder.spec, batch)
        if tap is None and self.make_tap is not None:
            tap = self.make_tap(decoder.comm, decoder.spec, batch)
        out: Tensor = decoder(
            x, compute, positions=positions, documents=documents, tap=tap, choices=choices
        )
        return out


@dataclass
class Placed:
    """This rank's part of a model.

    Attributes:
        grid: the mesh on which the parameters lie, see `sharding_mesh`. (A DTensor's own may be an
            equal one of an earlier process group: torch caches what it works out per mesh.)
        stages: the layers of every stage of the model, in order.
        mine: this rank's stages, by their numbers, in order.
        parameters: by native name, as DTensors; a tied head's second copy is not among them.
        tied: where a pipeline has the embedding and its tied head on two stages.
        dtype: that it computes in, and in which hidden states travel.
        device: that its parameters are on.
        frozen: placed without anything to train: computed with, never updated.
        added: parameters that are trained along and are no part of the model: plain tensors, whole
            and equal on every rank.
        differentiable: of every stage whether its output has a gradient, which it has not where
            all parameters up to there are frozen.
        variants: this rank's parameters of layers' variants, as DTensors, by the names that
            `variant_parameters` gives; they are neither trained nor saved.
    """

    spec: ModelSpec
    layout: Layout
    mesh: DeviceMesh
    grid: DeviceMesh
    stages: list[range]
    mine: dict[int, Stage]
    parameters: dict[str, Tensor]
    tied: Tied | None
    dtype: torch.dtype
    device: torch.device
    frozen: bool
    added: Mapping[str, nn.Parameter] = field(default_factory=dict)
    differentiable: tuple[bool, ...] = ()
    variants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """This rank's first stage: its only one but for schedules with several."""
        return next(iter(self.mine.values()))

    @property
    def is_first(self) -> bool:
        """Whether this rank has the embedding."""
        return 0 in self.mine

    @property
    def is_last(self) -> bool:
        """Whether this rank has the head, and so the loss."""
        return len(self.stages) - 1 in self.mine

    @property
    def reports(self) -> bool:
        """Whether what this rank finds at the end counts: one rank does for each of the tokens."""
        return self.is_last and self.mesh.get_local_rank("tp") == 0

    @property
    def dp_rank(self) -> int:
        """Which part of a global batch is this rank's."""
        replicate = self.mesh.get_local_rank("dp_replicate")
        return int(replicate * self.layout.dp_shard + self.mesh.get_local_rank("dp_shard"))

    def stage_of(self, layer: int) -> int:
        """The number of the stage that has a layer, or the embedding."""
        return stage_of(self.stages, layer)

    @property
    def trained(self) -> dict[str, Tensor]:
        """Every parameter that this rank updates, by name."""
        return {n: p for n, p in self.parameters.items() if p.requires_grad} | dict(self.added)


def stage_of(stages: Sequence[range], layer: int) -> int:
    """The number of the stage that has a layer, or the embedding."""
    if layer == EMBEDDING:
        return 0
    return next(number for number, layers in enumerate(stages) if layer in layers)


def place(
    spec: ModelSpec,
    layout: Layout,
    mesh: DeviceMesh,
    at_end: AtEnd | None,
    *,
    device: torch.device,
    precision: str,
    seq_len: int,
    micro_batch: int = 1,
    recompute: Recompute = "none",
    compile_layers: bool = False,
    make_tap: MakeTap | None = None,
    added: Mapping[str, nn.Parameter] = NOTHING,
    freeze: Collection[str] = (),
    variants: Variants = NO_VARIANTS,
) -> Placed:
    """Build this rank's stages with uninitialised parameters; see the module's docstring.

    Args:
        at_end: None for a frozen model that gives its hidden states: its parameters are
            stored in the dtype of `precision` and take no gradients.
        seq_len, micro_batch: of a micro-batch, for the balance of the stages.
        added: parameters that taps use, and give their gradients themselves.
        freeze: names of parameters that take no gradients either.
        variants: what else some layers may be in a forward that chooses; they take no gradients.
    """
    # FSDP2 warns that the embedding's output is a view: nothing here adds to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    stages = stage_ranges(spec, layout, seq_len, micro_batch=micro_batch, recompute=recompute)
    grid = sharding_mesh(mesh, layout)  # where parameters lie
    frozen, dtype = at_end is None, COMPUTED[precision]
    comm = Comm()
    if layout.tp > 1:
        comm = tensor_parallel.TensorParallel(grid["tp"], layout.sequence_parallel)
    if layout.cp > 1:
        comm.context = ContextParallel(mesh["cp"])
    known = {p.name: (p, spec) for p in spec.parameters()}
    held = set(known) if frozen else set(freeze)
    differentiable = _differentiable(stages, known.keys() - held)
    others = variant_parameters(spec, variants)
    known |= others
    held |= set(others)
    if spec.tied:
        known["head.weight"] = _tied_head(spec), spec
        held |= {"head.weight"} if "embed.weight" in held else set()
    mine: dict[int, Stage] = {}
    parameters: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for number in layout.stages_of_rank(mesh.get_local_rank("pp")):
        first, last = number == 0, number == len(stages) - 1
        with torch.device("meta"):
            decoder = Decoder(
                spec, layers=stages[number], embed=first, head=last, comm=comm, variants=variants
            )
        still = [(n, p) for n, p in decoder.named_parameters() if n in held]
        for _, parameter in still:  # while they are no DTensors: those keep their dtype
            parameter.data = parameter.data.to(dtype)
        if layout.tp > 1:
            tensor_parallel.distribute(decoder, known, grid["tp"])
            decoder.tie()
        for name, _ in still:
            decoder.get_parameter(name).requires_grad_(False)
        prepare(decoder, recompute, compile_layers)
        stage = Stage(decoder, at_end, make_tap)
        shard(stage, layout, grid, "fp32" if frozen else precision)
        stage.to_empty(device=device)
        decoder.tie()
        mine[number] = stage
        for name, parameter in decoder.named_parameters():
            (own if VARIANTS in name else parameters)[name] = parameter
    tied = None
    if spec.tied and layout.pp > 1:
        tied = tie(
            layout, mesh, parameters.get("embed.weight"), parameters.pop("head.weight", None)
        )
    return Placed(
        spec,
        layout,
        mesh,
        grid,
        stages,
        mine,
        parameters,
        tied,
        dtype,
        device,
        frozen,
        added,
        differentiable,
        own,
    )


def _differentiable(stages: list[range], trained: Collection[str]) -> tuple[bool, ...]:
    """See `Placed`. `trained`: names of the parameters that are not frozen."""
    first = 0
    if "embed.weight" not in trained:
        layers = {int(name.split(".")[1]) for name in trained if name.startswith("layers.")}
        has_one = (number for number, stage in enumerate(stages) if layers & set(stage))
        first = next(has_one, len(stages) - 1)  # what comes behind the layers is on the last
    return tuple(number >= first for number in range(len(stages)))


def variant_parameters(
    spec: ModelSpec, variants: Variants
) -> dict[str, tuple[ParameterSpec, ModelSpec]]:
    """The parameters of layers' variants, `layers.3.variants.narrow.mlp.up.weight`: each as what it
    is, `layers.3.mlp.up.weight`, of the model with that variant in the layer's place."""
    found = {}
    for i, layers in variants.items():
        for name, layer in layers.items():
            model = replace(spec, layers=(*spec.layers[:i], layer, *spec.layers[i + 1 :]))
            for p in model.layer_parameters(i):
                rest = p.name.removeprefix(f"layers.{i}.")
                found[f"layers.{i}{VARIANTS}{name}.{rest}"] = p, model
    return found


def shard(stage: Stage, layout: Layout, mesh: DeviceMesh, precision: str) -> None:
    """fully_shard every layer, embedding and head (tied ones with the root), the root last."""
    over = mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision != "fp32":
        gathered = COMPUTED[precision]
        policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    # [2, f, h] has too short a first dimension. Along f a rank's part is two long runs of a file,
    # along h a piece of every row; FSDP cuts either only evenly.
    cut = {}
    for parameter in stage.parameters():
        if parameter.ndim == 3:
            _, f, h = parameter.shape
            if f % (layout.tp * layout.shards) == 0:
                cut[id(parameter)] = Shard(1)
            elif h % layout.shards == 0:
                cut[id(parameter)] = Shard(2)

    def dimension(parameter: nn.Parameter) -> Shard:
        return cut.get(id(parameter), Shard(0))

    decoder = stage.decoder
    own: list[nn.Module | None] = [*decoder.variants(), *decoder.layers.values()]
    if not decoder.spec.tied:
        own += [decoder.embed, decoder.head]
    for module in [*own, stage]:
        if module is not None and (module is stage or any(True for _ in module.parameters())):
            # What the backward needs first is not dropped at the end of the forward.
            drop = layout.regathers and module is not stage and module is not decoder.head
            fully_shard(
                module,
                mesh=over,
                mp_policy=policy,
                shard_placement_fn=dimension,
                reshard_after_forward=drop,
            )
    for variant in decoder.variants():  # gathered only where a forward chooses it
        for method in ("attend", "feed"):
            register_fsdp_forward_method(variant, method)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the loss is divided by the global count. (gloo has only plain sums.)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(placed: Placed, keep: FSDPModule | None = None) -> None:
    """After a forward that no backward follows: the next one must gather what the parameters have
    become by then. `keep`: one whose own parameters stay gathered."""
    for stage in placed.mine.values():
        for module in stage.modules():
            if isinstance(module, FSDPModule) and module is not keep:
                module.reshard()


def _tied_head(spec: ModelSpec) -> ParameterSpec:
    shape = (spec.vocab_size, spec.hidden_size)
    return ParameterSpec("head.weight", shape, "head", ("other", "hidden"))
