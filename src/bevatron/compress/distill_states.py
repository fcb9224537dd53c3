"""Distillation between the layers: a student's hidden states are pulled towards its teacher's.

The loss of a pair of layers and its gradients are computed on the rank that has the student's
layer, as soon as the layer's hidden states exist. So no hidden state of the student is sent to
another rank. The gradient of the hidden states is added to theirs in the backward. The gradient of
the projection is added up at once: if the projection were an input of the graph, zero-bubble
schedules would walk to it from one pair through all the layers before that pair.

A tensor-parallel rank has either its share of the tokens or all of them; each token counts once in
the sums.

Both models' states are normalised first, by their own kind of norm without weights (Minitron, arXiv
2407.14679, section 3: after LayerNorm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.compress.distill_kind import StatesConfig
from bevatron.errors import BevatronError
from bevatron.nn.decoder import EMBEDDING, Tap
from bevatron.nn.norm import rms
from bevatron.nn.rank_communication import Comm
from bevatron.parallel.random_weights import fill_normal
from bevatron.spec import ModelSpec, Norm
from bevatron.train.objectives import BLANK

Kind = Literal["cosine", "mse"]
PROJECTION = "states.projection"


@dataclass(frozen=True)
class StatesLoss:
    """The sum over pairs of the mean over all tokens of 1 - cos(student, teacher), or of the mean
    square of their difference.

    Attributes:
        pairs: the student's layer -> the teacher's, whose outputs are compared; EMBEDDING is what
            enters the first layer.
        weight: None for the dynamic one, the logits' loss divided by this one.
        project: map the student's states by a learned matrix, one for all pairs.
    """

    pairs: Mapping[int, int]
    kind: Kind = "cosine"
    weight: float | None = None
    project: bool = False


class States:
    """The taps on a student.

    The dynamic weight of a step is that of the step before, for a step's own is known only after
    its forwards; the first step's comes from a forward before it.

    Args:
        student, teacher: their specs.
    """

    def __init__(self, loss: StatesLoss, student: ModelSpec, teacher: ModelSpec) -> None:
        self.loss, self.norms = loss, (student.norm, teacher.norm)
        self.shape = (teacher.hidden_size, student.hidden_size)
        self.parameters: dict[str, nn.Parameter] = {}
        self.weight = loss.weight
        self._scale = 0.0
        self._sum = torch.zeros(())

    @property
    def unsettled(self) -> bool:
        return self.weight is None

    def place(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        if self.loss.project:
            empty = torch.empty(self.shape, dtype=torch.float32, device=device)
            self.parameters = {PROJECTION: nn.Parameter(empty)}

    def fill(self, seed: int) -> None:
        for name, parameter in self.parameters.items():
            fill_normal(parameter, name, 1 / math.sqrt(self.shape[1]), seed)

    def begin(self, scale: float) -> None:
        self._scale = scale * (self.weight or 0.0)
        self._sum = torch.zeros_like(self._sum)

    def sum(self) -> Tensor:
        return self._sum

    def settle(self, logits: float, states: float) -> None:
        if self.loss.weight is None and math.isfinite(logits / states if states > 0 else math.nan):
            self.weight = logits / states

    def weigh(self, logits: float, states: float) -> float:
        """What the loss on states counts with; before there is a weight, what it would be."""
        if self.weight is not None:
            return self.weight
        return logits / states if states > 0 else 0.0

    def state(self) -> dict[str, float]:
        return {"states_weight": self.weight} if self.weight is not None else {}

    def load(self, state: Mapping[str, float]) -> None:
        if self.loss.weight is None:
            self.weight = state.get("states_weight")

    def tap(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Tap:
        counts = comm.sequence_shares > 1 or comm.rank == 0

        def tap(layer: int, x: Tensor) -> Tensor:
            if layer not in self.loss.pairs:
                return x
            total, gradient = self._look(x, batch[f"teacher.{layer}"], batch.get(BLANK))
            if counts:
                self._sum += total
            if gradient is None:
                return x
            out: Tensor = _Beside.apply(x, gradient)  # type: ignore[no-untyped-call]
            return out

        return tap

    def _look(
        self, x: Tensor, theirs: Tensor, blank: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The sum over the tokens of x, but for `blank` samples [B] of a validation, and the
        gradient of what is minimised of it, if gradients are wanted; that of the projection is
        added to what there is."""
        kind, projection = self.loss.kind, self.parameters.get(PROJECTION)
        if not torch.is_grad_enabled():
            if blank is not None:
                x, theirs = x[~blank], theirs[~blank]
            return states_sum(x, theirs, projection, kind, self.norms), None
        ours = x.detach().requires_grad_()
        total = states_sum(ours, theirs, projection, kind, self.norms)
        if projection is None:
            (dx,) = torch.autograd.grad(total, (ours,))
        else:
            dx, weight = torch.autograd.grad(total, (ours, projection))
            weight *= self._scale
            projection.grad = weight if projection.grad is None else projection.grad.add_(weight)
        return total.detach(), dx * self._scale


def states_sum(
    student: Tensor, teacher: Tensor, weight: Tensor | None, kind: Kind, norms: tuple[Norm, Norm]
) -> Tensor:
    """The sum over all tokens of [B, T, h] states' losses, fp32. `weight` [h_t, h_s] maps the
    student's, in the dtype that they are in."""
    s, t = normalised(student.float(), norms[0]), normalised(teacher.float(), norms[1])
    if weight is not None:
        s = F.linear(s.to(student.dtype), weight.to(student.dtype)).float()
    if kind == "mse":
        return (s - t).square().mean(-1).sum()
    return (1 - F.cosine_similarity(s, t, dim=-1)).sum()


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """By a norm's kind, without weights."""
    if norm.kind == "rms":
        return rms(x, norm.eps)
    return F.layer_norm(x, x.shape[-1:], eps=norm.eps)


class _Beside(torch.autograd.Function):
    """x as it is, whose gradient has another one besides.

    A copy of it: the output of a stage must not be a view, which pipelines detach in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad + ctx.saved_tensors[0], None


def states_of(config: StatesConfig, student: ModelSpec, teacher: ModelSpec) -> StatesLoss:
    """What is configured for these two models. Raises BevatronError if it means nothing to them."""
    counts = len(student.layers), len(teacher.layers)
    if config.layers == "all":
        if counts[0] != counts[1]:
            raise BevatronError(
                f"objective.states.layers is all, but the student has {counts[0]} layers and the "
                f"teacher {counts[1]}; name pairs instead, as in {{0: {counts[1] - counts[0]}}}"
            )
        pairs = {i: i for i in range(counts[0])}
    else:
        pairs = {int(ours): theirs for ours, theirs in config.layers.items()}
    for ours, theirs in pairs.items():
        for name, layer, count in (("student", ours, counts[0]), ("teacher", theirs, counts[1])):
            if not 0 <= layer < count:
                raise BevatronError(
                    f"objective.states.layers: {ours}: {theirs} names layer {layer} of the {name}, "
                    f"which has layers 0 to {count - 1}"
                )
    if config.embedding:
        pairs[EMBEDDING] = EMBEDDING
    differ = student.hidden_size != teacher.hidden_size
    if differ and config.project is False:
        raise BevatronError(
            f"objective.states.project is false, but the student's states are "
            f"{student.hidden_size} wide and the teacher's {teacher.hidden_size}; drop it"
        )
    weight = None if config.weight == "dynamic" else config.weight
    return StatesLoss(pairs, config.loss, weight, differ or bool(config.project))
