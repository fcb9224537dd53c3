"""The charts of every page, as plain data that `charts.js` hands to the plotting library.

A reader of such a page sees values under the pointer, zooms by dragging, switches between linear
and logarithmic axes, and saves a chart as PNG or CSV. Nothing here knows about runs or models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bevatron.charts.thinning import Series, kept

COLOURS = 6  # of the page's style, c0 to c5


@dataclass(frozen=True)
class Curve:
    """`style`: line, dots on a dotted line, points, which nothing connects, or bars. `mean`: the
    same smoothed, which is drawn before the values. `rest`: in no colour of its own. `names`: of
    the points or bars. `marked`: bars that stand out, by their place."""

    label: str
    run: int
    series: Series
    style: Literal["line", "dots", "points", "bars"] = "line"
    rest: bool = False
    names: tuple[str, ...] = ()
    mean: Series | None = None
    marked: frozenset[int] = frozenset()

    @property
    def colour(self) -> str:
        """A class of the page's style."""
        return "rest" if self.rest else f"c{self.run % COLOURS}"


@dataclass(frozen=True)
class Mark:
    """Something that happened at `x`. `own`: in the colour of its run, one of several."""

    run: int
    x: float
    text: str
    bad: bool = False
    own: bool = False


@dataclass(frozen=True)
class Chart:
    """`axis` and `value`: what is counted from left to right and from below, with its unit.
    `from_zero`: the vertical axis begins at 0. `spikes`: the highest half percent of the values may
    leave the picture. A wide range of positive values begins on a logarithmic axis if `log`.
    `note`: in place of the last value."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    wide: bool = False
    from_zero: bool = False
    log: bool = False
    spikes: bool = False
    marks: Sequence[Mark] = field(default_factory=list)
    axis: str = "step"
    value: str = ""
    note: str = ""


def draw(chart: Chart) -> str:
    """A <figure> with the chart; nothing if there is no point to draw."""
    values = np.concatenate([np.empty(0), *(c.series.values for c in chart.curves)])
    if not len(values):
        return ""
    low, high = float(np.min(values)), float(np.max(values))
    shown: dict[str, Any] = {"axis": chart.axis, "value": chart.value, "unit": chart.unit}
    shown["log"] = chart.log and low > 0 and high / low > 8
    if chart.from_zero and low >= 0:
        shown["bottom"] = 0
    if chart.spikes and len(values) >= 200:
        shown["top"] = min(high, 1.1 * float(np.quantile(values, 0.995)))
    marks = [[m.run, plain(m.x), m.text, m.bad, m.own] for m in chart.marks]
    last = sorted(chart.curves, key=lambda c: c.run)
    return figure("curves", chart.title, shown | {"marks": marks}, [*map(_data, last)],
                  aside=_aside(chart, last), wide=chart.wide)  # fmt: skip


def heat(title: str, what: str, axis: str, rows: dict[int, list[tuple[str, float]]]) -> str:
    """A row of cells per layer, each relative to the highest of its row.

    Args:
        what: what a value is, in the words under the pointer.
        rows: by layer, the name and value of every cell from left to right.
    """
    shown = {"axis": axis, "value": what, "rows": [*map(str, rows)]}
    cells = []
    for y, found in enumerate(rows.values()):
        most = max((v for _, v in found), default=0.0) or 1.0
        for x, (name, value) in enumerate(found):
            cells.append([x, y, plain(max(value / most, 0.0)), plain(value), name])
    return figure("heat", title, shown, cells, wide=True, height=90 + 18 * len(rows))


def ranks(title: str, stages: Sequence[str], lines: Sequence[tuple[str, str, list[int]]]) -> str:
    """A column per stage, and a line per candidate from its rank in one to that in the next.

    Args:
        lines: label, colour and ranks, as far as they go.
    """
    most = max((r for *_, found in lines for r in found), default=1)
    data = [{"label": label, "colour": c, "ranks": found} for label, c, found in lines]
    return figure("ranks", title, {"stages": [*stages]}, data, wide=True, height=70 + 22 * most)


def figure(
    kind: str,
    title: str,
    shown: dict[str, Any],
    data: Sequence[Any],
    *,
    aside: str = "",
    wide: bool = False,
    height: int = 0,
) -> str:
    """A <figure> that the page's script draws. `aside`: HTML beside the title."""
    text = json.dumps([*data], separators=(",", ":")).replace("<", "\\u003c")
    tall = f' style="height:{height}px"' if height else ""
    return (
        f'<figure class="{"chart wide" if wide else "chart"}" data-kind="{kind}" '
        f'data-chart="{escape(json.dumps(shown))}">'
        f"<figcaption><b>{escape(title)}</b>{aside}</figcaption>"
        f'<div class="plot" role="img" aria-label="{escape(title)}"{tall}></div>'
        f'<script type="application/json">{text}</script></figure>'
    )


def _data(curve: Curve) -> dict[str, Any]:
    chosen = kept(curve.series)
    found: dict[str, NDArray[np.float64]] = {"x": curve.series.steps, "y": curve.series.values}
    if curve.mean is not None:
        found["mean"] = curve.mean.values
    out: dict[str, Any] = {"label": curve.label, "run": curve.run, "colour": curve.colour}
    out["style"] = curve.style
    out |= {name: [plain(v) for v in values[chosen]] for name, values in found.items()}
    if curve.names:
        out["names"] = [curve.names[i] for i in chosen]
    if curve.marked:
        out["marked"] = sorted(curve.marked)
    return out


def _aside(chart: Chart, curves: Sequence[Curve]) -> str:
    """What the colours are if there are several, and the note or last value of a single one."""
    if chart.note:
        return f'<span class="legend">{escape(chart.note)}</span>'
    if len(curves) == 1 and (last := curves[0].series.last) is not None:
        return f'<span class="last">{_value(last)}{escape(chart.unit)}</span>'
    items = [
        f'<button type="button" class="key {c.colour} {c.style}" data-run="{c.run}">'
        f"{escape(c.label)}</button>"
        for c in curves
    ]
    return f'<span class="legend">{"".join(items)}</span>'


def plain(value: float) -> float | int:
    """To six digits, and an integer where it is one."""
    return int(value) if value == int(value) else float(f"{value:.6g}")


def _value(value: float) -> str:
    return short(value) if abs(value) >= 1000 or abs(value) < 1e-4 else f"{value:.4g}"


def short(value: float) -> str:
    """0.0005, 3.5, 250, 12k, 1.5M, 3e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4:
        return f"{value:.1e}".replace(".0e", "e")
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"
