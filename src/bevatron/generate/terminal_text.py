"""Making a model's text safe to print on a terminal.

A terminal obeys escape sequences, which can change its title, its clipboard or what seems to have
been typed. So escape sequences in a model's text are shown as signs.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters but tab and newline, and those that reverse the direction of text.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """The text with a visible sign in place of what a terminal would obey."""
    return OBEYED.sub(lambda m: _sign(ord(m.group())), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # such as ␛
    return "␡" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"


def show(text: str, out: TextIO | None = None) -> None:
    """Print now, without a newline: harmlessly on a terminal, as it is to a file or a pipe."""
    stream = sys.stdout if out is None else out
    stream.write(harmless(text) if stream.isatty() else text)
    stream.flush()
