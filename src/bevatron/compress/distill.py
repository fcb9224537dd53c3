"""Distillation as an objective: a student learns a teacher's distribution over the next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bevatron.bridge.open_weights import Opened, open_weights, paper
from bevatron.compress.distill_kind import DistillKind
from bevatron.compress.distill_states import States, states_of
from bevatron.compress.logit_divergence import Divergence, Output, Top, distillation_sums
from bevatron.compress.stored_logits import IDS, TAIL, VALUES, StoredLogits
from bevatron.errors import BevatronError
from bevatron.families import for_spec
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.parallel.companion import Companion
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import BLANK, Pretrain, Samples, Vector, mean_over
from bevatron.train.run_start import check_like, spec_named

TOP = (VALUES, IDS, TAIL)


class Distill(Pretrain):
    """The mean over all tokens of the global batch of temperature^2 * divergence + ce *
    cross-entropy, and of a loss on states besides. Reports `kl`, the divergence alone, and `ce`,
    whatever their weights; of a loss on states `states` and `states_weight`.

    Args:
        teacher: a model that runs beside the student, or what one said before.
        states: needs the model, which has its pairs."""

    name = "distill"

    def __init__(
        self,
        teacher: Companion | StoredLogits,
        options: Divergence,
        states: States | None = None,
    ) -> None:
        super().__init__()
        self.teacher, self.options, self.taps = teacher, options, states
        self.states = states
        if isinstance(teacher, Companion):
            self.companions = {"teacher": teacher}
        else:
            self.stored = teacher
        self.counted, self.entries = (1, 3) if states is None else (2, 4)

    @classmethod
    def of(  # type: ignore[override]  # of another kind
        cls, config: DistillKind, student: ModelSpec, run: RunConfig
    ) -> Distill:
        """The configured objective, its teacher opened and not yet read.

        Raises BevatronError if there is no such teacher, or the student cannot learn from it."""
        options = divergence_of(config)
        if config.logits is not None:
            stored = StoredLogits.open(Path(config.logits))
            _check_stored(config, stored, student)
            return cls(stored, options)
        teacher = teacher_of(config, student, "top_k", config.top_k)
        if config.states is None:
            return cls(teacher, options)
        loss = states_of(config.states, student, teacher.spec)
        states = States(loss, student, teacher.spec)
        return cls(Companion(teacher.spec, teacher.weights, pairs=loss.pairs), options, states)

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        ids, batch = super().batch(samples)
        names = TOP if self.states is None else (*TOP, BLANK)
        return ids, batch | {name: samples[name] for name in names if name in samples}

    def count(self, batch: dict[str, Tensor]) -> Sequence[int]:
        """Tokens with a next one to predict; of states, all of them."""
        counts = super().count(batch)
        if self.states is None:
            return counts
        rows, tokens = batch["labels"].shape
        blank = int(batch[BLANK].sum()) if BLANK in batch else 0
        return (*counts, (rows - blank) * tokens)

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            student, labels = Output(hidden, weight, spec.logit_softcap), batch["labels"]
            teacher = self._taught(comm, batch)
            sums = distillation_sums(student, teacher, labels, comm, spec.vocab_size, self.options)
            if self.states is None:
                return sums
            return torch.cat((sums[:1], sums.new_zeros(1), sums[1:]))

        return loss

    def _taught(self, comm: Comm, batch: dict[str, Tensor]) -> Output | Top:
        if isinstance(self.teacher, Companion):
            with torch.no_grad():
                hidden = comm.enter(batch["teacher"])
            return Output(hidden, self.teacher.head(), self.teacher.spec.logit_softcap)
        values, ids, tail = (batch[name] for name in TOP)
        top = Top(values.flatten(0, 1).float(), ids.flatten(0, 1).long(), tail.flatten())
        if values.dtype != torch.float32:
            top = top.normalised()
        return top.first(self.options.top_k or top.values.shape[1])

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        if self.states is None:
            loss, divergence, entropy = (float(x) / mean_over(counts[0]) for x in sums)
            return {"loss": loss, "kl": divergence, "ce": entropy}
        found, logits, states = self._parts(sums, counts)
        weight = self.states.weigh(logits, states)
        found["loss"] += weight * states
        return {**found, "states": states, "states_weight": weight}

    def _parts(self, sums: Vector, counts: Vector) -> tuple[dict[str, float], float, float]:
        """What is reported without the states; the loss on logits, and that on states."""
        n = mean_over(counts[0])
        loss, divergence, entropy = (float(sums[i]) / n for i in (0, 2, 3))
        logits = self.options.temperature**2 * divergence
        states = float(sums[1]) / mean_over(counts[1])
        return {"loss": loss, "kl": divergence, "ce": entropy}, logits, states

    def settle(self, sums: Vector, counts: Vector) -> None:
        if self.states is not None:
            self.states.settle(*self._parts(sums, counts)[1:])


def divergence_of(config: DistillKind) -> Divergence:
    """The settings as the loss takes them."""
    return Divergence(
        config.divergence, config.temperature, config.top_k, config.ce, config.mixture
    )


class Taught(Protocol):
    """The settings of an objective with a teacher. Either is given."""

    @property
    def teacher(self) -> str | None: ...
    @property
    def teacher_like(self) -> str | None: ...


def teacher_of(config: Taught, student: ModelSpec, key: str, top_k: int | None) -> Companion:
    """The configured teacher, opened and not yet read, with the student's vocabulary.

    Args:
        key: of the objective's section, in which `top_k` stands, how many of its tokens count.
    Raises BevatronError if there is no such teacher, or the student cannot learn from it."""
    try:
        opened = open_teacher(config)
    except BevatronError as error:
        raise BevatronError(f"objective.teacher: {error}") from error
    where = f"objective.teacher: {config.teacher or config.teacher_like}"
    check_teacher(where, opened, top_k, key)
    _check_vocabulary(where, opened.spec.vocab_size, student)
    return Companion(opened.spec, opened)


def open_teacher(config: Taught) -> Opened:
    """The teacher's weights. They lie nowhere if there are only the sizes that it will have (see
    `train.missing_inputs`)."""
    if config.teacher is None:
        spec = spec_named(str(config.teacher_like))
        return paper(Path(str(config.teacher_like)), for_spec(spec), spec, "", "BF16")
    opened = open_weights(config.teacher)
    check_like(config.teacher, "objective.teacher_like", config.teacher_like, opened.spec)
    return opened


def check_teacher(where: str, teacher: Opened, top_k: int | None, key: str = "top_k") -> None:
    """Refuse what cannot teach. `where`: begins the message."""
    spec = teacher.spec
    if spec.head.kind != "causal_lm":
        raise BevatronError(
            f"{where} has the head {spec.head.kind}, but a teacher needs a causal_lm head; name "
            "the language model that it was made from"
        )
    if top_k is not None and top_k >= spec.vocab_size:
        raise BevatronError(
            f"objective.{key} is {top_k}, expected less than the vocabulary's "
            f"{spec.vocab_size} tokens; drop it to compare all of them"
        )


def _check_vocabulary(where: str, tokens: int, student: ModelSpec) -> None:
    if tokens != student.vocab_size:
        raise BevatronError(
            f"{where} has a vocabulary of {tokens} tokens, the student one of "
            f"{student.vocab_size}; both must share one tokenizer and one vocab_size"
        )


def _check_stored(config: DistillKind, stored: StoredLogits, student: ModelSpec) -> None:
    info = stored.info
    _check_vocabulary(f"objective.logits: {stored.path}", info.vocab_size, student)
    if config.temperature != info.temperature:
        raise BevatronError(
            f"objective.temperature is {config.temperature:g}, but {stored.path} was made at "
            f"{info.temperature:g}, and the tail of another temperature cannot be known from it; "
            "use that one, or make the logits anew"
        )
    if config.top_k is not None and config.top_k > info.top_k:
        raise BevatronError(
            f"objective.top_k is {config.top_k}, but {stored.path} has {info.top_k} tokens of each "
            "distribution; use at most as many, or make the logits anew"
        )
