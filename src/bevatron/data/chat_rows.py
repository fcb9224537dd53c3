"""Rows to learn from in TRL's columns.

`messages` (or ShareGPT's `conversations`), perhaps with `tools` and `chat_template_kwargs`;
`prompt` and `completion`, both texts or both messages; or `text`. Other columns mean nothing.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from bevatron.chat.chat_messages import ChatError
from bevatron.chat.template_process import own_processes
from bevatron.data.chat_examples import ChatExamples, Example
from bevatron.data.dataset_rows import Row, Rows
from bevatron.data.labelled_examples import is_text
from bevatron.data.tokenize import cores
from bevatron.errors import BevatronError

COLUMNS = '"messages", "prompt" and "completion", or "text"'
FEW, AHEAD = 64, 8  # rows that are not worth threads; rows that a thread may be ahead
# Arguments of what renders a conversation, which are no variables of its template.
TAKEN = {"self", "template", "messages", "prompt", "completion", "tools", "stops", "last"}
TAKEN |= {"add_generation_prompt", "continue_final_message"}
SHAREGPT = {"human": "user", "gpt": "assistant", "bing": "assistant", "observation": "tool"}


def check_row(row: Row) -> None:
    """Raise BevatronError for a row whose columns cannot be used."""
    if "prompt" in row or "completion" in row:
        found = [row.get("prompt"), row.get("completion")]
        if not (all(map(is_text, found)) or all(map(_is_messages, found))):
            raise BevatronError(
                '"prompt" and "completion" are not two texts or two lists of messages; the row '
                f"has {_keys(row)}"
            )
    elif "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        if not _is_messages(row[name]):
            raise BevatronError(f'"{name}" is not a list of messages')
    elif row.get("text") is None:
        raise BevatronError(f"the row has {_keys(row)}; expected {COLUMNS}")
    elif not is_text(row["text"]):
        raise BevatronError(f'"text" is {str(row["text"])[:60]!r}, expected a text')


def examples_of(examples: ChatExamples, row: Row) -> list[Example]:
    """The examples of a row, however long. Raises BevatronError."""
    if "text" in row and not {"prompt", "completion", "messages", "conversations"} & set(row):
        return [examples.text(row["text"])]
    tools, variables = template_inputs(row)
    try:
        if "prompt" in row:
            both = row["prompt"], row["completion"]
            return examples.completions(*both, tools, **variables)
        messages = row["messages"] if "messages" in row else _renamed(row["conversations"])
        return examples.conversation(messages, tools, **variables)
    except ChatError as error:
        raise BevatronError(str(error)) from error


def template_inputs(row: Row) -> tuple[Any, dict[str, Any]]:
    """The tools of a row, and the variables for its chat template. Raises BevatronError."""
    tools, variables = _parsed(row, "tools"), _parsed(row, "chat_template_kwargs")
    if not variables:
        return tools, {}
    if not isinstance(variables, dict):
        raise BevatronError(
            f'"chat_template_kwargs" is {str(variables)[:60]!r}, expected an object such as '
            '{"enable_thinking": false}'
        )
    if taken := sorted(TAKEN & variables.keys()):
        raise BevatronError(
            f'"chat_template_kwargs" has {taken[0]!r}, which is not for a row to say'
        )
    return tools, variables


def examples_of_rows(
    examples: ChatExamples, rows: Rows, numbers: Sequence[int], workers: int | None = None
) -> Iterator[list[Example]]:
    """The examples of each of these rows, in order, made of several at a time.

    Args:
        workers: threads, of which each has a process for its templates; default: one per core.
    Raises BevatronError naming the row that cannot be read."""

    def made(number: int) -> list[Example]:
        try:
            return examples_of(examples, rows[number])
        except BevatronError as error:
            raise BevatronError(f"{rows.where(number)}: {error}") from None

    count = min(workers or cores(), len(numbers))
    if count <= 1 or len(numbers) < FEW:
        yield from map(made, numbers)
        return
    with own_processes() as begin, ThreadPoolExecutor(count, initializer=begin) as pool:
        ahead: deque[Future[list[Example]]] = deque()
        try:
            for number in numbers:
                ahead.append(pool.submit(made, number))
                if len(ahead) > AHEAD * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _parsed(row: Mapping[str, Any], key: str) -> Any:
    """A value that may be JSON in a text, as tables have what differs from row to row."""
    value = row.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BevatronError(f'"{key}" is not valid JSON ({error})') from error


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def _renamed(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ShareGPT's turns, of which each is {"from", "value"}, as messages."""
    return [
        {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
        if "from" in turn
        else dict(turn)
        for turn in turns
    ]


def _keys(row: Row) -> str:
    return "the keys " + (", ".join(map(repr, row))[:200] or "(none)")
