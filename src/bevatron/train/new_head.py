"""The head that an objective needs: the model's own, or a new one above a language model's body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bevatron.errors import BevatronError
from bevatron.families import by_name
from bevatron.spec import Head, ModelSpec
from bevatron.spec.model import HeadKind
from bevatron.train.config_objective import ObjectiveConfig

NEEDS: dict[str, HeadKind] = {
    "pretrain": "causal_lm",
    "distill": "causal_lm",
    "sequence_classification": "sequence_classification",
    "token_classification": "token_classification",
    "question_answering": "question_answering",
}


def with_head(
    spec: ModelSpec, objective: ObjectiveConfig, family: str, pad: Callable[[], int | None]
) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec that the objective trains, and the parameters of its head if that is a new one.

    Args:
        family: that the model is of; its class with the head must exist, so that it can be
            exported.
        pad: finds the padding token's id; called if the head needs one and names none.
    Raises BevatronError saying what to change if objective and model do not go together.
    """
    kind, old = NEEDS[objective.name], spec.head
    if old.kind == kind and not objective.new_head:
        _check_same(old, objective)
        if objective.problem_type is not None:
            old = replace(old, problem_type=objective.problem_type)
        return replace(spec, head=_padded(old, pad)), ()
    if kind == "causal_lm":
        raise BevatronError(
            f"objective.name {objective.name} needs a model with a causal_lm head; this one has "
            f"the head {old.kind}: {_advice(old.kind)}"
        )
    if old.kind not in ("causal_lm", "none") and not objective.new_head:
        raise BevatronError(
            f"objective.name {objective.name} needs a model with the head {kind}, or a language "
            f"model, which gets a new one; this one has the head {old.kind}: {_advice(old.kind)}, "
            "or set objective.new_head: true to replace it by a new one"
        )
    classes = by_name(family).architectures
    if kind not in classes.values():
        raise BevatronError(
            f"objective.name {objective.name}: transformers has no class for a {family} model with "
            f"the head {kind}, only {', '.join(classes)}, so it could not be exported; start from "
            "a model of another family"
        )
    head = _padded(_new(kind, objective), pad)
    made = replace(spec, head=head)
    return made, tuple(p.name for p in head.parameters(spec.hidden_size))


def _new(kind: HeadKind, objective: ObjectiveConfig) -> Head:
    labels = tuple(objective.labels)
    if kind == "question_answering":
        return Head(kind, bias=True)
    if not labels and objective.problem_type == "regression":
        labels = ("LABEL_0",)
    if not labels:
        raise BevatronError(
            f"objective.labels: missing; the model gets a new {kind} head, so name its labels in "
            "order, such as labels: [negative, positive]"
        )
    if kind == "token_classification":
        return Head(kind, labels, bias=True)
    several = "regression" if len(labels) == 1 else "single_label_classification"
    return Head(kind, labels, problem_type=objective.problem_type or several)


def _padded(head: Head, pad: Callable[[], int | None]) -> Head:
    """A sequence classifier finds the ends of its sequences by the padding token."""
    if head.kind != "sequence_classification" or head.pad_token_id is not None:
        return head
    found = pad()
    if found is None:
        raise BevatronError(
            "the tokenizer names neither a pad nor an eos token, so the ends of sequences cannot "
            "be told; set pad_token in its tokenizer_config.json"
        )
    return replace(head, pad_token_id=found)


def _check_same(head: Head, objective: ObjectiveConfig) -> None:
    if objective.labels and tuple(objective.labels) != head.labels:
        raise BevatronError(
            f"objective.labels is {objective.labels}, but the model's head has the labels "
            f"{list(head.labels)}; drop objective.labels to go on with these, or set "
            "objective.new_head: true to start with a new head"
        )
    if objective.problem_type not in (None, head.problem_type) and head.problem_type is not None:
        raise BevatronError(
            f"objective.problem_type is {objective.problem_type}, but the model's head is for "
            f"{head.problem_type}; drop it, or set objective.new_head: true"
        )


def _advice(kind: HeadKind) -> str:
    same = next((name for name, needed in NEEDS.items() if needed == kind), None)
    if same is None:
        return "start from a model with one"
    return f"use objective.name: {same}"
