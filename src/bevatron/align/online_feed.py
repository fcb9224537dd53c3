"""The feed of online RPO: prompts with the model's own answers, the best one first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bevatron.align.policy_feed import PolicyFeed
from bevatron.align.rollouts import sampled
from bevatron.train.feed import Batch
from bevatron.train.objectives import BLANK

EVALUATED = 1_000_000  # numbers the draws of a validation, apart from those of the training


class OnlineFeed(PolicyFeed):
    """A sample is a prompt with `num_generations` answers and their rewards. One with an answer
    that nobody could score, or of which nothing is learned, counts for nothing.

    A validation answers as training does, with the same draws at every step.
    """

    def _make(self, step: int) -> dict[str, NDArray[Any]]:
        made = super()._make(step)
        return self._grouped(made["tokens"], made["learned"], made["rewards"])

    def read_validation(self, positions: range) -> Batch:
        k = self.kind.num_generations
        problems, asks = self._held_out(positions)
        many = [
            replace(ask, sampling=sampled(self.kind, self.seed, ask.position, EVALUATED + i))
            for ask in asks
            for i in range(k)
        ]
        rollouts = self.answering.answer(many)
        rewards = self.answering.weighted(self.answering.score(problems, rollouts, k))
        sequences = self._sequences(rollouts)
        mine = self._own(self._grouped(sequences.tokens, sequences.learned, rewards), positions)
        if (blank := mine.pop(BLANK, None)) is not None:
            mine["real"] = mine["real"] & ~blank
            mine["learned"] = mine["learned"] & mine["real"][:, None, None]
        return mine

    def _grouped(
        self, tokens: NDArray[np.int64], learned: NDArray[np.bool_], rewards: NDArray[Any]
    ) -> dict[str, NDArray[Any]]:
        """Of answers [n * K, T] samples [n, K, T], each with its best answer first."""
        k = self.kind.num_generations
        worth = rewards.reshape(-1, k)
        known = ~np.isnan(worth).any(1)  # [n]
        worth = np.nan_to_num(worth)
        order = np.argsort(-worth, axis=1, kind="stable")

        def ranked(array: NDArray[Any]) -> NDArray[Any]:
            whole = array.reshape(len(order), k, *array.shape[1:])
            return np.take_along_axis(
                whole, order.reshape(*order.shape, *[1] * (whole.ndim - 2)), 1
            )

        return {
            "tokens": ranked(tokens),
            "learned": ranked(learned) & known[:, None, None],
            "rewards": np.take_along_axis(worth, order, 1).astype(np.float32),
            "real": np.ones(len(order), dtype=bool),
        }
