"""Heads in config.json: reading and writing which head `architectures` names, and its labels.

Files hold `id2label` and `label2id` and never `num_labels`. The two labels LABEL_0 and LABEL_1 are
the default and are not written.
"""

from __future__ import annotations

from collections.abc import Mapping

from bevatron.families.config_fields import Values, check, flag, shown, size, wrong
from bevatron.families.registry import Config, FamilyError
from bevatron.spec import Head, HeadKind, SpecError

SUFFIX: dict[HeadKind, str] = {
    "causal_lm": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "none": "Model",
}
ALL_HEADS: tuple[HeadKind, ...] = tuple(SUFFIX)
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
_BIAS = "token_classification_bias"


def architectures(stem: str, heads: tuple[HeadKind, ...]) -> dict[str, HeadKind]:
    """Class name -> head: LlamaForCausalLM and so on for the stem Llama."""
    return {stem + SUFFIX[kind]: kind for kind in heads}


def read_head(config: Config, known: Mapping[str, HeadKind]) -> Head:
    """The head of a config.json; causal_lm if it names no architecture."""
    named = config.get("architectures") or []
    kind: HeadKind = next((known[name] for name in named if name in known), "causal_lm")
    if kind == "question_answering":
        return Head(kind, bias=True)
    if kind in ("causal_lm", "none"):
        return Head(kind)
    try:
        if kind == "token_classification":
            bias = check(_BIAS, config.get(_BIAS, True), flag(True))
            return Head(kind, _labels(config), bias=bias)
        return Head(
            kind, _labels(config), pad_token_id=_pad(config), problem_type=_problem_type(config)
        )
    except SpecError as error:
        raise FamilyError(f"config.json: {error}") from error


def _labels(config: Config) -> tuple[str, ...]:
    count = config.get("num_labels")
    found = config.get("id2label")
    if count is not None:
        check("num_labels", count, size(None))
    if found is None:
        return _default_labels(2 if count is None else count)
    if not isinstance(found, Mapping) or not found:
        raise wrong("id2label", found, "an object from class numbers to names")
    if sorted(found) != sorted(str(i) for i in range(len(found))):
        raise FamilyError(
            f"config.json: id2label has the keys {shown(sorted(found))}, expected the numbers from "
            f"0 to {len(found) - 1}"
        )
    if count not in (None, len(found)):
        raise FamilyError(
            f"config.json: num_labels is {count}, but id2label names {len(found)} labels; "
            "transformers 4 goes by the one and 5 by the other: remove num_labels"
        )
    return tuple(str(found[str(i)]) for i in range(len(found)))


def _default_labels(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))


def _pad(config: Config) -> int | None:
    value = config.get("pad_token_id")
    if value is None:
        return None
    if type(value) is not int:
        raise wrong("pad_token_id", value, "an integer or null")
    return value


def _problem_type(config: Config) -> str | None:
    value = config.get("problem_type")
    if value not in PROBLEM_TYPES:
        raise wrong("problem_type", value, ", ".join(str(p) for p in PROBLEM_TYPES[1:]))
    return None if value is None else str(value)


def write_head(config: Values, head: Head, known: Mapping[str, HeadKind]) -> None:
    """Make `config` mean `head`, changing no field that already does.

    Raises FamilyError if the family has no class with that head."""
    name = next((name for name, kind in known.items() if kind == head.kind), None)
    if name is None:
        raise FamilyError(f"there is no class for the head {head.kind}; known are {list(known)}")
    try:
        if read_head(config, known) == head:
            return
    except FamilyError:
        pass  # the base's head cannot be read, so it is replaced
    config["architectures"] = [name]
    for field in ("num_labels", "id2label", "label2id", "problem_type", _BIAS):
        config.pop(field, None)
    if head.labels and head.labels != _default_labels(2):
        config["id2label"] = {str(i): label for i, label in enumerate(head.labels)}
        config["label2id"] = {label: i for i, label in enumerate(head.labels)}
    if head.kind == "sequence_classification":
        config["pad_token_id"] = head.pad_token_id
        config["problem_type"] = head.problem_type
    if head.kind == "token_classification" and not head.bias:
        config[_BIAS] = False
