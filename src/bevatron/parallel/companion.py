"""A frozen model that runs beside the one that is trained: a teacher.

It is placed on the same mesh with stages of its own, so its shape may be any. Its parameters are
sharded like the trained ones, in the dtype that the run computes in; they have no gradients and no
optimizer. Before a step it takes the step's micro-batches through its pipeline, and leaves its last
hidden states where the trained model's last stage is: both have it on the same ranks. Hidden states
between its layers are sent to where the trained model's layers are that will be compared with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.save_and_load import box_reader
from bevatron.nn.decoder import EMBEDDING, Tap
from bevatron.nn.output_heads import Vocabulary
from bevatron.nn.rank_communication import Comm
from bevatron.parallel.layout import Layout
from bevatron.parallel.memory_footprint import unsharded
from bevatron.parallel.pipeline import Batch, micro_batches, pass_down
from bevatron.parallel.placed_weights import fill_random, stream
from bevatron.parallel.placement import Placed, Stage, place, reshard
from bevatron.spec import ModelSpec
from bevatron.spec.json import to_json

SAMPLED = 256  # numbers at either end of a tensor that its fingerprint sees


class Companion:
    """Declared by an objective, placed by the trainer, filled by the run.

    Args:
        spec: of a model with a causal_lm head.
        weights: where they lie; None for random ones of `seed`.
        pairs: a layer of the trained model (or EMBEDDING) -> the one here whose hidden states it
            gets.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Opened | None,
        seed: int = 0,
        pairs: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.spec, self.weights, self.seed, self.pairs = spec, weights, seed, pairs
        self._placed: Placed | None = None
        self._caught: dict[int, list[Tensor]] = {}

    @property
    def placed(self) -> Placed:
        assert self._placed is not None, "it was not placed"
        return self._placed

    def place(
        self,
        layout: Layout,
        mesh: DeviceMesh,
        *,
        device: torch.device,
        precision: str,
        seq_len: int,
        micro_batch: int,
        compile_layers: bool,
        stages: Sequence[range] = (),
    ) -> None:
        """Build this rank's stages, without values. A split in `layout` is the trained model's:
        this one's stages are balanced by themselves.

        Args:
            stages: the layers of every stage of the trained model; for `pairs`."""
        self.beside = stages
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.micro_batch = micro_batch
        self._placed = place(
            self.spec,
            replace(layout, split=None),
            mesh,
            None,
            device=device,
            precision=precision,
            seq_len=seq_len,
            micro_batch=micro_batch,
            compile_layers=compile_layers,
            make_tap=self._catch if self.pairs else None,
        )

    def fill(self) -> None:
        """Collective: read this rank's boxes, after checking what can be checked."""
        if self.weights is None:
            fill_random(self.placed, self.seed)
        else:
            stream(self.placed, self.weights)
        if self.placed.tied is not None:
            self.placed.tied.fill_head()

    def run(self, ids: Tensor, batch: Batch) -> dict[int | None, Tensor]:
        """Hidden states [n, T, h] of all micro-batches of ids [n, T]; T is a sequence-parallel
        rank's share. By None those after the final norm, on the ranks with the last stage, which
        keep the head gathered until `release`; by a layer of the trained model, on the ranks that
        have it, those that it is to be compared with."""
        found = []
        with torch.no_grad():
            for part, extra in micro_batches(ids, batch, self.micro_batch):
                out = pass_down(self.placed, part, self.dtype, extra)
                if out is not None:
                    found.append(out)
        states: dict[int | None, Tensor] = {}
        self._hand_over(ids, states)
        if self.placed.is_last:
            module = self._stage if self.spec.tied else self._head
            if isinstance(module, FSDPModule):
                module.unshard()
            states[None] = torch.cat(found)
        return states

    def _catch(self, comm: Comm, spec: ModelSpec, batch: Batch) -> Tap:
        wanted = set(self.pairs.values())

        def tap(layer: int, x: Tensor) -> Tensor:
            if layer in wanted:
                self._caught.setdefault(layer, []).append(x)
            return x

        return tap

    def _hand_over(self, ids: Tensor, states: dict[int | None, Tensor]) -> None:
        """Move what was caught to the ranks that need it, in one order on all of them."""
        placed, group = self.placed, self.placed.mesh.get_group("pp")
        ranks, here = dist.get_process_group_ranks(group), placed.mesh.get_local_rank("pp")
        shares = placed.stage.decoder.comm.sequence_shares
        shape = (ids.shape[0], ids.shape[1] // shares, self.spec.hidden_size)
        caught = {layer: torch.cat(parts) for layer, parts in self._caught.items()}
        self._caught = {}
        for theirs, ours in sorted(self.pairs.items()):
            target = placed.layout.rank_of_stage(_stage_of(self.beside, theirs))
            source = placed.layout.rank_of_stage(_stage_of(placed.stages, ours))
            if here == source == target:
                states[theirs] = caught[ours]
            elif here == source:
                dist.send(caught[ours].contiguous(), ranks[target], group=group)
            elif here == target:
                states[theirs] = torch.empty(shape, dtype=self.dtype, device=ids.device)
                dist.recv(states[theirs], ranks[source], group=group)

    def head(self) -> Tensor:
        """This rank's rows [V/tp, h] of the output matrix, between `run` and `release`."""
        return self._head.comm.view(self._head.weight).detach()

    def release(self) -> None:
        """Forget what is gathered."""
        reshard(self.placed)

    def kept_bytes(self, tokens: int) -> int:
        """What `run` leaves on this rank until `release`, its shards apart: weights that stay
        gathered, and hidden states of `tokens` tokens, this rank's before sequence parallelism cuts
        them."""
        placed, kept = self.placed, 0
        for stage in placed.mine.values():
            for name, parameter in stage.decoder.named_parameters():
                module = name.partition(".")[0]
                dropped = module == "layers" or (module == "embed" and not self.spec.tied)
                if not (dropped and placed.layout.regathers):
                    kept += unsharded(parameter) * parameter.element_size()
        here = placed.mesh.get_local_rank("pp")
        states = {(True, len(self.spec.layers))} if placed.is_last else set()  # the last, normed
        for theirs, ours in self.pairs.items():  # as `_hand_over` moves them
            if here == placed.layout.rank_of_stage(_stage_of(self.beside, theirs)):
                source = placed.layout.rank_of_stage(_stage_of(placed.stages, ours))
                states.add((here == source, ours if here == source else theirs))
        shares = placed.stage.decoder.comm.sequence_shares
        return kept + len(states) * tokens // shares * self.spec.hidden_size * self.dtype.itemsize

    def fingerprint(self) -> str:
        """Of the spec and of numbers at both ends of every tensor: another model, or the same one
        trained on, has another one, while the same one in another format or place has not. Reads
        little; not safe against intent."""
        hasher = hashlib.sha256(to_json(self.spec).encode())
        if self.weights is None:
            hasher.update(f"random {self.seed}".encode())
            return hasher.hexdigest()
        read = box_reader(self.weights.folder, self.weights.manifest, "model/")
        for name, shape in sorted(self.weights.shapes.items()):
            size = (*[1] * (len(shape) - 1), min(shape[-1], SAMPLED))
            last = tuple(n - s for n, s in zip(shape, size, strict=True))
            for offset in ((0,) * len(shape), last):
                values = read(name, offset, size).float().contiguous()
                hasher.update(name.encode() + values.numpy().tobytes())
        return hasher.hexdigest()

    @property
    def _stage(self) -> Stage:
        return self.placed.mine[len(self.placed.stages) - 1]

    @property
    def _head(self) -> Vocabulary:
        head = self.placed.mine[len(self.placed.stages) - 1].decoder.head
        assert isinstance(head, Vocabulary)
        return head


def _stage_of(stages: Sequence[range], layer: int) -> int:
    """The number of the stage that has a layer, or the embedding."""
    if layer == EMBEDDING:
        return 0
    return next(number for number, layers in enumerate(stages) if layer in layers)
