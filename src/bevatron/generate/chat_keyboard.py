"""Reading what the user types in the terminal."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path


def read(prompt: str = ">>> ") -> str:
    """What the user types: a line, more after a backslash, or all between triple quotes."""
    shown = prompt if sys.stdin.isatty() else ""
    more = "... " if shown else ""
    line = _line(shown)
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(_line(more))
        return "\n".join(lines).rstrip().removesuffix('"""').strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_line(more))
    return "\n".join(lines)


def _line(prompt: str) -> str:
    # What is no UTF-8 arrives as lone surrogates, which no tokenizer takes.
    return input(prompt).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class History:
    """Line editing, completion of commands, and a history that outlives the conversation."""

    def __init__(self, commands: list[str]) -> None:
        self.commands = commands
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        self.file = Path(state).expanduser() / "bevatron" / "chat_history"

    def __enter__(self) -> None:
        if not sys.stdin.isatty():
            return
        try:
            import readline
        except ImportError:  # there is none on Windows
            return
        with suppress(OSError):
            readline.read_history_file(self.file)
        readline.set_history_length(1000)
        readline.set_completer_delims("")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message

    def __exit__(self, *exc: object) -> None:
        if "readline" not in sys.modules or not sys.stdin.isatty():
            return
        import readline

        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch(mode=0o600)
            readline.write_history_file(self.file)

    def _complete(self, text: str, state: int) -> str | None:
        found = [command for command in self.commands if text and command.startswith(text)]
        return found[state] if state < len(found) else None
