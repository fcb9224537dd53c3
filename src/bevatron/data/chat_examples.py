"""Examples to learn from: token ids, and which of them are learned.

Of a conversation the assistant's answers are learned, of a prompt and its completion the
completion, of a text all of it; each with the token that ends it. A conversation is what the
model's chat template makes of it, tokenized in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bevatron.chat.assistant_turns import Told, assistant_turns
from bevatron.chat.chat_messages import ChatError
from bevatron.chat.chat_template import ChatTemplate, Folder
from bevatron.checkpoint.strict_json import read_object
from bevatron.data.tokenizer import OpenTokenizer, open_tokenizer
from bevatron.errors import BevatronError

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """Attributes:
    ids: [T] int64.
    learned: [T] bool, the ids that are learned, at least one; never the first one, which nothing
        comes before.
    split: how many learned parts begin inside of a token, which holds the end of what comes before
        as well. At inference such a prompt ends in other tokens.
    """

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]
    split: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ChatExamples:
    """Makes examples with one model's tokenizer and chat template.

    Attributes:
        template: None if the model has none: then messages cannot be read.
        assistant_only: of messages learn what the assistant says, and not all of them.
        completion_only: of a prompt and its completion learn nothing of the prompt.
    """

    tokenizer: OpenTokenizer
    template: ChatTemplate | None
    assistant_only: bool = True
    completion_only: bool = True

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        chat_template: str | Path | None = None,
        assistant_only: bool = True,
        completion_only: bool = True,
    ) -> ChatExamples:
        """Those of a tokenizer: see `open_tokenizer`.

        Args:
            chat_template: a file in place of the tokenizer's own template.
        Raises BevatronError if there is no tokenizer, or the template cannot be read."""
        opened = open_tokenizer(source)
        files = Folder(opened.file.parent)
        if chat_template is not None:
            template: ChatTemplate | None = ChatTemplate.needed(
                files, opened.encoder, chat_template
            )
        else:
            template = ChatTemplate.of(files, opened.encoder)
        return cls(opened, template, assistant_only, completion_only)

    def messages(self, messages: Messages, tools: Any = None, **variables: Any) -> Example:
        """A conversation as one example. Raises ChatError where it takes several (see
        `conversation`), for no answer in it, and for whatever the template cannot do with it."""
        return self._one(self.conversation(messages, tools, **variables))

    def conversation(
        self, messages: Messages, tools: Any = None, **variables: Any
    ) -> list[Example]:
        """The examples of a conversation. They are several where the template writes answers in
        another way once the conversation goes on: each is learned as it was said."""
        if not self.assistant_only:
            return [self._all(messages, tools, variables)]
        told = assistant_turns(
            self._template, messages, tools=tools, stops=self._stops, **variables
        )
        return [_example(one) for one in told]

    def completion(
        self,
        prompt: str | Messages,
        completion: str | Messages,
        tools: Any = None,
        **variables: Any,
    ) -> Example:
        """A prompt and what is to follow it, both as texts or both as messages. Of texts the
        completion ends with the eos token. Raises ChatError as `messages` does."""
        return self._one(self.completions(prompt, completion, tools, **variables))

    def completions(
        self,
        prompt: str | Messages,
        completion: str | Messages,
        tools: Any = None,
        **variables: Any,
    ) -> list[Example]:
        """The examples of a prompt and its completion, of which there are several where messages
        of the completion take several (see `conversation`)."""
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ChatError(
                "the prompt and the completion are a text and a list of messages; expected two of "
                "a kind"
            )
        if isinstance(prompt, str):
            assert isinstance(completion, str)
            return [self.text(completion, prompt)]
        assert not isinstance(completion, str)
        both = [*prompt, *completion]
        if self.completion_only and not self.assistant_only:
            return [self._all(both, tools, variables, prompt)]
        if not self.completion_only:
            return self.conversation(both, tools, **variables)
        told = assistant_turns(
            self._template,
            both,
            tools=tools,
            last=len(completion),
            stops=self._stops,
            **variables,
        )
        return [_example(one) for one in told]

    def text(self, text: str, prompt: str = "") -> Example:
        """A text that goes on behind a prompt, with the tokens that the tokenizer adds to a text,
        and the eos token behind it. Both are tokenized in one piece."""
        eos = self.tokenizer.eos_id
        if eos is None:
            raise BevatronError(
                f"{self.tokenizer.file}: no eos token is named beside it, so a model would never "
                "learn where a text ends; name eos_token in tokenizer_config.json"
            )
        encoding = self.tokenizer.encoder.encode(prompt + text)
        ids, begin = list(encoding.ids), len(prompt) if self.completion_only else 0
        behind = [i for i, (_, end) in enumerate(encoding.offsets) if end > begin]
        first = behind[0] if behind and begin else len(ids) if begin else 0
        split = begin > 0 and bool(behind) and encoding.offsets[first][0] < begin
        if not ids or ids[-1] != eos:
            ids.append(eos)
        learned = np.arange(len(ids)) >= min(first, len(ids) - 1)
        return _checked(np.array(ids, dtype=np.int64), learned, int(split))

    def prompt(self, prompt: str | Messages, tools: Any = None, **variables: Any) -> list[int]:
        """The token ids of a prompt: of messages with the beginning of the answer that is asked
        for, as a model sees it."""
        if isinstance(prompt, str):
            return list(self.tokenizer.encoder.encode(prompt).ids)
        return self._template.encode(prompt, tools=tools, **variables)

    @property
    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ChatError(
                f"{self.tokenizer.file}: has no chat template beside it, as base models have none, "
                "so messages cannot be read; name a file with one (objective.chat_template of a "
                "run, --chat-template of a command), or give texts"
            )
        return self.template

    @cached_property
    def _stops(self) -> frozenset[int]:
        """Tokens that end an answer, as the model's files name them."""
        path = self.tokenizer.file.parent / "generation_config.json"
        named = read_object(path).get("eos_token_id") if path.is_file() else None
        ids = named if isinstance(named, list) else [named]
        return frozenset(i for i in (*ids, self.tokenizer.eos_id) if isinstance(i, int))

    def _all(
        self, messages: Messages, tools: Any, variables: Mapping[str, Any], prompt: Messages = ()
    ) -> Example:
        """All of a conversation is learned, or what follows the prompt."""
        template = self._template
        ids = template.encode(messages, tools=tools, add_generation_prompt=False, **variables)
        given = template.encode(prompt, tools=tools, **variables) if prompt else []
        pairs = zip(given, ids, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(ids)))
        return _checked(np.array(ids, dtype=np.int64), np.arange(len(ids)) >= first, 0)

    def _one(self, examples: list[Example]) -> Example:
        if len(examples) > 1:
            raise ChatError(
                f"{self._template.where}: the template writes answers in another way once the "
                f"conversation goes on, so this one makes {len(examples)} examples where one is "
                "needed; give the earlier messages as the prompt and the last answer as the "
                "completion"
            )
        return examples[0]


def _example(told: Told) -> Example:
    return _checked(np.array(told.ids, dtype=np.int64), np.array(told.said, dtype=bool), told.split)


def _checked(ids: NDArray[np.int64], learned: NDArray[np.bool_], split: int) -> Example:
    learned[:1] = False
    if not learned.any():
        raise ChatError("there is nothing to learn: what is learned has no token")
    return Example(ids, learned, split)
