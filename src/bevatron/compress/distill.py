"""Distillation as an objective: a student learns a teacher's distribution over the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from bevatron.bridge.opened import Opened
from bevatron.compress.divergence import Divergence, Output, distillation_sums
from bevatron.errors import BevatronError
from bevatron.nn.comm import Comm
from bevatron.nn.heads import Compute
from bevatron.parallel.companion import Companion
from bevatron.spec import ModelSpec
from bevatron.train.config import ObjectiveConfig
from bevatron.train.objectives import Pretrain, Vector, mean_over
from bevatron.train.start import open_teacher


class Distill(Pretrain):
    """The mean over all tokens of the global batch of temperature^2 * divergence + ce *
    cross-entropy. Reports `kl`, the divergence alone, and `ce`, whatever their weights."""

    name = "distill"

    def __init__(self, teacher: Companion, options: Divergence) -> None:
        super().__init__()
        self.teacher, self.options = teacher, options
        self.companions = {"teacher": teacher}
        self.entries = 3

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.no_grad():
                theirs = comm.enter(batch["teacher"])
            student = Output(hidden, weight, spec.logit_softcap)
            teacher = Output(theirs, self.teacher.head(), self.teacher.spec.logit_softcap)
            labels, rows = batch["labels"], spec.vocab_size
            return distillation_sums(student, teacher, labels, comm, rows, self.options)

        return loss

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        loss, divergence, entropy = (float(x) / mean_over(counts[0]) for x in sums)
        return {"loss": loss, "kl": divergence, "ce": entropy}


def distill(config: ObjectiveConfig, student: ModelSpec) -> Distill:
    """The configured objective, its teacher opened and not yet read.

    Raises BevatronError if there is no such teacher, or the student cannot learn from it."""
    try:
        opened = open_teacher(config)
    except BevatronError as error:
        raise BevatronError(f"objective.teacher: {error}") from error
    _check(config, opened, student)
    options = Divergence(config.divergence, config.temperature, config.top_k, config.ce)
    return Distill(Companion(opened.spec, opened), options)


def _check(config: ObjectiveConfig, teacher: Opened, student: ModelSpec) -> None:
    where, spec = f"objective.teacher: {config.teacher or config.teacher_like}", teacher.spec
    if spec.head.kind != "causal_lm":
        raise BevatronError(
            f"{where} has the head {spec.head.kind}, but a teacher needs a causal_lm head; name "
            "the language model that it was made from"
        )
    if spec.vocab_size != student.vocab_size:
        raise BevatronError(
            f"{where} has a vocabulary of {spec.vocab_size} tokens, the student one of "
            f"{student.vocab_size}; both must share one tokenizer and one vocab_size"
        )
    if config.top_k is not None and config.top_k >= spec.vocab_size:
        raise BevatronError(
            f"objective.top_k is {config.top_k}, expected less than the vocabulary's "
            f"{spec.vocab_size} tokens; drop it to compare all of them"
        )
