"""What a family consists of, and the registry of families.

`families/__init__.py` lists the families of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from bevatron.errors import BevatronError
from bevatron.families.weight_map import Entry
from bevatron.spec.model import HeadKind, ModelSpec

Config = Mapping[str, Any]


class FamilyError(BevatronError):
    """A config.json that no family understands, or a spec that no family can spell."""


class Family(Protocol):
    """How Hugging Face spells one kind of model. Each module of this room that defines one exports
    `FAMILY`; one from outside is added with `register`."""

    @property
    def name(self) -> str:
        """llama, mistral, nanochat, nemotron, llama_nemotron"""

    @property
    def model_type(self) -> str:
        """As in config.json."""

    @property
    def architecture(self) -> str:
        """The ForCausalLM class name."""

    @property
    def architectures(self) -> Mapping[str, HeadKind]:
        """Every class name that config.json may have, and the head that it means."""

    def spec(self, config: Config) -> ModelSpec:
        """config.json -> spec. Raises FamilyError naming any field that is not understood."""

    def config(self, spec: ModelSpec, dtype: str, base: Config | None = None) -> dict[str, Any]:
        """spec -> config.json, changing only what differs from `base` (the source's config).

        Raises FamilyError saying which part of the spec this family cannot express."""

    def weight_map(self, spec: ModelSpec) -> list[Entry]:
        """Every native parameter and the HF tensors that it consists of."""

    def skip(self, name: str) -> str | None:
        """Why an HF tensor that is no parameter may be left out (rotary buffers), or None."""


_REGISTERED: list[Family] = []


def families() -> tuple[Family, ...]:
    """All families: those of this room, then those from outside of the library."""
    return tuple(_REGISTERED)


def register(family: Family) -> None:
    """Add a family, for this process.

    Raises FamilyError if another one has its name or one of its architectures."""
    for other in families():
        taken = set(other.architectures) & set(family.architectures)
        if other.name == family.name or taken:
            raise FamilyError(
                f"family {family.name!r}: the name or {sorted(taken) or 'an architecture'} is "
                f"taken by {other.name!r}"
            )
    _REGISTERED.append(family)


def architectures() -> list[str]:
    """The Hugging Face classes of all families."""
    return sorted(family.architecture for family in families())


def by_name(name: str) -> Family:
    """The family called `name`."""
    for family in families():
        if family.name == name:
            return family
    known = ", ".join(f.name for f in families())
    raise FamilyError(f"unknown family {name!r}; known are {known}")


def for_config(config: Config) -> Family:
    """The family that config.json names, by `architectures`, else by `model_type`.

    transformers goes by `model_type` first: where the two disagree, one reader or the other would
    be wrong, so it is refused."""
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise FamilyError(
            f"config.json: architectures is {architectures!r}, expected a list of class names"
        )
    found = [f for f in families() if set(f.architectures) & set(architectures)]
    if not architectures:
        found = [f for f in families() if f.model_type == model_type]
    if not found:
        known = ", ".join(f.architecture for f in families())
        raise FamilyError(
            f"config.json: architecture {architectures or model_type!r} is not supported; "
            f"supported are {known}"
        )
    if model_type not in (None, found[0].model_type):
        raise FamilyError(
            f"config.json: architectures {architectures} and model_type {model_type!r} disagree; "
            f"{architectures[0]} has model_type {found[0].model_type!r}"
        )
    return found[0]


def for_spec(spec: ModelSpec) -> Family:
    """The first family that can spell `spec`."""
    reasons = []
    for family in families():
        try:
            family.config(spec, "float32")
            return family
        except FamilyError as error:
            reasons.append(f"  {family.name}: {error}")
    raise FamilyError("no Hugging Face family can express this model:\n" + "\n".join(reasons))
