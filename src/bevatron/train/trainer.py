"""One rank's share of training: parameters placed, gradients accumulated, clipped and applied.

There are no files and no loop here: `training_loop.py` has both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bevatron.checkpoint.rank_boxes import local
from bevatron.checkpoint.save_and_load import ReadBox, Saved, load
from bevatron.parallel.adapter_weights import fill_magnitudes
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.parallel.gradients import clip, drop, squared_norm
from bevatron.parallel.layout import Layout
from bevatron.parallel.pipeline import Runner
from bevatron.parallel.placed_weights import fill_random, load_weights
from bevatron.parallel.placement import NOTHING, place
from bevatron.parallel.replayed_step import check_replay
from bevatron.spec import ModelSpec
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.freezing import frozen_parameters
from bevatron.train.objectives import Objective, Samples, Vector
from bevatron.train.optimizer_and_schedule import NONE_LATER, make_optimizer

Shapes = Mapping[str, tuple[int, ...]]
# Whether a step with this loss and gradient norm may update the weights: a function of these two,
# which are the same numbers on every rank, and of what else all ranks share.
Admit = Callable[[float, float], bool]


class Trainer:
    """A spec on a mesh with an optimizer.

    `reported`: what the objective says of the last step, its loss and metrics over the whole batch.

    `samples` arguments are this data-parallel rank's part of the global batch, the same on its
    pipeline, context- and tensor-parallel ranks.
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
        self.precision, self.taps = train.precision, objective.taps
        if self.taps is not None:
            self.taps.place(device)
        self.frozen = frozen_parameters(spec, train.freeze)
        micro_batch = train.micro_batch * objective.rows  # sequences
        self.placed = place(
            spec,
            layout,
            mesh,
            objective.compute,
            device=device,
            precision=train.precision,
            seq_len=seq_len,
            micro_batch=micro_batch,
            recompute=train.recompute,
            compile_layers=train.compile,
            make_tap=self.taps.tap if self.taps is not None else None,
            added=self.taps.parameters if self.taps is not None else NOTHING,
            freeze=self.frozen,
        )
        for companion in objective.companions.values():
            companion.place(
                layout,
                mesh,
                device=device,
                precision=train.precision,
                seq_len=seq_len,
                micro_batch=micro_batch,
                compile_layers=train.compile,
                stages=self.placed.stages,
                beside=self.placed,
            )
        self.runner = Runner(
            self.placed,
            micro_batch=micro_batch,
            seq_len=seq_len // layout.cp,
            count=train.global_batch // (layout.dp * train.micro_batch),
            entries=objective.entries,
            largest=getattr(objective, "largest", 0),
        )
        self.reported: dict[str, float] = {}
        self.optimizer = make_optimizer(self.placed, optimizer, self.placed.dtype)

    def fill_random(self, seed: int) -> None:
        """Initialise all parameters; the values depend on the seed and the spec alone."""
        fill_random(self.placed, seed)
        fill_magnitudes(self.placed, self.placed.parameters)
        self.fill_added(seed)

    def fill_added(self, seed: int) -> None:
        """Initialise the parameters that are no part of the model."""
        if self.taps is not None:
            self.taps.fill(seed)

    def fill_companions(self) -> None:
        """Fill the objective's frozen models. Collective."""
        for companion in self.objective.companions.values():
            companion.fill()

    def load_weights(self, shapes: Shapes, read: ReadBox) -> None:
        """Fill the parameters from a checkpoint's boxes."""
        load_weights(self.placed, shapes, read)

    def load_optimizer(
        self,
        shapes: Shapes,
        read: ReadBox,
        step: int,
        *,
        fresh: bool = False,
        later: Mapping[str, int] = NONE_LATER,
    ) -> None:
        """Fill the optimizer's states after `step` updates (`fresh`: as before its first), the
        parameters from their fp32 masters wherever the checkpoint has these (its weights are
        rounded then), and the parameters that are no part of the model, if it has them.

        Args:
            later: how many updates parameters have had that were frozen before; 0: states as
                before their first."""
        into = {}
        for name, (parameter, values) in self.optimizer.states().items():
            if fresh or later.get(name.partition("/")[2]) == 0:
                values.zero_()
            else:
                into[name] = parameter, values
        into |= {f"master/{n}": (p, p.detach()) for n, p in self.placed.added.items()}
        for name in [n for n in into if n.partition("/")[2] in self.placed.added]:
            if name not in shapes:  # of a run that had none
                del into[name]
        for name, parameter in self.placed.parameters.items():
            if f"master/{name}" in shapes:
                into[f"master/{name}"] = parameter, local(parameter.detach())
        load(into, shapes, read, "loading the optimizer" if dist.get_rank() == 0 else None)
        self.optimizer.set_step(step, later)

    def to_save(self) -> list[Saved]:
        """Weights (with an adapter, its own) in the run's dtype, the optimizer's states, and fp32
        masters where the weights are rounded and trained. What is no part of the model is among
        the latter, from the first rank."""
        out, kept = [], set(self.placed.parameters)
        if dist.get_rank() == 0:
            kept |= set(self.placed.added)
            for name, whole in self.placed.added.items():
                values = whole.detach()
                out.append(Saved(f"optimizer/master/{name}", whole, values, torch.float32))
        adapter = self.spec.adapter
        for name, p in self.placed.parameters.items():
            if adapter is not None and not adapter.owns(name):
                continue  # it stays as it is in the base
            out.append(Saved(f"model/{name}", p, local(p.detach()), self.placed.dtype))
            if self.placed.dtype != torch.float32 and p.requires_grad:
                values = local(p.detach())
                out.append(Saved(f"optimizer/master/{name}", p, values, torch.float32))
        for name, (p, values) in self.optimizer.states().items():
            if name.partition("/")[2] in kept:
                out.append(Saved(f"optimizer/{name}", p, values, torch.float32))
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
        ids, batch, counts = self._agreed(samples)
        if ids is None:
            return None
        scale = torch.tensor(1 / counts.clip(1), dtype=torch.float32, device=self.device)
        with self._accompanied(ids, batch) as whole:
            if self.taps is not None and self.taps.unsettled:
                sums = self._tapped(counts, lambda: self.runner.evaluate(ids, whole))
                self.objective.settle(self._sums(self._counted(sums)), counts)

            def compute() -> Tensor:
                return self._tapped(counts, lambda: self.runner.step(ids, whole, scale))

            sums = compute()
            if replay:
                check_replay(self.placed, sums, compute)
        own = self._counted(sums)
        *added, squared = self._sums(own, squared_norm(self.placed)[None])
        totals = self._with_largest(np.array(added), own)
        found = self.objective.report(totals, counts)
        self.reported = {name: float(value) for name, value in found.items()}
        loss, norm = self.reported["loss"], math.sqrt(squared)
        if admit(loss, norm):
            clip(self.placed, norm, self.optimizer_config.clip_grad)
            self.optimizer.step(lr)
            self.objective.settle(totals, counts)
        else:
            drop(self.placed)
        return loss, norm

    def evaluate(self, samples: Samples | None) -> tuple[Vector, Vector] | None:
        """The objective's sums over all ranks' samples, and their counts; `all_batches` makes of
        those of several batches what `objective.report` takes. None as `step` does."""
        ids, batch, counts = self._agreed(samples)
        if ids is None:
            return None
        with self._accompanied(ids, batch) as whole:
            sums = self._tapped(counts, lambda: self.runner.evaluate(ids, whole))
        own = self._counted(sums)
        return self._with_largest(self._sums(own), own), counts

    def all_batches(self, parts: Sequence[tuple[Vector, Vector]]) -> tuple[Vector, Vector]:
        """Sums and counts of several batches as one's."""
        sums, counts = (np.array(part) for part in zip(*parts, strict=True))
        n = self.runner.entries - self.runner.largest
        return np.concatenate((sums[:, :n].sum(0), sums[:, n:].max(0))), counts.sum(0)

    @contextmanager
    def _accompanied(self, ids: Tensor, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The batch with what the companions say of it: under their names on the ranks that have
        the last stage, under `name.layer` on those that have the layer."""
        companions = {n: c for n, c in self.objective.companions.items() if c.of_batches}
        whole = dict(batch)
        for name, companion in companions.items():
            whole |= companion.run(ids, batch, name)
        yield whole
        for companion in companions.values():
            companion.release()

    def _agreed(self, samples: Samples | None) -> tuple[Tensor | None, dict[str, Tensor], Vector]:
        """What the stages get of the samples, and the counts of the global batch; no ids if there
        is a rank that brings none."""
        ids, batch = self.objective.batch(samples) if samples is not None else (None, {})
        # Counted by one rank for each part of the batch, of those that share it.
        counts = all(self.mesh.get_local_rank(dim) == 0 for dim in ("pp", "cp", "tp"))
        own = torch.zeros(self.objective.counted + 1, dtype=torch.float64)
        own[-1] = ids is None
        if ids is not None and counts:
            own[:-1] = torch.tensor(self.objective.count(batch), dtype=torch.float64)
        *found, missing = self._sums(own)
        if ids is not None and self.layout.cp > 1:
            ids, batch = ContextParallel(self.mesh["cp"]).take(ids, batch)
        return None if missing else ids, batch, np.array(found)

    def _tapped(self, counts: Vector, compute: Callable[[], Tensor]) -> Tensor:
        """The objective's sums as the last stage computes them; behind them the taps' own."""
        if self.taps is None:
            return compute()
        self.taps.begin(1 / max(1.0, float(counts[1])))
        sums = compute()
        return torch.cat((sums, self.taps.sum()[None]))

    def _counted(self, sums: Tensor) -> Tensor:
        """The objective's sums, each on the ranks where it counts, else those of nothing."""
        own = sums[: self.objective.entries]
        own = own.clone() if self.placed.reports else self.runner.nothing()
        if self.taps is not None:
            own[1] += sums[-1]
        return own

    def _with_largest(self, totals: Vector, own: Tensor) -> Vector:
        """The same with the largest of all ranks' numbers, where those are no sums."""
        if largest := self.runner.largest:
            found = own[-largest:].to(self.device, torch.float64)
            dist.all_reduce(found, dist.ReduceOp.MAX)
            totals[-largest:] = found.cpu().numpy()
        return totals

    def _sums(self, *parts: Tensor) -> Vector:
        """Sums of vectors over all ranks, in one exchange: the same numbers everywhere."""
        totals = torch.cat([part.to(self.device, torch.float64) for part in parts])
        dist.all_reduce(totals)
        found: Vector = totals.cpu().numpy()
        return found
