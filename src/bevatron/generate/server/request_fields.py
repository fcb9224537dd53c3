"""The fields of the requests that the server understands.

A field that is not here is refused by name: an answer that silently ignores a part of the request
is worse than an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from bevatron.generate.server.error_answers import UNSUPPORTED

MAX_PROMPTS = 128
MAX_TOKEN = 2**31 - 1

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, le=MAX_TOKEN)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


def _check_prompt(value: object) -> object:
    """One clear sentence instead of four, one for each shape that the prompt has not."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("expected a string, a list of strings, token ids, or a list of such lists")
    kinds = {type(item) for item in value}
    if kinds == {int}:
        return _check_tokens(value)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"holds {len(value)} prompts, at most {MAX_PROMPTS} are allowed")
    if kinds == {str}:
        return value
    if kinds == {list}:
        return [_check_tokens(item) for item in value]
    raise ValueError("a list must hold only strings, only token ids, or only lists of token ids")


def _check_tokens(value: list[Any]) -> list[int]:
    if not value:
        raise ValueError("a list of token ids is empty")
    for item in value:
        if type(item) is not int or not 0 <= item <= MAX_TOKEN:
            raise ValueError(f"token ids are whole numbers from 0 on, found {str(item)[:40]}")
    return value


def _check_stop(value: object) -> object:
    if isinstance(value, str) and not value:
        raise ValueError("a stop string must not be empty")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) <= 16 and all(isinstance(v, str) for v in value):
        if not all(value):
            raise ValueError("a stop string must not be empty")
        return value
    raise ValueError("expected a string or at most 16 strings")


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    BeforeValidator(_check_prompt),
    Field(description="Text, token ids, or a list of either"),
]
Stop = Annotated[str | list[Text] | None, BeforeValidator(_check_stop)]


def _check_limit(value: object) -> object:
    if value == 0 and not isinstance(value, bool):
        raise ValueError("expected at least 1, or -1 for no limit")
    return value


NO_LIMIT = "-1: as many as the context has room for"
Limit = Annotated[
    int, BeforeValidator(_check_limit), Field(ge=-1, le=MAX_TOKEN, description=NO_LIMIT)
]


def _unsupported(what: str = "") -> PydanticCustomError:
    said = f"{what} is not supported" if what else "is not supported by this server; leave it out"
    return PydanticCustomError(UNSUPPORTED, "{said}", {"said": said})


def _check_unused(value: object) -> object:
    """Of what asks for nothing as long as it is empty."""
    if value:
        raise _unsupported()
    return value


Unused = BeforeValidator(_check_unused)


class Strict(BaseModel):
    """Nothing that it does not know, but null, which asks for nothing: clients write out all the
    fields that they know."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None or k in cls.model_fields}


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against onlookers; there is none here


class Common(Strict):
    """What both kinds of completion take."""

    model: Annotated[str, Field(max_length=1000)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=1024)] | None = None

    # Not OpenAI's, but known to most local servers.
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    # Accepted, and without effect here.
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Common):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKEN, description=NO_LIMIT)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128, description="The same as n")] | None = None
    suffix: Annotated[
        Annotated[str, Field(max_length=0, description="Not supported")] | None, Unused
    ] = None


class TextPart(BaseModel):
    """What clients write beside the text (cache_control, annotations, ...) does not change it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text", "input_text", "output_text"] = "text"
    text: str


class RefusalPart(BaseModel):
    """Of an assistant's message: what it said."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["refusal"]
    refusal: str


def _check_content(value: object) -> object:
    """One finding, where it is, instead of one for each shape that the content has not."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of parts")
    for number, part in enumerate(value):
        if (wrong := _wrong_part(part)) is not None:
            where, what = wrong
            found = InitErrorDetails(type=what, loc=(number, *where), input=part)
            raise ValidationError.from_exception_data("content", [found])
    return value


def _wrong_part(part: object) -> tuple[tuple[str, ...], PydanticCustomError | str] | None:
    """Where in a part of a message something is wrong, and what; None if nothing is."""
    if not isinstance(part, dict):
        return (), PydanticCustomError("part", "expected an object with a type")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        return ("type",), _unsupported(str(kind)[:60])
    name = "refusal" if kind == "refusal" else "text"
    if name not in part:
        return (name,), "missing"
    return None if isinstance(part[name], str) else ((name,), "string_type")


Content = Annotated[str | list[TextPart | RefusalPart] | None, BeforeValidator(_check_content)]


class CalledFunction(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | dict[str, JsonValue] | None = None


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] | None = "function"
    function: CalledFunction
    index: int | None = Field(None, exclude=True)


WITHOUT_EFFECT = {"refusal", "annotations", "cache_control"}


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None

    # Accepted, and without effect here.
    annotations: list[JsonValue] | None = None
    cache_control: dict[str, JsonValue] | None = None

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        found = self.model_dump(exclude_none=True, exclude=WITHOUT_EFFECT)
        if not self.tool_calls:
            found.pop("tool_calls", None)
        if isinstance(self.content, list):
            texts = [p.text if isinstance(p, TextPart) else p.refusal for p in self.content]
            found["content"] = [{"type": "text", "text": text} for text in texts]
        elif self.content is None and not self.tool_calls and self.refusal is not None:
            found["content"] = self.refusal
        return {"content": None, **found}


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function
    cache_control: dict[str, JsonValue] | None = Field(None, exclude=True)


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[
        Annotated[list[JsonValue], Field(max_length=0, description="Not supported")] | None, Unused
    ] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    generation_config: (
        Annotated[
            str, Field(max_length=100_000, description="As transformers' command line sends it")
        ]
        | None
    ) = None


class LoadRequest(Strict):
    """What `transformers chat` sends before anything else."""

    model: Annotated[str, Field(max_length=1000)] | None = None
