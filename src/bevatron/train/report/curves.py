"""Curves as they are drawn: few enough points, smoothed, on axes with round numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bevatron.train.report.run_reading import Floats, Series

POINTS = 1500


def downsample(series: Series, points: int = POINTS) -> Series:
    """At most `points` of the points; see `kept`."""
    chosen = kept(series, points)
    return Series(series.steps[chosen], series.values[chosen])


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


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; only the powers if there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(powers) <= 4 else (1,)
    every = max(1, len(powers) // 6)
    found = [10.0**p * m for p in powers if p % every == 0 for m in multiples]
    return [t for t in found if low * 0.999 <= t <= high * 1.001]


def extent(values: list[Floats]) -> tuple[float, float] | None:
    found = [v for v in values if len(v)]
    if not found:
        return None
    return min(float(v.min()) for v in found), max(float(v.max()) for v in found)


def short(value: float) -> str:
    """A tick: 0.0005, 3.5, 250, 12k, 1.5M, 3e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4:
        return f"{value:.0e}" if math.isclose(value, float(f"{value:.0e}")) else f"{value:.1e}"
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"
