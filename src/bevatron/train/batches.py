"""Which samples each step of a run takes, although its global batch may change between starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Since = tuple[int, int, int]  # from this step (counted from 0) and sample on, so many a step


class Batches:
    """The position in the order of samples, as a function of the step.

    Args:
        history: what held from when on; the first from step 0, then ascending.
    """

    def __init__(self, history: Sequence[Since]) -> None:
        self.history = [(int(step), int(at), int(size)) for step, at, size in history]

    @classmethod
    def of(cls, global_batch: int) -> Batches:
        """Those of a run whose global batch never changed."""
        return cls([(0, 0, global_batch)])

    @classmethod
    def saved(cls, state: Mapping[str, Any], global_batch: int) -> Batches:
        """Those of a step's train_state.json, which did not have them in earlier versions: its
        samples were always step * `global_batch`, that of its configuration."""
        return cls(state.get("batches", [(0, 0, global_batch)]))

    def followed_by(self, step: int, global_batch: int) -> Batches:
        """The same up to `step`, and batches of this size after it."""
        if self.history[-1][2] == global_batch:
            return self
        before = [since for since in self.history if since[0] < step]
        return Batches([*before, (step, self.position(step), global_batch)])

    def position(self, step: int) -> int:
        """The first sample of update number `step` (from 0): how many came before it."""
        first, at, size = next(s for s in reversed(self.history) if s[0] <= step)
        return at + (step - first) * size

    def state(self) -> list[Since]:
        """What train_state.json keeps of it."""
        return self.history
