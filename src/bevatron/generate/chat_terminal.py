"""`bevatron chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bevatron.chat.answer_parts import AnswerReader, Said, marker_tokens, opens_thoughts
from bevatron.chat.chat_messages import checked_tools
from bevatron.chat.chat_template import ChatTemplate
from bevatron.chat.tool_calls import ToolCall, tool_names
from bevatron.errors import BevatronError
from bevatron.generate.chat_keyboard import History, read
from bevatron.generate.conversation import SETTINGS, Conversation
from bevatron.generate.engine import Engine
from bevatron.generate.request import Request, Sampling
from bevatron.generate.sampling_options import chosen, in_words, model_name
from bevatron.generate.terminal_text import show

HELP = """\
/system [TEXT]    show or set the system prompt (/system - removes it)
/retry            answer the last message again
/undo             take back the last message and its answer
/reset            forget the conversation; the system prompt stays
/save FILE        keep the conversation as JSON
/load FILE        go on with one
/set [NAME VALUE] show or change: {settings}
/quit             end (or Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on; \"\"\" begins and ends a text of many lines.
A space before / sends a message that begins with /."""


def chat(
    ckpt: str,
    *,
    system: str | None,
    load: Path | None,
    tools: Path | None,
    chat_template: Path | None,
    max_new_tokens: int,
    asked: dict[str, Any],
    tp: int,
    pp: int,
    int8: bool,
    device: str | None,
    dtype: str | None,
) -> None:
    """Open a model and talk to it until the user ends it.

    Args:
        asked: fields of Sampling, None where the user said nothing.
    """
    chosen(Sampling(), asked)  # a mistake in it is said before a model is loaded
    known = _tools(tools)
    where: dict[str, Any] = {"device": device, "dtype": dtype, "max_batch": 1}
    with Engine.open(ckpt, tp=tp, pp=pp, int8=int8, **where) as engine:
        template = ChatTemplate.needed(engine.opened, engine.tokenizer, chat_template)
        random = replace(engine.sampling, seed=None)
        conversation = Conversation(chosen(random, asked), max_new_tokens)
        if load is not None:
            conversation.load(load)
        if system is not None:
            conversation.system = system
        Terminal(engine, template, conversation, known, model_name(ckpt)).run()


class Terminal:
    """The loop: read, do or answer, until the end."""

    def __init__(
        self,
        engine: Engine,
        template: ChatTemplate,
        conversation: Conversation,
        tools: list[dict[str, Any]] | None,
        name: str,
    ) -> None:
        self.name = name
        self.engine, self.template, self.conversation = engine, template, conversation
        self.tools = tools
        self.positions = min(engine.context, engine.max_tokens)
        self.dropped = 0
        self.commands: dict[str, Callable[[str], bool | None]] = {
            "/help": self._help,
            "/system": self._system,
            "/retry": self._retry,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/set": self._set,
            "/quit": lambda rest: True,
            "/exit": lambda rest: True,
        }

    def run(self) -> None:
        with History(list(self.commands)):
            how = in_words(self.conversation.sampling)
            note(f"{self.name}, {self.positions:,} tokens, {how}; /help, Ctrl-D ends")
            while True:
                try:
                    text = read()
                except KeyboardInterrupt:
                    show("\n")
                    note("Ctrl-D or /quit ends")
                    continue
                except EOFError:
                    show("\n")
                    return
                if text.strip() and self._do(text):
                    return

    def _do(self, text: str) -> bool:
        """Whether that was the end."""
        name, _, rest = text.partition(" ")
        try:
            if not text.startswith("/"):
                self.conversation.say(text.strip())
                self._answer()
            elif name in self.commands:
                return bool(self.commands[name](rest.strip()))
            else:
                note(f"there is no command {name}; /help lists them")
        except OSError as error:
            note(f"{error.filename or 'input/output'}: {error.strerror or error}")
        except BevatronError as error:
            note(str(error))
        return False

    # answers

    def _answer(self) -> None:
        """Let the model answer what was said last. If it cannot, that is taken back."""
        try:
            while calls := self._turn():
                for call in calls:
                    result = read(f"{call.name} gives> ")
                    message = {"role": "tool", "name": call.name, "content": result}
                    self.conversation.messages.append(message)
        except (KeyboardInterrupt, EOFError):  # instead of a tool's result
            show("\n")
            self.conversation.undo()
            note("taken back, as the tool gave nothing")
        except BevatronError:
            self.conversation.undo()
            raise

    def _turn(self) -> list[ToolCall]:
        """One answer, shown while it is made. Returns the tools that it calls."""
        conversation = self.conversation
        ids, dropped = conversation.fitting(self._encode, self.positions)
        if dropped != self.dropped:
            self.dropped = dropped
            if dropped:
                note(f"the conversation is too long: the model does not see its first {dropped}")
        limit = min(conversation.max_new_tokens, max(1, self.positions - len(ids)))
        stops = self.engine.stop_tokens | self.template.stop_tokens
        request = Request(
            tuple(ids),
            limit,
            conversation.sampling,
            stops,
            kept_tokens=marker_tokens(self.engine.tokenizer),
        )
        names = None if self.tools is None else tool_names(self.tools)
        reader = AnswerReader(names, thinking=opens_thoughts(self.engine.tokenizer, ids))
        said, times, reason = Said(), [time.perf_counter()], "interrupted"

        def take(new: Said) -> None:
            nonlocal said
            if new.thoughts:
                aside(new.thoughts)
            if new.text:
                show(new.text if said.text or not (said + new).thoughts else f"\n\n{new.text}")
            said += new

        stream = self.engine.submit(request)
        try:
            for piece in stream:
                times += [time.perf_counter()] * len(piece.tokens)
                take(reader.add(piece.text))
                reason = piece.finish_reason or reason
        except KeyboardInterrupt:
            stream.cancel()
        take(reader.finish())
        show("\n" if said.text or said.thoughts or not said.calls else "")
        if reason == "interrupted" and not (said.text or said.thoughts):
            conversation.undo()
            note("interrupted before the first word; the message is taken back")
            return []
        calls = list(said.calls) if reason in ("stop", "length") else []
        conversation.answer(said, calls)
        for call in calls:
            given = ", ".join(f"{k}={json.dumps(v)}" for k, v in call.arguments.items())
            note(f"calls {call.name}({given})")
        note(_pace(times) + REASONS.get(reason, ""))
        return calls

    def _encode(self, messages: Any) -> list[int]:
        return self.template.encode(messages, tools=self.tools)

    # commands

    def _help(self, rest: str) -> None:
        note(HELP.format(settings=", ".join(SETTINGS)))

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = None if rest == "-" else rest
        note(f"system prompt: {self.conversation.system or 'none'}")

    def _retry(self, rest: str) -> None:
        if self.conversation.take_back_answer() is None:
            note("there is nothing to answer again")
        else:
            self._answer()

    def _undo(self, rest: str) -> None:
        text = self.conversation.undo()
        note("there is nothing to take back" if text is None else f"taken back: {_short(text)}")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        note("forgotten")

    def _save(self, rest: str) -> None:
        if not rest:
            raise BevatronError("/save needs the name of a file")
        self.conversation.save(Path(rest).expanduser())
        note(f"saved {len(self.conversation.messages)} messages to {rest}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise BevatronError("/load needs the name of a file")
        self.conversation.load(Path(rest).expanduser())
        note(f"loaded {len(self.conversation.messages)} messages from {rest}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").partition(" ")
        if value.strip():
            self.conversation.set(name, value.strip())
        elif name:
            raise BevatronError(f"/set {name} needs a value, such as /set temperature 0.7")
        values = self.conversation.settings()
        note("  ".join(f"{k} {'random' if v is None else v}" for k, v in values.items()))


REASONS = {
    "length": "; cut off (/set max_new_tokens makes longer ones)",
    "interrupted": "; interrupted",
    "cancelled": "; interrupted",
}


def note(text: str) -> None:
    """Something that the program says, in the background's colour where there are colours."""
    for line in text.splitlines():
        aside(line)
        show("\n")


def aside(text: str) -> None:
    """Show a text in the background's colour where there are colours."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        show(text)
        return
    sys.stdout.write("\x1b[2m")
    show(text)
    sys.stdout.write("\x1b[0m")
    sys.stdout.flush()


def _pace(times: list[float]) -> str:
    """`times`: of the request, then of each token."""
    new = len(times) - 1
    text = f"{new} token{'s' * (new != 1)}"
    if new > 1 and times[-1] > times[1]:
        text += f", {(new - 1) / (times[-1] - times[1]):.1f} tokens/s"
    return text + (f", first after {times[1] - times[0]:.2f} s" if new else "")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def _tools(file: Path | None) -> list[dict[str, Any]] | None:
    if file is None:
        return None
    try:
        return checked_tools(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise BevatronError(f"{file}: is not JSON ({error}); expected a list of tools") from error
