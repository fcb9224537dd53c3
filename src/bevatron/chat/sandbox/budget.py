"""What a template may spend: steps, characters, and time on the processor."""

from __future__ import annotations

import time
from typing import Any

from jinja2 import Undefined

from bevatron.chat.chat_error import ChatError

STEPS = 1_000_000  # about a second; a long chat takes a tenth of it
CHARACTERS = 8 << 20  # of all values made, on top of PER_INPUT times the input's
PER_INPUT = 16
SECONDS = 5.0
NODE = 16  # characters that a value of a list counts as, beside its own text
DEEPEST = 200  # lists in lists
READ = 1024  # characters read in the time of a step


class Budget:
    """One rendering's means. Each method raises ChatError before what is left would be exceeded.

    Time is that of this thread on the processor: a busy machine stops no template.
    """

    def __init__(self, input_characters: int) -> None:
        self.steps = STEPS + input_characters
        self.characters = CHARACTERS + PER_INPUT * input_characters
        self.deadline = time.thread_time() + SECONDS
        self._check_at = self.steps

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise ChatError(
                "the chat template takes too many steps (loops that are too long, or that never "
                "end); stopped"
            )
        if self.steps < self._check_at:
            self._check_at = self.steps - 4096
            if time.thread_time() > self.deadline:
                raise ChatError(f"the chat template takes more than {SECONDS:.0f} s; stopped")

    def read(self, characters: int) -> None:
        """Before looking through so many characters."""
        self.spend(1 + characters // READ)

    def make(self, characters: int) -> None:
        """Before making a value of so many characters."""
        self.read(characters)
        self.characters -= characters
        if self.characters < 0:
            raise ChatError("the chat template builds more text than a chat can have; stopped")

    def weigh(self, value: Any) -> tuple[int, int]:
        """Look through a value, paying for each part as often as it occurs: (characters, depth).

        What compares, hashes, prints or copies a value in one C call comes after this; a few
        lists that hold each other many times would keep it busy forever.
        """
        total, deepest = 0, 0
        left = [(value, 1)]
        while left:
            item, depth = left.pop()
            if depth > deepest:
                deepest = depth
                if depth > DEEPEST:
                    raise ChatError("the chat template nests values too deeply; stopped")
            total += NODE
            self.spend()
            if isinstance(item, str):
                total += len(item)
                self.read(len(item))
            elif isinstance(item, int) and not isinstance(item, bool):
                total += item.bit_length() // 3
            elif isinstance(item, dict):
                for key, inner in item.items():
                    left.append((key, depth + 1))
                    left.append((inner, depth + 1))
            elif isinstance(item, list | tuple) or type(item) in VIEWS:
                left.extend((inner, depth + 1) for inner in item)
        return total, deepest

    def make_like(self, value: Any) -> None:
        """Before making text of a value."""
        if isinstance(value, str):
            self.make(len(value))
        elif value is not None and not isinstance(value, Undefined):
            self.make(self.weigh(value)[0])


VIEWS: tuple[type, ...] = (type({}.items()), type({}.keys()), type({}.values()))
