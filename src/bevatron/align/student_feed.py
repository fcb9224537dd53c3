"""The feed of on-policy distillation: the student's own answers, for its teacher to read.

A batch of rollouts is made, used, saved and written to read as in reinforcement learning. Rewards
may be given; they are reported, and nothing else comes of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bevatron.align.rollout_feed import RolloutFeed, Timer
from bevatron.align.rollout_files import write_rollouts
from bevatron.generate.request import Sampling
from bevatron.train.feed import Batch
from bevatron.train.objectives import BLANK


class StudentFeed(RolloutFeed):
    """Samples: `tokens` [n, T] and `learned` [n, T]; see `sequences.py`."""

    def _make(self, step: int) -> dict[str, NDArray[Any]]:
        timer = Timer()
        assert self.engine is not None
        self.engine.refresh()
        groups = self._answered(self._groups, timer)
        rollouts = [one for group in groups for one in group.rollouts]
        sequences = self._sequences(rollouts)
        learned = sequences.learned
        if self.kind.mask_truncated_completions:
            learned = learned & np.array([one.finished for one in rollouts])[:, None]
        scores = np.concatenate([group.scores for group in groups])
        total = self._weighted(scores)
        self.reported = self._statistics(rollouts, scores, torch.from_numpy(total))
        if not self.kind.rewards:
            del self.reported["frac_reward_zero_std"]
        self.reported |= {f"time/{k}_s": v for k, v in timer.spent.items()}
        if self.is_main:
            folder = Path(self.config.run.dir) / "rollouts"
            nothing = [0.0] * len(rollouts)
            write_rollouts(folder, step + 1, groups, self._reward_names, total.tolist(), nothing)
        return {"tokens": sequences.tokens, "learned": learned}

    def read_validation(self, positions: range) -> Batch:
        """A greedy answer to each problem."""
        assert self.engine is not None
        n = len(positions)
        first = positions.start - self.dp_rank * n
        real = range(first, min(first + n * self.dp, len(self.validation)))
        self.engine.refresh()
        before, self.cursor = self.cursor, first
        try:
            _, asks = self._asked(self.validation, len(real))
        finally:
            self.cursor = before
        rollouts = self._rolled([replace(ask, sampling=Sampling()) for ask in asks])
        sequences = self._sequences(rollouts)
        at = np.array(positions)
        mine = np.minimum(at - first, len(real) - 1)
        rows: Batch = {"tokens": sequences.tokens[mine], "learned": sequences.learned[mine]}
        blank = at >= len(self.validation)
        return rows | ({BLANK: blank} if blank.any() else {})
