"""A frozen model that runs beside the one that is trained: a teacher.

It is placed on the same mesh with stages of its own, so its shape may be any. Its parameters are
sharded like the trained ones, in the dtype that the run computes in; they have no gradients and no
optimizer. Before a step it takes the step's micro-batches through its pipeline, and leaves its last
hidden states where the trained model's last stage is: both have it on the same ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from bevatron.bridge.opened import Opened
from bevatron.checkpoint.sharded import box_reader
from bevatron.nn.heads import Vocabulary
from bevatron.parallel.footprint import unsharded
from bevatron.parallel.layout import Layout
from bevatron.parallel.pipeline import Batch, micro_batches, pass_down
from bevatron.parallel.place import Placed, Stage, place, reshard
from bevatron.parallel.weights import fill_random, stream
from bevatron.spec import ModelSpec
from bevatron.spec.json import to_json

SAMPLED = 256  # numbers at either end of a tensor that its fingerprint sees


class Companion:
    """Declared by an objective, placed by the trainer, filled by the run.

    Args:
        spec: of a model with a causal_lm head.
        weights: where they lie; None for random ones of `seed`.
    """

    def __init__(self, spec: ModelSpec, weights: Opened | None, seed: int = 0) -> None:
        self.spec, self.weights, self.seed = spec, weights, seed
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
    ) -> None:
        """Build this rank's stages, without values. A split in `layout` is the trained model's:
        this one's stages are balanced by themselves."""
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
        )

    def fill(self) -> None:
        """Collective: read this rank's boxes, after checking what can be checked."""
        if self.weights is None:
            fill_random(self.placed, self.seed)
        else:
            stream(self.placed, self.weights)
        if self.placed.tied is not None:
            self.placed.tied.fill_head()

    def run(self, ids: Tensor, batch: Batch) -> Tensor | None:
        """The hidden states [n, T, h] after the final norm of all micro-batches of ids [n, T], on
        the ranks with the last stage; T is a sequence-parallel rank's share. Until `release`, those
        ranks keep the head gathered."""
        found = []
        with torch.no_grad():
            for part, extra in micro_batches(ids, batch, self.micro_batch):
                out = pass_down(self.placed, part, self.dtype, extra)
                if out is not None:
                    found.append(out)
        if not self.placed.is_last:
            return None
        module = self._stage if self.spec.tied else self._head
        if isinstance(module, FSDPModule):
            module.unshard()
        return torch.cat(found)

    def head(self) -> Tensor:
        """This rank's rows [V/tp, h] of the output matrix, between `run` and `release`."""
        return self._head.comm.view(self._head.weight).detach()

    def release(self) -> None:
        """Forget what is gathered."""
        reshard(self.placed)

    def kept_bytes(self, tokens: int) -> int:
        """What `run` leaves on this rank until `release`, its shards apart: weights that stay
        gathered, and on the last stage the hidden states of `tokens` tokens, this rank's before
        sequence parallelism cuts them."""
        placed, kept = self.placed, 0
        for stage in placed.mine.values():
            for name, parameter in stage.decoder.named_parameters():
                module = name.partition(".")[0]
                dropped = module == "layers" or (module == "embed" and not self.spec.tied)
                if not (dropped and placed.layout.regathers):
                    kept += unsharded(parameter) * parameter.element_size()
        if placed.is_last:
            shares = self._stage.decoder.comm.sequence_shares
            kept += tokens // shares * self.spec.hidden_size * self.dtype.itemsize
        return kept

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
