"""A frozen model that runs beside the one that is trained: a teacher, a reference, a reward model.

A companion is placed on the same mesh with stages of its own, so it may have any shape. Its
parameters are sharded like the trained ones, in the dtype that the run computes in; they have no
gradients and no optimizer. Before a step the companion runs the step's micro-batches through its
pipeline. What was asked of it, and nothing more, stays on the ranks that hold the last stage, which
are the same for both models. Hidden states between its layers are sent to the ranks that hold the
layers of the trained model that they will be compared with. `forward_pass.py` says what can be
asked for, and who asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from bevatron.bridge.adapter_base import model_fingerprint
from bevatron.bridge.open_weights import Opened
from bevatron.nn.output_heads import Vocabulary
from bevatron.parallel.forward_pass import forward, hidden_states, joined, micro_batches
from bevatron.parallel.layout import Layout
from bevatron.parallel.memory_footprint import local_bytes, unsharded
from bevatron.parallel.placed_weights import fill_random, stream
from bevatron.parallel.placement import AtEnd, Batch, Placed, Stage, place, reshard, stage_of
from bevatron.spec import ModelSpec
from bevatron.spec.json import to_json


class Companion:
    """Declared by an objective, placed by the trainer, filled by the run.

    Args:
        spec: its head is what `at_end` needs: a causal_lm one for hidden states.
        weights: where they lie; None for random ones of `seed`.
        pairs: a layer of the trained model (or EMBEDDING) -> the one here whose hidden states it
            gets.
        at_end: what is asked of its last hidden states and its head; None for nothing, and then its
            stages beyond the last layer of `pairs` do not run.

    Attributes:
        of_batches: whether it runs every step's micro-batches. One that does not is asked by
            whoever declared it, and may read other token ids.
    """

    of_batches: ClassVar[bool] = True

    def __init__(
        self,
        spec: ModelSpec,
        weights: Opened | None,
        seed: int = 0,
        pairs: Mapping[int, int] = MappingProxyType({}),
        at_end: AtEnd | None = hidden_states,
    ) -> None:
        self.spec, self.weights, self.seed, self.pairs = spec, weights, seed, pairs
        self.at_end = at_end
        self._placed: Placed | None = None

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
        beside: Placed | None = None,
    ) -> None:
        """Build this rank's stages, without values. A split in `layout` is the trained model's:
        this one's stages are balanced by themselves.

        Args:
            stages: the layers of every stage of the trained model; for `pairs`.
            beside: the trained model, of which this one needs nothing."""
        self.beside, self.micro_batch = stages, micro_batch
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
        )

    def fill(self) -> None:
        """Collective: read this rank's boxes, after checking what can be checked."""
        if self.weights is None:
            fill_random(self.placed, self.seed)
        else:
            stream(self.placed, self.weights)
        if self.placed.tied is not None:
            self.placed.tied.fill_head()

    def run(self, ids: Tensor, batch: Batch, name: str) -> Batch:
        """What is asked of all micro-batches of ids [n, T], for a batch to hold: by `name` what was
        computed at the end, [n, ...], on the ranks with the last stage (by `name.part` of several
        things); by `name.layer` of a layer of the trained model, on the ranks that have it, the
        hidden states [n, T, h] that it is to be compared with; T is a sequence-parallel rank's
        share. Hidden states of the end leave the head gathered until `release`."""
        placed, ends = self.placed, self.at_end is not None
        keep = self._head_holder if placed.is_last and self._leaves_head else None
        parts, wanted = micro_batches(ids, batch, self.micro_batch), set(self.pairs.values())
        found = list(forward(placed, parts, self.at_end, layers=wanted, ends=ends, keep=keep))
        caught = {i: torch.cat([f.layers[i] for f in found]) for i in found[0].layers}
        moved = self._hand_over(ids, caught)
        out = {f"{name}.{layer}": states for layer, states in moved.items()}
        if keep is not None:
            keep.unshard()
        if placed.is_last and ends:
            end = joined([f.end for f in found])
            several = isinstance(end, dict)
            out |= {f"{name}.{k}": v for k, v in end.items()} if several else {name: end}
        return out

    def _hand_over(self, ids: Tensor, caught: dict[int, Tensor]) -> dict[int, Tensor]:
        """Move what was caught to the ranks that need it, in one order on all of them."""
        placed, group = self.placed, self.placed.mesh.get_group("pp")
        ranks, here = dist.get_process_group_ranks(group), placed.mesh.get_local_rank("pp")
        shares = placed.stage.decoder.comm.sequence_shares
        shape = (ids.shape[0], ids.shape[1] // shares, self.spec.hidden_size)
        states: dict[int, Tensor] = {}
        for theirs, ours in sorted(self.pairs.items()):
            source, target = self._way(theirs, ours)
            if here == source == target:
                states[theirs] = caught[ours]
            elif here == source:
                dist.send(caught[ours].contiguous(), ranks[target], group=group)
            elif here == target:
                states[theirs] = torch.empty(shape, dtype=placed.dtype, device=ids.device)
                dist.recv(states[theirs], ranks[source], group=group)
        return states

    def _way(self, theirs: int, ours: int) -> tuple[int, int]:
        """Of a pair, the pp ranks that have our layer and theirs."""
        rank_of, stages = self.placed.layout.rank_of_stage, self.placed.stages
        return rank_of(stage_of(stages, ours)), rank_of(stage_of(self.beside, theirs))

    def head(self) -> Tensor:
        """This rank's rows [V/tp, h] of the output matrix, between `run` and `release`."""
        return self._head.comm.view(self._head.weight).detach()

    def release(self) -> None:
        """Forget what is gathered."""
        reshard(self.placed)

    def held_bytes(self) -> int:
        """Its shards on this rank."""
        decoders = [stage.decoder for stage in self.placed.mine.values()]
        return sum(local_bytes(list(decoder.parameters())) for decoder in decoders)

    def forget(self) -> None:
        """Give up the parameters; it may be placed again."""
        self._placed = None

    def kept_bytes(self, tokens: int) -> int:
        """What `run` leaves on this rank until `release`, its shards apart: the head, gathered, and
        hidden states of `tokens` tokens, this rank's before sequence parallelism cuts them. (What
        else can be asked for is a few bytes a token and not counted.)"""
        placed, kept = self.placed, 0
        states = set()
        if placed.is_last and self._leaves_head:
            states.add((True, len(self.spec.layers)))  # the last, normed
            for name, parameter in self._stage.decoder.named_parameters():
                module = name.partition(".")[0]
                if module == "head" or (self.spec.tied and module != "layers"):
                    kept += unsharded(parameter) * parameter.element_size()
        here = placed.mesh.get_local_rank("pp")
        for theirs, ours in self.pairs.items():  # as `_hand_over` moves them
            source, target = self._way(theirs, ours)
            if here == target:
                states.add((here == source, ours if here == source else theirs))
        shares = placed.stage.decoder.comm.sequence_shares
        return kept + len(states) * tokens // shares * self.spec.hidden_size * placed.dtype.itemsize

    def fingerprint(self) -> str:
        """See `model_fingerprint`."""
        if self.weights is None:
            text = to_json(self.spec) + f"random {self.seed}"
            return hashlib.sha256(text.encode()).hexdigest()
        return model_fingerprint(self.spec, self.weights.folder, self.weights.manifest)

    @property
    def _stage(self) -> Stage:
        return self.placed.mine[len(self.placed.stages) - 1]

    @property
    def _head(self) -> Vocabulary:
        head = self._stage.decoder.head
        assert isinstance(head, Vocabulary)
        return head

    @property
    def _head_holder(self) -> FSDPModule:
        """What FSDP gathers the head's weight with."""
        module = self._stage if self.spec.tied else self._head
        assert isinstance(module, FSDPModule)
        return module

    @property
    def _leaves_head(self) -> bool:
        return self.at_end is hidden_states
