"""Which problem comes when, by how often it is solved: from easy to hard, as Llama-Nemotron has it.

Problems above a pass rate are left out. Each batch's pass rates follow a Gaussian whose centre
moves from high to low; what its pools do not have comes from the largest ones that are left
(arXiv 2505.00949, section 5). Every problem comes once before one comes again. The order is a
function of the rates, the settings and the seed, so nothing of it is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from bevatron.align.problem_config import CurriculumConfig
from bevatron.data.permutation import derive
from bevatron.errors import BevatronError

POOLS = 20  # bins of pass rates, of equal width
SHUFFLED = 7  # tells this draw from others of the seed


class Curriculum:
    """Args:
        rates: of each problem, 0 to 1.
        batch: problems of a batch; steps: batches over which the centre moves.
    Attributes:
        kept: numbers of the problems that are not left out.
    Raises BevatronError if none are left.
    """

    def __init__(
        self,
        rates: Sequence[float],
        config: CurriculumConfig,
        *,
        batch: int,
        steps: int,
        seed: int,
    ) -> None:
        self.rates = np.array(rates, dtype=np.float64)
        self.config, self.batch, self.seed = config, batch, seed
        self.steps = config.steps or steps
        wanted = (self.rates >= config.drop_below) & (self.rates < config.drop_from)
        self.kept = np.nonzero(wanted)[0]
        if not len(self.kept):
            raise BevatronError(
                f"problems.curriculum: no problem has a pass rate from {config.drop_below:g} to "
                f"below {config.drop_from:g}; change drop_below or drop_from"
            )
        pools = np.minimum((self.rates[self.kept] * POOLS).astype(int), POOLS - 1)
        self._members = [self.kept[pools == pool].tolist() for pool in range(POOLS)]
        self._left: list[list[int]] = [[] for _ in range(POOLS)]
        self._order: list[int] = []
        self._epochs = 0

    def __getitem__(self, position: int) -> int:
        """The number of the problem at a position of the endless order."""
        while len(self._order) <= position:
            self._add(len(self._order) // self.batch)
        return self._order[position]

    def centre(self, number: int) -> float:
        """Of batch `number`'s Gaussian."""
        share = min(1.0, number / max(1, self.steps - 1))
        return self.config.start + share * (self.config.end - self.config.start)

    def quotas(self, number: int) -> NDArray[np.int64]:
        """[POOLS]: how many problems of batch `number` each pool should give."""
        middles = (np.arange(POOLS) + 0.5) / POOLS
        weights: NDArray[np.float64] = np.exp(
            -0.5 * ((middles - self.centre(number)) / self.config.width) ** 2
        )
        weights[[not members for members in self._members]] = 0.0
        if not weights.sum():  # all are too far off for a float
            nearest = [abs(m - self.centre(number)) for m in middles]
            weights = np.array([1 / (1e-9 + d) if p else 0.0
                                for d, p in zip(nearest, self._members, strict=True)])  # fmt: skip
        exact = self.batch * weights / weights.sum()
        counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
        for pool in np.argsort(counts - exact, kind="stable")[: self.batch - counts.sum()]:
            counts[pool] += 1
        return counts

    def _add(self, number: int) -> None:
        """Draw batch `number`."""
        taken: list[int] = []
        for pool, quota in enumerate(self.quotas(number)):
            for _ in range(quota):
                if not any(self._left):
                    self._refill()
                if not self._left[pool]:
                    pool_left = max(range(POOLS), key=lambda p: len(self._left[p]))
                    taken.append(self._left[pool_left].pop())
                else:
                    taken.append(self._left[pool].pop())
        self._order += taken

    def _refill(self) -> None:
        for pool, members in enumerate(self._members):
            self._left[pool] = list(members)
            Random(derive(self.seed, SHUFFLED, self._epochs, pool)).shuffle(self._left[pool])
        self._epochs += 1
