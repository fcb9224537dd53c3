"""What a run minimises. The trainer knows nothing of losses; an objective knows nothing of layouts.

An objective says what a batch holds, and which sums the last stage computes from its hidden states.
It also says over how many units a differentiated sum is averaged. This number is known before the
forward, so micro-batches, ranks and packing never change a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bevatron.nn.decoder import Tap
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import IGNORE, cross_entropy_and_z
from bevatron.parallel.companion import Companion
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.config_objective import PretrainKind

# What the feed delivers of a step, all [n, ...] on the device: `tokens` [n, T + 1] int64, and, if
# `data.document_mask` is set, `documents` [n, T + 1] int64, the number of each token's document
# within its sample, from 0. In a validation's last batch perhaps BLANK [n] bool: samples that count
# for nothing. Of labelled examples `tokens` [n, T] and what `head_objectives` names. Samples of
# several sequences have them in the second dimension, [n, rows, T].
Samples = dict[str, Tensor]
BLANK = "blank"
Vector = NDArray[np.float64]
NONE: Mapping[str, Companion] = MappingProxyType({})


class Stored(Protocol):
    """Arrays on disk that belong to the samples of a run. `key`: of the objective's section, which
    names their folder."""

    key: str

    def check(self, config: RunConfig) -> None:
        """Raises BevatronError if they are not of this run's samples."""

    def fingerprint(self) -> str:
        """Of where they come from, which may not change between starts of one run."""

    def read(
        self, kind: str, positions: range, tokens: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """[n, ...] of the samples at these positions of the order `train` or `validation`, whose
        tokens these are; they join the samples under their names."""


class Taps(Protocol):
    """A loss on the hidden states between the layers, computed where the layers are. Its sum over
    the batch is the objective's second one, which `compute` leaves at zero.

    Attributes:
        parameters: that it learns: whole and equal on every rank, no part of the model.
        unsettled: whether its weight is yet to be found by `settle`.
    """

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    @property
    def unsettled(self) -> bool: ...

    def place(self, device: torch.device) -> None:
        """Make the parameters, without values."""

    def fill(self, seed: int) -> None:
        """Initialise them; the values depend on the seed alone."""

    def begin(self, scale: float) -> None:
        """Before a batch's forwards. `scale`: 1 / the count of the sum, which its weight is yet to
        multiply."""

    def tap(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Tap:
        """Of one micro-batch."""

    def sum(self) -> Tensor:
        """Since `begin`; a scalar that adds up over all ranks."""

    def state(self) -> dict[str, float]:
        """What a checkpoint is to remember besides the parameters."""

    def load(self, state: Mapping[str, float]) -> None: ...


class Objective(Protocol):
    """Attributes:
    rows: how many sequences make a sample, such as 2 of a pair. Every `micro_batch` samples
        are that many times as many sequences for the models.
    entries: how many sums `compute` gives. The first ones, `counted` of them, are divided by
        the numbers of `count` and added up: that is the loss that is differentiated. The others
        are metrics' sums without a gradient. An objective may say `largest`: how many of these,
        the last ones, are no sums but numbers of which the largest one of the batch counts.
    companions: frozen models that run before the trained one. On the last stage, the batch of
        `compute` holds what each was asked for under its name (see `parallel.companion`).
    stored: what is read along with the samples, on the ranks that have the last stage.
    taps: what is computed between the layers.
    """

    name: str
    rows: int
    entries: int
    counted: int
    companions: Mapping[str, Companion]
    stored: Stored | None
    taps: Taps | None

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """n samples -> token ids [B, T] of their B = n * `rows` sequences, those of a sample behind
        each other; and what the stages and `compute` will need, all [B, ...], or [n, ...] of
        samples.

        `positions` and `documents` [B, T] among them go to the decoder. Of all that is [B, T], a
        context-parallel rank gets its own tokens."""

    def count(self, batch: dict[str, Tensor]) -> Sequence[int]:
        """How many units each of the differentiated sums over this batch has."""

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        """What the head computes for one micro-batch: the sums, [entries]."""

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        """What is reported of the sums and counts of a whole batch, or of several added up: `loss`,
        and metrics by their names."""

    def settle(self, sums: Vector, counts: Vector) -> None:
        """Adapt to the sums and counts of a batch, the same on all ranks, for what follows."""


class Pretrain:
    """Next-token prediction: mean of -log p over all tokens of the global batch, in nats.

    Args:
        z_loss: the weight of the mean of logsumexp(logits)^2, which is minimised along with the
            loss and reported apart, weight included.
        compiled: whether the loss is compiled.
    """

    name = "pretrain"
    rows = counted = 1
    companions = NONE
    stored: Stored | None = None
    taps: Taps | None = None

    def __init__(self, z_loss: float = 0.0, compiled: bool = False) -> None:
        self.z_loss, self.compiled = z_loss, compiled
        self.entries = 2 if z_loss else 1

    @classmethod
    def of(cls, kind: PretrainKind, spec: ModelSpec, config: RunConfig) -> Pretrain:
        return cls(kind.z_loss, config.train.compile)

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, documents = samples["tokens"], samples.get("documents")
        ids, labels = tokens[:, :-1], tokens[:, 1:]
        if (blank := samples.get(BLANK)) is not None:
            labels = labels.masked_fill(blank[:, None], IGNORE)
        if documents is None:
            return ids, {"labels": labels}
        # The first token of a document is not for the one before it to predict.
        labels = labels.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
        return ids, {"labels": labels, "documents": documents[:, :-1]}

    def count(self, batch: dict[str, Tensor]) -> Sequence[int]:
        return (int((batch["labels"] != IGNORE).sum()),)

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            labels, cap = batch["labels"], spec.logit_softcap
            both = cross_entropy_and_z(
                hidden, weight, labels, comm, cap, spec.vocab_size, self.z_loss, self.compiled
            )
            return torch.stack(both[: self.entries])

        return loss

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        n = mean_over(counts[0])
        if not self.z_loss:
            return {"loss": sums[0] / n}
        return {"loss": (sums[0] - sums[1]) / n, "z_loss": sums[1] / n}

    def settle(self, sums: Vector, counts: Vector) -> None:
        pass


def mean_over(count: Any) -> float:
    """A count to divide by: where there is nothing to count, sums are zero and so is their mean."""
    return max(1.0, float(count))
