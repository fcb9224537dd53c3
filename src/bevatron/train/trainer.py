"""One rank's share of training: parameters placed, gradients accumulated, clipped and applied.

No files and no loop here; `run.py` has those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bevatron.checkpoint.shard import local
from bevatron.checkpoint.sharded import ReadBox, Saved, load
from bevatron.parallel.gradients import clip, drop, squared_norm
from bevatron.parallel.layout import Layout
from bevatron.parallel.pipeline import Runner
from bevatron.parallel.place import place
from bevatron.parallel.replay import check_replay
from bevatron.parallel.weights import fill_random, load_weights
from bevatron.spec import ModelSpec
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.objectives import Objective, Samples
from bevatron.train.optimizer import AdamW

Shapes = Mapping[str, tuple[int, ...]]
# Whether a step with this loss and gradient norm may update the weights: a function of these two,
# which are the same numbers on every rank, and of what else all ranks share.
Admit = Callable[[float, float], bool]


class Trainer:
    """A spec on a mesh with an optimizer.

    `samples` arguments are this data-parallel rank's part of the global batch, the same on its
    pipeline and tensor ranks.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        mesh: DeviceMesh,
        objective: Objective,
        *,
        seq_len: int,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        device: torch.device,
    ) -> None:
        self.spec, self.layout, self.mesh, self.objective = spec, layout, mesh, objective
        self.device, self.optimizer_config = device, optimizer
        self.precision = train.precision
        self.placed = place(
            spec,
            layout,
            mesh,
            objective.compute,
            device=device,
            precision=train.precision,
            seq_len=seq_len,
            recompute=train.recompute == "full",
            compile_layers=train.compile,
        )
        self.dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.runner = Runner(
            self.placed,
            micro_batch=train.micro_batch,
            seq_len=seq_len,
            count=train.global_batch // (layout.dp * train.micro_batch),
            dtype=self.dtype,
            device=device,
        )
        self.optimizer = AdamW(
            self.placed,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    @property
    def dp_rank(self) -> int:
        """Which part of a global batch is this rank's."""
        replicate = self.mesh.get_local_rank("dp_replicate")
        return int(replicate * self.layout.dp_shard + self.mesh.get_local_rank("dp_shard"))

    @property
    def _reports(self) -> bool:
        """Whether this rank's objective value counts: one rank per part of the batch."""
        return self.placed.is_last and self.mesh.get_local_rank("tp") == 0

    def fill_random(self, seed: int) -> None:
        """Initialise all parameters; the values depend on the seed and the spec alone."""
        fill_random(self.placed, seed)

    def load_weights(self, shapes: Shapes, read: ReadBox) -> None:
        """Fill the parameters from a checkpoint's boxes."""
        load_weights(self.placed, shapes, read)

    def load_optimizer(self, shapes: Shapes, read: ReadBox, step: int) -> None:
        """Fill the moments, and the fp32 masters if the checkpoint's weights are rounded."""
        into = dict(self.optimizer.states())
        if self.dtype != torch.float32:
            parameters = self.placed.by_checkpoint_name().items()
            into |= {f"master/{n}": (p, local(p.detach())) for n, p in parameters}
        load(into, shapes, read)
        self.optimizer.set_step(step)

    def to_save(self) -> list[Saved]:
        """Weights in the run's dtype, moments, and fp32 masters where the weights are rounded."""
        out = []
        states = self.optimizer.states()
        for name, p in self.placed.parameters.items():
            out.append(Saved(f"model/{name}", p, local(p.detach()), self.dtype))
            if self.dtype != torch.float32:
                values = local(p.detach())
                out.append(Saved(f"optimizer/master/{name}", p, values, torch.float32))
            for kind in ("exp_avg", "exp_avg_sq"):
                _, state = states[f"{kind}/{name}"]
                out.append(Saved(f"optimizer/{kind}/{name}", p, state, torch.float32))
        return out

    def step(
        self,
        samples: Samples | None,
        lr: float,
        admit: Admit = lambda loss, norm: True,
        *,
        replay: bool = False,
    ) -> tuple[float, float] | None:
        """One update; returns the loss and the gradient's norm before clipping.

        None if any rank brings no samples, because it was asked to stop: all ranks return together
        and nothing has happened.

        Args:
            admit: decides between gradients and optimizer; without its leave, weights and moments
                stay as they are.
            replay: compute the gradients twice and raise if a bit differs.
        """
        ids, batch, count = self._agreed(samples)
        if ids is None:
            return None
        value = self.runner.step(ids, batch, 1.0 / count)
        if replay:
            check_replay(self.placed, value, lambda: self.runner.step(ids, batch, 1.0 / count))
        loss, squared = self._sums(self._reported(value), squared_norm(self.placed))
        loss, norm = loss / count, math.sqrt(squared)
        if admit(loss, norm):
            clip(self.placed, norm, self.optimizer_config.clip_grad)
            self.optimizer.step(lr)
        else:
            drop(self.placed)
        return loss, norm

    def evaluate(self, samples: Samples | None) -> tuple[float, float] | None:
        """The objective's sum over all ranks' samples, and its count. None as `step` does."""
        ids, batch, count = self._agreed(samples)
        if ids is None:
            return None
        value = self.runner.evaluate(ids, batch)
        return self._sums(self._reported(value))[0], count

    def _agreed(self, samples: Samples | None) -> tuple[Tensor | None, dict[str, Tensor], float]:
        """What the objective makes of the samples, and the count of the global batch; no ids if
        there is a rank that brings none."""
        ids, batch = self.objective.batch(samples) if samples is not None else (None, {})
        # Counted by one rank for each part of the batch, of those that share it.
        counts = self.mesh.get_local_rank("pp") == 0 and self.mesh.get_local_rank("tp") == 0
        own = self.objective.count(batch) if ids is not None and counts else 0
        count, missing = self._sums(*torch.tensor([own, ids is None], dtype=torch.float64))
        return None if missing else ids, batch, count

    def _reported(self, value: Tensor) -> Tensor:
        """The objective's value on the ranks where it counts, else zero."""
        return value if self._reports else torch.zeros_like(value)

    def _sums(self, *values: Tensor) -> list[float]:
        """Sums of scalars over all ranks, in one exchange: the same numbers everywhere."""
        totals = torch.stack([value.to(self.device, torch.float64) for value in values])
        dist.all_reduce(totals)
        return totals.tolist()
