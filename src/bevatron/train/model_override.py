"""Changes that a run makes to a model without changing a weight: its context and its rope."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bevatron.errors import BevatronError
from bevatron.families import FamilyError, by_name
from bevatron.families.rope_fields import read_rope
from bevatron.spec import ModelSpec, Rope, SpecError
from bevatron.spec.rope import ROPE_NEEDS
from bevatron.train.config_objective import Section

if TYPE_CHECKING:
    from bevatron.train.config import DataConfig

_CONTEXT = "original_max_position_embeddings"


class RopeConfig(Section):
    """Those of the rope's fields that change. Another `kind` begins without the old one's numbers;
    numbers of it that are absent are transformers' defaults, where it has any."""

    theta: float | None = Field(None, gt=0)
    """Base of the rotation's frequencies."""
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] | None = None
    """How positions beyond the trained context are rotated."""
    factor: float | None = Field(None, gt=0)
    """How many times longer the context becomes, in the way of the `kind`."""
    original_max_position_embeddings: int | None = Field(None, ge=1)
    """Context that the weights were trained for; if absent, the model's before this change."""
    low_freq_factor: float | None = Field(None, gt=0)
    """llama3: wavelengths beyond the context divided by this are stretched whole."""
    high_freq_factor: float | None = Field(None, gt=0)
    """llama3: those below the context divided by this are kept."""
    beta_fast: float | None = Field(None, gt=0)
    """yarn: pairs that turn more often within the context are kept."""
    beta_slow: float | None = Field(None, gt=0)
    """yarn: those that turn less often are stretched whole."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: what cos and sin are multiplied by; if absent, worked out from the factor."""
    truncate: bool | None = None
    """yarn: whether the blend begins and ends at whole dimensions."""


class OverrideConfig(Section):
    """What of the model changes without touching a weight, under the names of spec.json."""

    max_position_embeddings: int | None = Field(None, ge=1)
    """Context in tokens, as the exported config.json says it."""
    rope: RopeConfig | None = None
    """What of the rope changes."""


def overridden(spec: ModelSpec, override: OverrideConfig, family: str) -> ModelSpec:
    """The spec with the changes. Raises BevatronError for numbers that a rope has no use for, that
    it lacks, or that the family's config.json could not say."""
    context = override.max_position_embeddings or spec.max_position_embeddings
    try:
        rope = spec.rope if override.rope is None else _rope(spec, override.rope, context)
        changed = replace(spec, max_position_embeddings=context, rope=rope)
        by_name(family).config(changed, "bfloat16")
    except (FamilyError, SpecError) as error:
        said = str(error).replace("config.json: rope_scaling.", "rope.")
        if said.startswith("rope: kind dynamic was made for"):
            said += f"; give rope.{_CONTEXT} {context} as well, or leave the context as it is"
        raise BevatronError(f"model.override: {said}") from None
    return changed


def _rope(spec: ModelSpec, change: RopeConfig, context: int) -> Rope:
    before = spec.rope
    given: dict[str, Any] = change.model_dump(exclude_none=True)
    kind = given.pop("kind", before.kind)
    useful = {"theta", *ROPE_NEEDS[kind], *(["truncate"] if kind == "yarn" else [])}
    for name in given:
        if name not in useful:
            known = ", ".join(n for n in RopeConfig.model_fields if n in {"kind", *useful})
            raise SpecError(f"rope.{name} means nothing to kind {kind}, which has {known}; drop it")
    kept = {n: getattr(before, n) for n in useful} if kind == before.kind else {}
    if given.get("factor", kept.get("factor")) != kept.get("factor"):
        kept.pop("attention_factor", None)
    trained = before.original_max_position_embeddings or spec.max_position_embeddings
    numbers = {_CONTEXT: trained, **kept, **given}
    theta = numbers.pop("theta", before.theta)
    if kind == "yarn" and "factor" not in numbers:
        numbers["factor"] = context / numbers[_CONTEXT]
    said = {"rope_theta": theta, "rope_scaling": {**numbers, "rope_type": kind}}
    rope = read_rope(said, numbers[_CONTEXT], before.partial)
    return replace(rope, reversed=before.reversed)


def beyond_context(spec: ModelSpec, data: DataConfig, where: str) -> str | None:
    """A line about samples that are longer than the context of the model that `where` names."""
    context = spec.max_position_embeddings
    if data.seq_len <= context:
        return None
    which = "; with data.document_mask only longer documents are" if data.document_mask else ""
    said = (
        f"data.seq_len {data.seq_len:,} is beyond the context of {where}, {context:,} tokens "
        f"(max_position_embeddings){which}"
    )
    if where != "the model":
        return f"{said}: what it says there means little"
    return (
        f"{said}: its weights were made for that, and exports keep saying it; "
        "model.override.max_position_embeddings changes it, and model.override.rope how positions "
        "are rotated"
    )
