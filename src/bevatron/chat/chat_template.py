"""A checkpoint's own chat template, which makes text or token ids of messages.

The template is somebody else's program, and the messages are somebody else's text: neither is
trusted. `encode_chat.py` decides what happens to special tokens that stand in messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bevatron.chat.chat_messages import (
    ChatError,
    Message,
    checked_messages,
    checked_tools,
    merge_system,
    plain,
)
from bevatron.chat.encode_chat import EncodedChat, Encoder
from bevatron.chat.template_process import (
    Outline,
    Rendered,
    outline,
    render,
    render_beginnings,
)

FILE = "chat_template.jinja"
LARGEST = 512 * 1024  # characters of a template; published ones have up to 20,000
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Ends of turns that generation_config.json often leaves out, by name; others are found out by
# rendering. <|eom_id|> ends a message after which Llama 3.1 wants a tool's result.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|assistant_end|>", "<|im_end|>")
PROBE = "bevatron-probe"
GENERATION = re.compile(r"{%[-+]?\s*generation\b")
Chat = tuple[list[Message], Any, Any, dict[str, Any]]  # messages, tools, documents, variables


class Files(Protocol):
    """The small files that lie with a model, such as `bridge.open_weights.Opened`."""

    @property
    def folder(self) -> Path: ...

    @property
    def source(self) -> Path | None: ...

    def source_text(self, name: str) -> str | None: ...


@dataclass(frozen=True)
class Folder:
    """Those of a folder that may have no weights, as a tokenizer's own."""

    folder: Path

    @property
    def source(self) -> Path | None:
        return self.folder

    def source_text(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None


class ChatTemplate:
    """A template (or named ones: `default`, `tool_use`) with the tokenizer that it is for.

    Args:
        sources: name -> the template's text.
        tokenizer: a tokenizers.Tokenizer.
        tokens: the variables that hold special tokens, such as bos_token.
        where: how messages call the template, such as the path of its file.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        tokenizer: Any,
        tokens: Mapping[str, str] | None = None,
        where: str = "chat template",
    ) -> None:
        self.sources = dict(sources)
        self.tokenizer = tokenizer
        self.tokens = dict(tokens or {})
        self.where = where
        self._outlines: dict[str, Outline] = {}

    @classmethod
    def of(cls, opened: Files, tokenizer: Any) -> ChatTemplate | None:
        """The template among a checkpoint's source files, or None if there is none."""
        config = _json(opened, "tokenizer_config.json")
        tokens = special_tokens(_json(opened, "special_tokens_map.json") | config)
        found: dict[str, str] = {}
        if text := _text(opened, FILE):
            found["default"] = text
        extra = opened.source / "additional_chat_templates" if opened.source else None
        if extra is not None and extra.is_dir():
            for path in sorted(extra.iterdir()):
                if path.suffix == ".jinja":
                    found[path.stem] = _text(opened, f"{extra.name}/{path.name}") or ""
        if found:
            return cls(found, tokenizer, tokens, f"{opened.source or opened.folder}/{FILE}")
        where = f"{opened.source or opened.folder}/tokenizer_config.json"
        stored = config.get("chat_template")
        if isinstance(stored, str):
            found["default"] = stored
        elif isinstance(stored, list):
            for entry in stored:
                if not (isinstance(entry, dict) and isinstance(entry.get("template"), str)):
                    raise ChatError(f"{where}: chat_template has an entry without a template")
                found[str(entry.get("name"))] = entry["template"]
        elif isinstance(stored, dict):
            found |= {str(k): v for k, v in stored.items() if isinstance(v, str)}
        elif stored is not None:
            raise ChatError(f"{where}: chat_template is neither a text nor a list of named ones")
        return cls(found, tokenizer, tokens, where) if found else None

    @classmethod
    def needed(cls, opened: Files, tokenizer: Any, file: str | Path | None = None) -> ChatTemplate:
        """That of `file` if one is given, else the checkpoint's own; ChatError if there is none."""
        own = cls.of(opened, tokenizer)
        if file is not None:
            try:
                text = Path(file).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ChatError(f"{file}: cannot be read as a chat template ({error})") from error
            config = _json(opened, "tokenizer_config.json")
            tokens = special_tokens(_json(opened, "special_tokens_map.json") | config)
            return cls({"default": text}, tokenizer, tokens, str(file))
        if own is None:
            raise ChatError(
                f"{opened.folder}: has no chat template ({FILE}, or chat_template in "
                "tokenizer_config.json), as base models have none; complete plain text with "
                "`bevatron generate --prompt`, or pass one with --chat-template FILE"
            )
        return own

    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The text for a chat, as transformers' apply_chat_template(tokenize=False) gives it.

        A system message goes before the first user message where the template has no system role.

        Raises ChatError for whatever is wrong with the template, messages or tools.
        """
        chat = self.prepared(messages, tools, documents, template_kwargs)
        now = datetime.now()
        return self._render(chat, add_generation_prompt, continue_final_message, now).text

    def encode(
        self,
        messages: Any,
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """The token ids of `render`: special tokens that the template writes are tokens, those in
        messages, tools and variables are text."""
        chat = self.prepared(messages, tools, documents, template_kwargs)
        return self._encoded(chat, add_generation_prompt, continue_final_message)[0].ids

    def encode_with_mask(
        self, messages: Any, *, tools: Any = None, documents: Any = None, **template_kwargs: Any
    ) -> tuple[list[int], list[bool]]:
        """The token ids of a whole conversation, and which of them the assistant says: those that
        overlap what the template has within `{% generation %}`, as transformers masks them. None
        does where the template has no such mark."""
        chat = self.prepared(messages, tools, documents, template_kwargs)
        encoded, rendered = self._encoded(chat, False, False)
        return encoded.ids, encoded.overlapping(rendered.spans)

    def marks_answers(self, tools: Any = None) -> bool:
        """Whether the template says itself what the assistant says, by `{% generation %}`."""
        return GENERATION.search(self._source(self._name(tools))) is not None

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for tools."""
        return "tool_use" in self.sources or "tools" in self._outline("default").variables

    @cached_property
    def has_system_role(self) -> bool:
        """Whether a system message gets into the text, rather than lost or refused."""
        chat = [{"role": "system", "content": PROBE}, {"role": "user", "content": "x"}]
        try:
            return PROBE in self.evaluate((chat, None, None, {})).text
        except ChatError:
            return False

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end the assistant's turn: what the template writes after an answer, and the
        ends that the tokenizer has by name."""
        names = {name for name in ENDS if self.tokenizer.token_to_id(name) is not None}
        if "<|assistant_end|>" in names:  # NanoChat's next document
            names.add("<|bos|>")
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.evaluate(([*chat, chat[0]], None, None, {})).text
        except ChatError:
            text = ""
        after = text.partition(PROBE)[2].lstrip()
        encoder = Encoder.cached(self.tokenizer, self._outline("default").literals)
        names.update(t for t in encoder.control if after.startswith(t))
        ids = (self.tokenizer.token_to_id(name) for name in names)
        return frozenset(id for id in ids if id is not None)

    def prepared(
        self, messages: Any, tools: Any, documents: Any, variables: Mapping[str, Any]
    ) -> Chat:
        """Messages and tools, checked, in the form that this template takes."""
        checked = checked_tools(tools)
        chat = checked_messages(messages, self._source(self._name(checked)))
        if checked is not None and not self.takes_tools:
            raise ChatError(f"{self.where}: this model's chat template has no place for tools")
        if any(m["role"] == "system" for m in chat) and not self.has_system_role:
            chat = merge_system(chat)
        given = (chat, checked, plain(documents, "documents"), plain(variables, "variables"))
        return self._speechless(*given), *given[1:]

    def _speechless(
        self, chat: list[Message], tools: Any, documents: Any, variables: dict[str, Any]
    ) -> list[Message]:
        """Content that is None, as it stands beside tool calls, is left out, as transformers does
        it. Templates that fail at that, or then leave out the calls, get an empty text or null."""
        if all(message["content"] is not None for message in chat):
            return chat
        left_out = [{k: v for k, v in m.items() if v is not None} for m in chat]
        empty = [{**m, "content": m["content"] or ""} for m in chat]
        calls = [call for m in chat for call in m.get("tool_calls") or ()]
        inner = [call.get("function") for call in calls]
        named = [f if isinstance(f, dict) else call for f, call in zip(inner, calls, strict=True)]
        names = [str(f["name"]) for f in named if f.get("name")]
        best, most = left_out, -1
        for form in (left_out, empty, chat):
            try:
                text = self.evaluate((form, tools, documents, variables)).text
            except ChatError:
                continue
            written = sum(map(text.count, names))
            if written > most:
                best, most = form, written
        return best

    def encoded(self, chat: Chat, rendered: Rendered, now: datetime) -> EncodedChat:
        """The token ids of a `prepared` conversation, of which this is the text at this time."""
        known = [rendered.text]

        def text(chat: Chat) -> str:
            return known.pop() if known else self.evaluate(chat, False, now).text

        literals = self._outline(self._name(chat[1])).literals
        return Encoder.cached(self.tokenizer, literals).encode(chat, text)

    def _encoded(
        self, chat: Chat, add_generation_prompt: bool, continue_final: bool
    ) -> tuple[EncodedChat, Rendered]:
        now = datetime.now()  # one moment for all renderings of a chat
        made: list[Rendered] = []

        def rendered(chat: Chat) -> str:
            made.append(self._render(chat, add_generation_prompt, continue_final, now))
            return made[-1].text

        literals = self._outline(self._name(chat[1])).literals
        return Encoder.cached(self.tokenizer, literals).encode(chat, rendered), made[0]

    def _render(
        self, given: Chat, add_generation_prompt: bool, continue_final: bool, now: datetime
    ) -> Rendered:
        if not continue_final:
            return self.evaluate(given, add_generation_prompt, now)
        chat, tools, documents, variables = given
        # As transformers: what the template writes after the last message is cut off.
        final, tag = chat[-1].get("content"), "CONTINUE_FINAL_MESSAGE_TAG "
        if not final:
            raise ChatError("continue_final_message: the last message has no text to continue")
        tagged = [*chat[:-1], {**chat[-1], "content": final + tag}]
        text = self.evaluate((tagged, tools, documents, variables), False, now).text
        at = text.rfind(tag.strip())
        if at < 0 or final.strip() not in text:
            raise ChatError(
                "continue_final_message: the chat template does not write the last message as it is"
            )
        kept = text[:at]
        return Rendered(kept if text[at : at + len(tag)] == tag else kept.rstrip(), [])

    def evaluate(
        self, given: Chat, add_generation_prompt: bool = True, now: datetime | None = None
    ) -> Rendered:
        """The text of a `prepared` chat."""
        named = self._variables(given) | {"add_generation_prompt": add_generation_prompt}
        try:
            return render(self._source(self._name(given[1])), named, now or datetime.now())
        except ChatError as error:
            raise ChatError(f"{self.where}: {error}") from error

    def beginnings(
        self, given: Chat, cuts: Sequence[tuple[int, bool]], now: datetime
    ) -> list[Rendered]:
        """The texts of beginnings of a `prepared` chat: see `render_beginnings`."""
        source = self._source(self._name(given[1]))
        try:
            return render_beginnings(source, self._variables(given), cuts, now)
        except ChatError as error:
            raise ChatError(f"{self.where}: {error}") from error

    def _variables(self, given: Chat) -> dict[str, Any]:
        chat, tools, documents, variables = given
        named = {**self.tokens, **variables, "messages": chat, "tools": tools}
        return named | {"documents": documents}

    def _name(self, tools: Any) -> str:
        return "tool_use" if tools is not None and "tool_use" in self.sources else "default"

    def _source(self, name: str) -> str:
        if name not in self.sources:
            known = ", ".join(sorted(self.sources))
            raise ChatError(f"{self.where}: has no chat template named 'default', but {known}")
        source = self.sources[name]
        if len(source) > LARGEST:
            raise ChatError(
                f"{self.where}: the chat template has {len(source):,} characters, expected at "
                f"most {LARGEST:,}"
            )
        return source

    def _outline(self, name: str) -> Outline:
        if name not in self._outlines:
            source = self._source(name)
            try:
                self._outlines[name] = outline(source)
            except ChatError as error:
                raise ChatError(f"{self.where}: {error}") from error
        return self._outlines[name]


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json: each a text, or an object with one."""
    found = {}
    for kind in NAMED_TOKENS:
        value = config.get(f"{kind}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[f"{kind}_token"] = value
    return found


def _text(opened: Files, name: str) -> str | None:
    try:
        return opened.source_text(name)
    except (OSError, ValueError) as error:
        raise ChatError(f"{opened.source}/{name}: cannot be read ({error})") from error


def _json(opened: Files, name: str) -> dict[str, Any]:
    text = _text(opened, name)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{opened.source}/{name}: is not JSON ({error})") from error
    return found if isinstance(found, dict) else {}
