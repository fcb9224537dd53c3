"""One rank's share of training: parameters placed, gradients accumulated, clipped and applied.

No files and no loop here; `run.py` has those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bevatron.checkpoint.shard import local
from bevatron.checkpoint.sharded import ReadBox, Saved, load
from bevatron.parallel.gradients import clip, global_norm
from bevatron.parallel.layout import Layout
from bevatron.parallel.pipeline import Runner
from bevatron.parallel.place import place
from bevatron.parallel.weights import fill_random, load_weights
from bevatron.spec import ModelSpec
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.objectives import Objective, Samples, Vector
from bevatron.train.optimizer import AdamW

Shapes = Mapping[str, tuple[int, ...]]


class Trainer:
    """A spec on a mesh with an optimizer.

    `reported`: what the objective says of the last step, its loss and metrics over the whole batch.

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
            entries=objective.entries,
        )
        self.reported: dict[str, float] = {}
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

    def step(self, samples: Samples, lr: float) -> tuple[float, float]:
        """One update; returns the loss and the gradient's norm before clipping."""
        ids, batch = self.objective.batch(samples)
        counts = self._total(self.objective.count(batch))
        scale = torch.tensor(1 / counts.clip(1), dtype=torch.float32, device=self.device)
        sums = self.runner.step(ids, batch, scale)
        norm = global_norm(self.placed)
        clip(self.placed, norm, self.optimizer_config.clip_grad)
        self.optimizer.step(lr)
        found = self.objective.report(self._sum(sums), counts)
        self.reported = {name: float(value) for name, value in found.items()}
        return self.reported["loss"], norm

    def evaluate(self, samples: Samples) -> tuple[Vector, Vector]:
        """The objective's sums over all ranks' samples, and their counts; both add up over batches
        to what `objective.report` takes."""
        ids, batch = self.objective.batch(samples)
        sums = self.runner.evaluate(ids, batch)
        return self._sum(sums), self._total(self.objective.count(batch))

    def _total(self, counts: Sequence[int]) -> Vector:
        """Sum over the data-parallel ranks of numbers that each part's other ranks share."""
        first = self.mesh.get_local_rank("pp") == 0 and self.mesh.get_local_rank("tp") == 0
        total = torch.tensor(counts, dtype=torch.float64, device=self.device)
        return self._reduced(total if first else torch.zeros_like(total))

    def _sum(self, sums: Tensor) -> Vector:
        total = sums.double()
        return self._reduced(total if self._reports else torch.zeros_like(total))

    def _reduced(self, total: Tensor) -> Vector:
        dist.all_reduce(total)
        out: Vector = total.cpu().numpy()
        return out
