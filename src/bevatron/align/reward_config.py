"""The settings of rewards: items of the list `rewards` of an objective that learns from them.

Each item names a reward and gives its keys, as in {name: exact_match, pattern: gsm8k, weight: 2}.
What scores stands in `scorers.py`, `code_reward.py` and the user's own files; `rewards.py` runs it.
This file imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from pydantic.fields import FieldInfo

from bevatron.train.config_objective import Section

# Where an answer's last words are found: the name of a pattern -> a regular expression, whose last
# match in the text counts. Boxes nest, so `boxed` is found by counting braces.
PATTERNS = {
    "boxed": "",
    "gsm8k": r"####[ \t]*([^\n]+)",
    "answer_tags": r"<answer>(.*?)</answer>",
    "number": r"(-?\$?\d[\d,]*(?:\.\d+)?)",
    "last_line": r"([^\n]+)\s*\Z",
}


class RewardConfig(Section):
    """What scores an answer, with a limit on its time and memory. Several rewards add up."""

    # Whether answers are scored one at a time, each under the limits, rather than a batch at once:
    singly: ClassVar[bool] = True

    name: str
    weight: float = 1.0
    """Of this reward in the sum of all."""
    seconds: float = Field(10.0, gt=0)
    """By the clock, for one call; what takes longer is stopped."""
    memory_gib: float = Field(4.0, gt=0)
    """That a call may take, beyond what its process has when it is ready."""
    processes: int = Field(1, ge=1)
    """That score answers at the same time."""
    failure: Literal["nan", "stop"] = "nan"
    """What follows when a call hangs, takes too much memory, ends its process, raises, or returns
    what is no finite number: nan, the answer counts as one that cannot be scored; or stop, the run
    ends. A reward that fails on every answer of a batch stops the run in any case."""

    @property
    def label(self) -> str:
        """What metrics call it."""
        return self.name

    @classmethod
    def documented(cls) -> Mapping[str, FieldInfo]:
        if cls is not RewardConfig:
            return cls.model_fields
        found: dict[str, FieldInfo] = {}
        for key in dict.fromkeys(key for kind in REWARDS.values() for key in kind.model_fields):
            takers = [name for name, kind in REWARDS.items() if key in kind.model_fields]
            found[key] = copy(REWARDS[takers[0]].model_fields[key])
            said = found[key].description or ""
            if key == "name":
                said = f"{', '.join(takers[:-1])} or {takers[-1]}."
            elif len(takers) < len(REWARDS):
                said = f"{', '.join(takers)}: {said[:1].lower()}{said[1:]}"
            found[key].description = said
        return found


def _known_pattern(value: str | None) -> str | None:
    if value is not None and value not in PATTERNS:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(
                f"{value!r} is neither one of {', '.join(PATTERNS)} nor a regular expression "
                f"({error})"
            ) from error
        if groups != 1:
            raise ValueError(f"the pattern {value!r} has {groups} groups, expected one: the answer")
    return value


Pattern = Annotated[str | None, BeforeValidator(_known_pattern)]


class PythonReward(RewardConfig):
    """A function of the user's, with TRL's arguments: f(prompts, completions, completion_ids,
    **columns) -> a number, or None for what cannot be scored, for each completion."""

    singly = False

    name: str = "python"
    path: str
    """The Python file."""
    function: str = "reward"
    """The function in it."""

    @property
    def label(self) -> str:
        return self.function


class ExactMatch(RewardConfig):
    """1 if the answer is that of the row, else 0."""

    name: str = "exact_match"
    column: str = "answer"
    """Column of the row with what is right: a text or number, or a list of them."""
    pattern: Pattern = None
    """What of the text is the answer: its last \\boxed{...} (boxed), what follows the last ####
    (gsm8k), what is in the last <answer> tags (answer_tags), the last number (number), the last
    line (last_line), or the last match of a regular expression's one group; if absent, all of it
    without its thoughts."""
    normalise: bool = True
    """Compare without regard to case, spaces, a final period, and thousands' commas, $ and zeros
    after the point of numbers."""


class MathVerify(RewardConfig):
    """1 if math-verify finds the answer equal to that of the row, else 0; not scorable if it
    cannot read the row's. Of several boxes in the text only the last one counts."""

    name: str = "math_verify"
    column: str = "answer"
    """Column of the row with what is right."""


class ThinkFormat(RewardConfig):
    """1 if thoughts stand in think tags at the beginning of the text, once and not empty, where the
    model is to think, and nowhere else; else 0."""

    name: str = "think_format"
    thinking: Literal["on", "off", "prompt"] = "prompt"
    """Whether the model is to think; prompt: as the row's column `thinking` (true or false) says,
    or its system message ("detailed thinking off"); on where neither says anything."""
    opened: bool = False
    """The prompt ends with <think>, so the text begins inside of the thoughts."""


class Instructions(RewardConfig):
    """Whether the text follows the row's instructions, by IFEval's checkers of if-verifiable."""

    name: str = "instructions"
    mode: Literal["strict", "loose"] = "strict"
    """strict: the text as it is; loose: any of IFEval's eight variants of it, such as without its
    first line."""
    per: Literal["prompt", "instruction"] = "prompt"
    """prompt: 1 if all instructions are followed, else 0; instruction: the share of them."""
    benchmark: Literal["ifeval", "ifbench"] = "ifeval"
    """Whose checkers."""


class Length(RewardConfig):
    """1 at `target` tokens, falling to 0 at twice as many and at none."""

    name: str = "length"
    target: int = Field(ge=1)
    """Tokens of an answer."""


class SoftOverlong(RewardConfig):
    """0 up to `longest - cache` tokens, falling to -1 at `longest`: DAPO's punishment of answers
    that are too long (arXiv 2503.14476, equation 13)."""

    name: str = "soft_overlong"
    longest: int = Field(ge=1)
    """Tokens at which the punishment is whole."""
    cache: int = Field(ge=1)
    """Tokens over which it grows."""


class Code(RewardConfig):
    """1 if the answer's Python program passes the row's tests, run in a locked-down process."""

    name: str = "code"
    column: str = "tests"
    """Column of the row: a list of assertions, a list of {input, output} for standard input and
    output, or one text of assertions."""
    partial: bool = False
    """The share of the tests that pass, rather than 1 for all and 0 otherwise."""
    memory_gib: float = Field(1.0, gt=0)
    """That a program may take."""
    site_packages: bool = False
    """Programs may import what is installed beside Bevatron, such as numpy."""
    allow_unguarded: bool = False
    """Run programs also where this system cannot keep them from the network, from starting
    processes, or from writing files."""


class ReasoningGym(RewardConfig):
    """The score of reasoning_gym's own scorer for the row's problem."""

    name: str = "reasoning_gym"
    pattern: Pattern = None
    """What of the text is the answer, as for exact_match."""


class RewardModel(RewardConfig):
    """The score of a reward model, which is placed beside the trained model at its layout."""

    name: str = "reward_model"
    path: str
    """The model: a native checkpoint, a run, an HF folder or a Hub id."""
    like: str | None = None
    """Preset or spec file whose sizes it has, as `model.like`: for a dry run without it."""
    attributes: dict[str, float] = Field({})
    """Of a model with several scores: what each is multiplied by before they are added up."""


REWARDS: dict[str, type[RewardConfig]] = {
    kind.model_fields["name"].default: kind
    for kind in (
        PythonReward,
        ExactMatch,
        MathVerify,
        ThinkFormat,
        Instructions,
        Length,
        SoftOverlong,
        Code,
        ReasoningGym,
        RewardModel,
    )
}


def reward_of(given: Any) -> Any:
    """A reward's settings from its keys. Raises ValueError (pydantic's own among them)."""
    if isinstance(given, RewardConfig):
        return given
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError("expected a section with a name, such as {name: exact_match}")
    if given["name"] not in REWARDS:
        raise ValueError(f"name {given['name']!r} is unknown; known are {', '.join(REWARDS)}")
    return REWARDS[given["name"]].model_validate(given)


OneReward = Annotated[SerializeAsAny[RewardConfig], BeforeValidator(reward_of)]
RewardList = Annotated[list[OneReward], Field(min_length=1)]
