"""What pruning says of its result: sizes, counts, and who will be able to read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bevatron.compress.prune_targets import PruneError
from bevatron.families.registry import Family, FamilyError, by_name, for_spec
from bevatron.spec import ModelSpec

NO_CLASS = (
    "no class of transformers can say this result, so it can be trained and used here, not exported"
)


@dataclass(frozen=True)
class PruneReport:
    """What was done, or would be.

    Attributes:
        parameters, before: exact counts; `sizes`: of the result, lists where its layers differ.
        dropped_layers: by their old index.
        exports_as: the transformers class of the result; None if there is none that says it.
        readers: other program -> "yes" (and if what), or why it will not read the export.
        bytes_read: of the tensors that are touched.
    """

    source: str
    target: str
    family: str
    exports_as: str | None
    before: int
    parameters: int
    share: float
    sizes: dict[str, Any]
    dropped_layers: list[int]
    dtype: str
    bytes_read: int
    bytes: int
    merge_heads: str
    readers: dict[str, str]
    seconds: float = 0.0
    verified: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def family_of(spec: ModelSpec, origin: Family) -> tuple[Family | None, list[str]]:
    """The family that the result exports as; None, and why, if there is none.

    Raises PruneError for a result whose layers are all the same and that its own class cannot say:
    another size would do."""
    try:
        origin.config(spec, "float32")
        return origin, []
    except FamilyError as error:
        own = error
    if len(set(spec.layers)) == 1:
        raise PruneError(f"the result cannot be exported: {own}; choose other sizes") from own
    try:
        family = for_spec(spec)
    except FamilyError:
        return None, [f"{NO_CLASS}: {_why(spec, own)}"]
    return family, [
        f"its layers differ, so it is no longer a {origin.name} and exports as {family.name}"
    ]


def _why(spec: ModelSpec, own: FamilyError) -> str:
    try:
        by_name("llama_nemotron").config(spec, "float32")
    except FamilyError as error:
        return f"{own}; {error}"
    return str(own)


def class_of(family: Family | None, spec: ModelSpec) -> str | None:
    if family is None:
        return None
    return next(name for name, kind in family.architectures.items() if kind == spec.head.kind)


def sizes_of(spec: ModelSpec) -> dict[str, Any]:
    """As config.json names them; one number where all layers agree."""

    def one(name: str) -> int | list[int | None] | None:
        values = [fields.get(name) for fields in found]
        return values[0] if len(set(values)) == 1 else values

    found = [{k: v for _, s in x.present for k, v in vars(s).items()} for x in spec.layers]
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": one("intermediate_size"),
        "num_attention_heads": one("num_attention_heads"),
        "num_key_value_heads": one("num_key_value_heads"),
        "head_dim": one("head_dim"),
        "num_hidden_layers": len(spec.layers),
    }
