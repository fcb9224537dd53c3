"""Making curves fit to draw: fewer points without losing a spike, and smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
POINTS = 4000


@dataclass(frozen=True)
class Series:
    """Finite values by step."""

    steps: Floats
    values: Floats

    @property
    def last(self) -> float | None:
        return float(self.values[-1]) if len(self.values) else None


def kept(series: Series, points: int = POINTS) -> NDArray[np.intp]:
    """Which points stay if there may be so many. Of each run of neighbours the least and the
    greatest do, so that no spike is lost; the first and the last point do too."""
    n = len(series.values)
    if n <= points:
        return np.arange(n)
    edges = np.linspace(0, n, (points - 2) // 2 + 1).astype(int)
    keep = {0, n - 1}
    for a, b in pairwise(edges):
        part = series.values[a:b]
        keep |= {a + int(part.argmin()), a + int(part.argmax())}
    return np.array(sorted(keep))


def smooth(series: Series) -> Series | None:
    """A moving mean, twice, over about a fiftieth of the points: half of them before and half after
    (fewer near the beginning), so that it neither lags nor is pulled up by where the curve began.
    None for too few points to be worth it."""
    n = len(series.values)
    if n < 30:
        return None
    return Series(series.steps, _moving_mean(_moving_mean(series.values)))


def _moving_mean(values: Floats) -> Floats:
    n = len(values)
    at = np.arange(n)
    before = np.minimum(max(1, n // 140), at // 4)
    after = np.minimum(before, n - 1 - at)
    total = np.concatenate(([0.0], np.cumsum(values)))
    mean: Floats = (total[at + after + 1] - total[at - before]) / (before + after + 1)
    return mean
