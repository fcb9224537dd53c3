"""Placing a decoder on a mesh, in one visible order.

meta decoder for my stage -> tensor-parallel cut from the spec -> re-tie -> recompute, compile
-> fully_shard (FSDP2), always, also over one rank -> memory -> (the caller fills it)
-> (the caller builds the pipeline stage and the optimizer)

Parameters are fp32 shards: they are the masters. With precision bf16 or fp16, FSDP gathers them as
such for the forward and the backward, and reduces and accumulates gradients in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from bevatron.checkpoint.shard import local
from bevatron.nn.comm import LOCAL, Comm
from bevatron.nn.decoder import Decoder
from bevatron.nn.heads import Compute
from bevatron.parallel import tensor as tensor_parallel
from bevatron.parallel.layout import Layout
from bevatron.parallel.split import given, layer_cost, split
from bevatron.spec import ModelSpec, ParameterSpec

# From a micro-batch's tensors to what the last stage computes with its hidden states.
MakeCompute = Callable[[Comm, ModelSpec, dict[str, Tensor]], Compute]


class Stage(nn.Module):
    """A decoder slice together with what is computed at the end: one FSDP root, one pipeline stage.

    forward(ids or hidden, **batch) -> hidden states, or on the last stage the objective's sums."""

    def __init__(self, decoder: Decoder, make_compute: MakeCompute) -> None:
        super().__init__()
        self.decoder, self.make_compute = decoder, make_compute

    def forward(self, x: Tensor, positions: Tensor | None = None, **batch: Tensor) -> Tensor:
        decoder = self.decoder
        if decoder.head is None:
            return decoder(x, positions=positions)  # type: ignore[no-any-return]
        compute = self.make_compute(decoder.comm, decoder.spec, batch)
        return decoder(x, compute, positions=positions)  # type: ignore[no-any-return]


@dataclass
class Placed:
    """This rank's part of a model.

    Attributes:
        parameters: by native name, as DTensors; a tied head's second copy is not among them.
        tied: under a pipeline, this rank's copy of the embedding (first stage) or head (last
            stage) whose gradients must be summed, and the two-rank group that holds both.
    """

    spec: ModelSpec
    layout: Layout
    mesh: DeviceMesh
    stages: list[range]
    stage: Stage
    parameters: dict[str, Tensor]
    tied: tuple[Tensor, dist.ProcessGroup] | None

    @property
    def pp_rank(self) -> int:
        return self.mesh.get_local_rank("pp")

    @property
    def is_first(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def has_tied_copy(self) -> bool:
        """Whether this rank holds a second copy, to be counted and saved by the first stage."""
        return self.tied is not None and not self.is_first

    def trainable(self) -> list[Tensor]:
        """Every parameter that this rank updates, a tied second copy included, last."""
        own = list(self.parameters.values())
        return [*own, self.tied[0]] if self.has_tied_copy and self.tied else own

    def by_checkpoint_name(self) -> dict[str, Tensor]:
        """What a load must fill: as `parameters`, with a tied second copy under its first name."""
        extra = {"embed.weight": self.tied[0]} if self.has_tied_copy and self.tied else {}
        return {**self.parameters, **extra}


def stage_ranges(spec: ModelSpec, layout: Layout, seq_len: int) -> list[range]:
    """Layers of every stage, as the user wrote them or balanced by FLOPs."""
    if layout.split is not None:
        return given(layout.split, len(spec.layers), layout.pp)
    costs = [layer_cost(spec, i, seq_len) for i in range(len(spec.layers))]
    return split(costs, layout.pp, last=2.0 * spec.head_rows * spec.hidden_size)


def place(
    spec: ModelSpec,
    layout: Layout,
    mesh: DeviceMesh,
    make_compute: MakeCompute,
    *,
    device: torch.device,
    precision: str,
    seq_len: int,
    recompute: bool = False,
    compile_layers: bool = False,
) -> Placed:
    """Build this rank's stage with uninitialised parameters; see the module's docstring."""
    stages = stage_ranges(spec, layout, seq_len)
    rank = mesh.get_local_rank("pp")
    first, last = rank == 0, rank == layout.pp - 1
    comm: Comm = LOCAL
    if layout.tp > 1:
        comm = tensor_parallel.TensorParallel(mesh["tp"], layout.sequence_parallel)
    with torch.device("meta"):
        decoder = Decoder(spec, layers=stages[rank], embed=first, head=last, comm=comm)
    known = {p.name: p for p in spec.parameters()}
    if spec.tied:
        known["head.weight"] = _tied_head(spec)
    if layout.tp > 1:
        tensor_parallel.distribute(decoder, known, spec, mesh["tp"])
        decoder.tie()
    for layer in decoder.layers.values():
        layer.recompute = recompute  # type: ignore[assignment]
        if compile_layers:
            layer.run = torch.compile(layer.run, dynamic=False)  # type: ignore[assignment, arg-type]
    stage = Stage(decoder, make_compute)
    shard(stage, layout, mesh, precision)
    stage.to_empty(device=device)
    decoder.tie()
    parameters: dict[str, Tensor] = dict(decoder.named_parameters())
    tied = None
    if spec.tied and layout.pp > 1:
        group = _tied_group(mesh)
        if first or last:
            name = "embed.weight" if first else "head.weight"
            copy = parameters[name] if first else parameters.pop(name)
            assert group is not None
            tied = (copy, group)
    return Placed(spec, layout, mesh, stages, stage, parameters, tied)


def shard(stage: Stage, layout: Layout, mesh: DeviceMesh, precision: str) -> None:
    """fully_shard every layer, embedding and head (tied ones with the root), the root last."""
    over = mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision != "fp32":
        gathered = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    # [2, f, h] has too short a first dimension. Along f a rank's part is two long runs of a file,
    # along h a piece of every row; FSDP cuts either only evenly.
    cut = {}
    for name, parameter in stage.named_parameters():
        if name.endswith("gate_up.weight"):
            _, f, h = parameter.shape
            if f % (layout.tp * layout.dp_shard) == 0:
                cut[id(parameter)] = Shard(1)
            elif h % layout.dp_shard == 0:
                cut[id(parameter)] = Shard(2)

    def dimension(parameter: nn.Parameter) -> Shard:
        return cut.get(id(parameter), Shard(0))

    # Under a pipeline, gathered parameters are kept until the backward of the same micro-batch:
    # resharding would gather them once per micro-batch (and breaks zero-bubble schedules).
    options: dict[str, Any] = {"mesh": over, "mp_policy": policy, "shard_placement_fn": dimension}
    options["reshard_after_forward"] = layout.pp == 1
    decoder = stage.decoder
    own: list[nn.Module | None] = list(decoder.layers.values())
    if not decoder.spec.tied:
        own += [decoder.embed, decoder.head]
    for module in [*own, stage]:
        if module is not None and (module is stage or any(True for _ in module.parameters())):
            fully_shard(module, **options)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the loss is divided by the global count. (gloo has only plain sums.)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(stage: Stage) -> None:
    """After a forward that no backward follows: the next one must gather what the parameters have
    become by then."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _tied_head(spec: ModelSpec) -> ParameterSpec:
    return ParameterSpec("head.weight", (spec.vocab_size, spec.hidden_size), "head")


def _tied_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of the first and last stage at this rank's other coordinates.

    All ranks create all groups in the same order, as torch.distributed requires."""
    mine = None
    grid = mesh.mesh.flatten(1)  # [pp, everything else]
    for column in range(grid.shape[1]):
        ranks = [int(grid[0, column]), int(grid[-1, column])]
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def sum_tied_gradients(placed: Placed) -> None:
    """Give both copies of a tied embedding the sum of their gradients. No effect without one."""
    if placed.tied is not None:
        parameter, group = placed.tied
        assert parameter.grad is not None
        dist.all_reduce(local(parameter.grad), group=group)
