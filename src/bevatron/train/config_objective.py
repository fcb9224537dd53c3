"""The section `objective` of a configuration: what a run minimises; the table of all kinds.

A kind holds the settings of one objective, and says which head and which feed the objective needs.
A kind stands beside its objective, in any room, and is loaded when a configuration names it. A
program may add kinds of its own to `KINDS`; a configuration cannot name a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from pydantic.fields import FieldInfo

from bevatron.errors import BevatronError
from bevatron.spec import Head, ModelSpec
from bevatron.spec.model import HeadKind

if TYPE_CHECKING:
    from bevatron.train.config import RunConfig
    from bevatron.train.feed import Feed
    from bevatron.train.objectives import Objective

# Name -> where its `Kind` is. Modules of kinds import no torch, so that a configuration is checked
# at once.
KINDS: dict[str, str] = {
    "pretrain": "bevatron.train.config_objective:PretrainKind",
    "distill": "bevatron.compress.distill_kind:DistillKind",
    "on_policy_distill": "bevatron.align.on_policy_distill_kind:OnPolicyDistillKind",
    "sequence_classification": "bevatron.train.head_kinds:SequenceClassificationKind",
    "token_classification": "bevatron.train.head_kinds:TokenClassificationKind",
    "question_answering": "bevatron.train.head_kinds:QuestionAnsweringKind",
    "sft": "bevatron.align.sft_kind:SftKind",
    "dpo": "bevatron.align.preference_kinds:DpoKind",
    "ipo": "bevatron.align.preference_kinds:IpoKind",
    "hinge": "bevatron.align.preference_kinds:HingeKind",
    "simpo": "bevatron.align.preference_kinds:SimpoKind",
    "rpo": "bevatron.align.preference_kinds:RpoKind",
    "online_rpo": "bevatron.align.preference_kinds:OnlineRpoKind",
    "grpo": "bevatron.align.rollout_kind:PolicyKind",
    "reward": "bevatron.align.reward_kind:RewardKind",
}
TOKENS = "bevatron.train.token_feed:TokenFeed"


class Section(BaseModel):
    """Strict, frozen, and no unknown keys. The text below a key is its meaning."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,  # what a key means: docs/configuration.md is made of it
    )

    @classmethod
    def documented(cls) -> Mapping[str, FieldInfo]:
        """The keys that the section may have. One that stands for several kinds says all keys, and
        whose they are."""
        return cls.model_fields


class Kind(Section):
    """What is minimised. Keys that mean nothing to the objective are refused."""

    # A kind adds its keys, and says the following. Places are "module:name", loaded when needed.
    # That the model must have:
    head: ClassVar[HeadKind] = "causal_lm"
    # The feed's class, a `train.feed.Feed`:
    reads: ClassVar[str] = TOKENS
    # The objective's class, whose `of(kind, spec, config)` makes it (or `make` is its own):
    minimises: ClassVar[str]
    # Those of its keys that name models or folders. A dry run can do without one for which the key
    # `..._like` says the sizes:
    paths: ClassVar[tuple[str, ...]] = ()
    # Whether its loss is the text's, in nats per token, so that there are bits per byte:
    is_likelihood: ClassVar[bool] = False

    name: str

    @property
    def replaces_head(self) -> bool:
        """Whether the model gets a new head even if it has one of this kind."""
        return False

    def adjusted(self, head: Head) -> Head:
        """The model's own head, of the kind that is needed, as this objective uses it. Raises
        BevatronError if the settings are of another head."""
        return head

    def made_head(self) -> Head:
        """For a model that has none of the kind. Raises BevatronError."""
        raise BevatronError(
            f"objective.name {self.name} makes no new {self.head} head; start from a model with one"
        )

    @property
    def sequences(self) -> int:
        """How many make a sample: the `rows` of the objective."""
        return 1

    @property
    def feed(self) -> type[Feed]:
        """The class of what it reads."""
        found: type[Feed] = load(self.reads)
        return found

    def make(self, spec: ModelSpec, config: RunConfig) -> Objective:
        """The objective for a model with the head that it needs. `config`: the whole configuration
        of the run, of which this is a section: what it starts from, its adapter, whether it
        compiles."""
        made: Objective = load(self.minimises).of(self, spec, config)
        return made


class PretrainKind(Kind):
    minimises = "bevatron.train.objectives:Pretrain"
    is_likelihood = True

    name: str = "pretrain"
    z_loss: float = Field(0.0, ge=0)
    """Weight of the mean of logsumexp(logits)^2 (PaLM: 1e-4), reported apart."""


def load(place: str) -> Any:
    """What stands at "module:name". Raises BevatronError if there is no such thing."""
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise  # of something that the module itself imports
        raise BevatronError(f"{place}: there is no module {error.name}") from error
    except AttributeError as error:
        raise BevatronError(f"{place}: the module has no {name}") from error


def kind_named(name: str) -> type[Kind]:
    """The kind of an objective's name, which is in the table."""
    found: type[Kind] = load(KINDS[name])
    return found


def kind_of(given: Any) -> Any:
    """A kind from the keys of the section.

    Keys of other objectives may be there with their defaults, as a printed configuration has them.
    Raises ValueError (pydantic's own among them) for an unknown name and keys of other objectives.
    """
    if isinstance(given, Kind):
        return given
    if not isinstance(given, Mapping):
        raise ValueError("expected a section, such as {name: pretrain}")
    name = given.get("name", "pretrain")
    if not isinstance(name, str):
        return given
    if name not in KINDS:
        raise ValueError(f"name {name!r} is unknown; known are {', '.join(KINDS)}")
    kind, own = kind_named(name), {"name": name}
    for key, value in given.items():
        takers = {} if key in kind.model_fields else _takers(key)
        if not takers:
            own[key] = value
        elif all(value != field.default for field in takers.values()):
            raise ValueError(
                f"{key} means nothing to {name}, only to {' or '.join(takers)}; drop it"
            )
    return kind.model_validate(own)


def _takers(key: str) -> dict[str, FieldInfo]:
    """The objectives that have this key, and how."""
    fields = {name: kind_named(name).model_fields.get(key) for name in KINDS}
    return {name: field for name, field in fields.items() if field is not None}


def _other_defaults(takers: Mapping[str, FieldInfo]) -> str:
    """A sentence about objectives whose default is another than the first one's."""
    first = next(iter(takers.values())).default
    differ = {name: f.default for name, f in takers.items() if f.default != first}
    if not differ:
        return ""
    listed = ", ".join(f"{value!r} of {name}" for name, value in differ.items())
    return f" By default {listed}."


def fields_of(section: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """The keys that a section may have; of `Kind` those of all objectives, and whose they are."""
    if section is not Kind:
        return section.documented() if issubclass(section, Section) else section.model_fields
    *others, last = KINDS
    found: dict[str, FieldInfo] = {}
    for name in KINDS:
        for key, field in kind_named(name).model_fields.items():
            if key not in found:
                whose = f"What is minimised: {', '.join(others)} or {last}."
                if key != "name":
                    takers = _takers(key)
                    meanings: dict[str, list[str]] = {}
                    for taker, other in takers.items():
                        meanings.setdefault(_lower(other.description or ""), []).append(taker)
                    said = (f"{', '.join(names)}: {text}" for text, names in meanings.items())
                    whose = " ".join(said) + _other_defaults(takers)
                found[key] = copy(field)
                if key != "name":
                    annotations: Any = dict.fromkeys(f.annotation for f in takers.values())
                    found[key].annotation = reduce(or_, annotations)
                found[key].description = whose
    return found


def defaults() -> dict[str, Any]:
    """Of every key of every objective."""
    fields = fields_of(Kind).items()
    return {key: field.get_default(call_default_factory=True) for key, field in fields}


def _lower(text: str) -> str:
    """As it goes on behind a colon."""
    return text[:1].lower() + text[1:]


ObjectiveConfig = Annotated[SerializeAsAny[Kind], BeforeValidator(kind_of)]
