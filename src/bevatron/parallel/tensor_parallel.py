"""Tensor and sequence parallelism: where each parameter is cut, and the communication between.

`TensorParallel` gives `nn` its communication, built from public DTensor calls. Sequence parallel
(Korthikanti et al., arXiv 2205.05198) keeps a share of T between the sublayers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from bevatron.nn.rank_communication import Comm
from bevatron.spec import ModelSpec, ParameterSpec


class TensorParallel(Comm):
    """The ranks of one tensor-parallel group."""

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.mesh = mesh
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.sequence_shares = self.size if sequence_parallel else 1
        self.between: Placement = Shard(1) if sequence_parallel else Replicate()

    def enter(self, x: Tensor) -> Tensor:
        d = DTensor.from_local(x, self.mesh, [self.between], run_check=False)
        return d.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def leave(self, x: Tensor) -> Tensor:
        d = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        return d.redistribute(placements=[self.between]).to_local(grad_placements=[self.between])

    def view(self, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        return parameter.to_local(grad_placements=parameter.placements)

    def shared(self, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        partial = self.sequence_shares > 1
        return parameter.to_local(grad_placements=[Partial() if partial else Replicate()])

    def whole(self, parameter: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        full = parameter.redistribute(placements=[Replicate()])
        return full.to_local(grad_placements=[Partial()])

    def max_(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.mesh.get_group())
        return x

    def sum_(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.mesh.get_group())
        return x


def placement(parameter: ParameterSpec, spec: ModelSpec, tp: int) -> Placement:
    """Where `tp` ranks cut a parameter. What is not cut is replicated."""
    dim = spec.cut(parameter, tp)
    return Replicate() if dim is None else Shard(dim)


def distribute(
    module: nn.Module, names: Mapping[str, tuple[ParameterSpec, ModelSpec]], mesh: DeviceMesh
) -> None:
    """Replace every parameter of `module` by a DTensor over `mesh`. `names`: what each one is, and
    of which model."""
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        place = placement(*names[name], mesh.size())
        cut = distribute_tensor(parameter.data, mesh, [place], src_data_rank=None)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(cut))
