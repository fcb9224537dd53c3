"""The feed of on-policy distillation: the student's own answers, for its teacher to read.

A batch of rollouts is made, used, saved and written to read as in reinforcement learning. Rewards
may be given; they are reported, and nothing else comes of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bevatron.align.rollout_feed import RolloutFeed, Timer
from bevatron.train.feed import Batch


class StudentFeed(RolloutFeed):
    """Samples: `tokens` [n, T] and `learned` [n, T]; see `sequences.py`."""

    def _make(self, step: int) -> dict[str, NDArray[Any]]:
        timer = Timer()
        self.answering.engine.refresh()
        groups = self._answered(self._groups, timer)
        rollouts = [one for group in groups for one in group.rollouts]
        sequences = self._sequences(rollouts)
        learned = sequences.learned
        if self.kind.mask_truncated_completions:
            learned = learned & np.array([one.finished for one in rollouts])[:, None]
        scores = np.concatenate([group.scores for group in groups])
        total = self.answering.weighted(scores)
        self.reported = self.answering.statistics(rollouts, scores, torch.from_numpy(total))
        if not self.kind.rewards:
            del self.reported["frac_reward_zero_std"]
        self.reported |= {f"time/{k}_s": v for k, v in timer.spent.items()}
        self._write(step, groups, total.tolist(), [0.0] * len(rollouts))
        return {"tokens": sequences.tokens, "learned": learned}

    def read_validation(self, positions: range) -> Batch:
        """A greedy answer to each problem."""
        _, asks = self._held_out(positions)
        sequences = self._sequences(self.answering.answer(asks))
        return self._own({"tokens": sequences.tokens, "learned": sequences.learned}, positions)
