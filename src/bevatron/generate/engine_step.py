"""One forward of the engine as data: what all ranks compute next, decided by rank 0."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive prompt tokens of one sequence.

    Attributes:
        row: of the cache; start: the position of the first token.
        length: of the whole prompt, which a dynamic rope depends on.
        sample: whether the logits after the last token are wanted.
        targets: the tokens that follow the first ones of these, to be scored; `top`: and how many
            likeliest beside each.
    """

    row: int
    start: int
    tokens: list[int]
    length: int
    sample: bool = False
    targets: list[int] = field(default_factory=list)
    top: int = 0


class Move(NamedTuple):
    """The first `length` positions of two rows of the cache change places, or (`copy`) those of the
    first one are copied to the second."""

    source: int
    target: int
    length: int
    copy: bool


@dataclass(frozen=True)
class Step:
    """The next forward.

    Attributes:
        rows, capacity: that the cache must have.
        moves: of rows of the cache, which come first, in their order.
        tokens: the newest token of the sequences in rows 0, 1, ... ; `positions`: theirs.
        prefill: what is computed of prompts beside them.
    """

    rows: int
    capacity: int
    moves: list[Move]
    tokens: list[int]
    positions: list[int]
    prefill: list[Segment]

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.tokens) + sum(len(s.tokens) for s in self.prefill)

    @property
    def wanted(self) -> list[int]:
        """Which of the tokens have their logits returned."""
        out, at = list(range(len(self.tokens))), len(self.tokens)
        for segment in self.prefill:
            at += len(segment.tokens)
            if segment.sample:
                out.append(at - 1)
        return out

    def to_bytes(self) -> bytes:
        fields = dict(vars(self))
        fields["prefill"] = [vars(segment) for segment in self.prefill]
        return json.dumps(fields, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Step:
        fields: dict[str, Any] = json.loads(data)
        fields["moves"] = [Move(*move) for move in fields["moves"]]
        fields["prefill"] = [Segment(**segment) for segment in fields["prefill"]]
        return Step(**fields)


@dataclass(frozen=True)
class Scores:
    """Of the targets of a segment: [n] log-probabilities and whether each was the likeliest,
    [n, top] likeliest tokens and their log-probabilities."""

    logprobs: Tensor
    greedy: Tensor
    tokens: Tensor
    top: Tensor


@dataclass(frozen=True)
class Output:
    """logits [wanted, V], fp32, and the scores of the segments that have targets, in order."""

    logits: Tensor
    scores: list[Scores]
