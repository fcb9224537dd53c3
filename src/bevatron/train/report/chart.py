"""One chart as inline SVG: axes, curves, marks. Colours and type come from the page's style, values
under the pointer from its script; without either the picture says the same."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np

from bevatron.train.report.curves import downsample, extent, kept, log_ticks, short, ticks
from bevatron.train.report.run_reading import Event, Floats, Series

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 42


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
        return "rest" if self.rest else f"c{self.run % 6}"


@dataclass(frozen=True)
class Mark:
    """An event. `name`: of its run, if there are several."""

    run: int
    event: Event
    name: str = ""

    @property
    def text(self) -> str:
        whose = f"{self.name}, " if self.name else ""
        return f"{whose}step {self.event.step:,}: {self.event.kind}. {self.event.text}"


@dataclass(frozen=True)
class Chart:
    """`axis` and `value`: what is counted from left to right and from below, with its unit.
    `from_zero`: the vertical axis begins at 0. `spikes`: the highest half percent of the values may
    leave the picture. A wide range of positive values gets a logarithmic axis if `log`. `note`: in
    place of the last value."""

    title: str
    curves: list[Curve]
    unit: str = ""
    wide: bool = False
    from_zero: bool = False
    log: bool = False
    spikes: bool = False
    marks: list[Mark] = field(default_factory=list)
    axis: str = "step"
    value: str = ""
    note: str = ""


def draw(chart: Chart) -> str:
    """A <figure> with the chart; nothing if there is no point to draw."""
    xs = extent([c.series.steps for c in chart.curves])
    ys = extent([c.series.values for c in chart.curves])
    if xs is None or ys is None:
        return ""
    width, height = (1096, 350) if chart.wide else (536, 246)
    x_low, x_high = xs if xs[1] > xs[0] else (xs[0] - 0.5, xs[0] + 0.5)
    x_low = 0.0 if 0 < x_low < 0.02 * x_high else x_low
    if any(c.style == "bars" for c in chart.curves):
        x_low, x_high = xs[0] - 0.5, xs[1] + 0.5
    elif all(c.style == "points" for c in chart.curves):  # none on the edge
        x_low, x_high = x_low - 0.04 * (x_high - x_low), x_high + 0.04 * (x_high - x_low)
    y_low, y_high, logarithmic = _range(chart, *ys)
    y_ticks = log_ticks(y_low, y_high) if logarithmic else ticks(y_low, y_high, 5)

    def px(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (width - LEFT - RIGHT)

    def py(value: float) -> float:
        part = (
            math.log(max(value, 1e-300) / y_low) / math.log(y_high / y_low)
            if logarithmic
            else (value - y_low) / (y_high - y_low)
        )
        return height - BOTTOM - min(1.04, max(-0.04, part)) * (height - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.title)}">']
    for tick in y_ticks:
        y = py(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 3.5:.1f}">{short(tick)}</text>')
    for tick in ticks(x_low, x_high, 8 if chart.wide else 5):
        if tick == round(tick):  # steps, layers and parameters are counted
            at = f'x="{px(tick):.1f}" y="{height - BOTTOM + 17}"'
            parts.append(f'<text class="x" {at}>{short(tick)}</text>')
    middle = (LEFT + width - RIGHT) / 2
    parts.append(f'<text class="x name" x="{middle}" y="{height - 6}">{escape(chart.axis)}</text>')
    parts.append(f'<text class="name" x="2" y="11">{escape(chart.value)}</text>')
    name = f"clip{zlib.crc32(chart.title.encode())}"
    parts.append(
        f'<clipPath id="{name}"><rect x="{LEFT}" y="{TOP - 4}" width="{width - LEFT - RIGHT + 4}" '
        f'height="{height - TOP - BOTTOM + 5}"/></clipPath><g clip-path="url(#{name})">'
    )
    base = min(height - BOTTOM, py(0.0)) if not logarithmic else height - BOTTOM
    parts += [_behind(curve, px, py) for curve in chart.curves if curve.mean is not None]
    parts += [_curve(curve, px, py, base) for curve in chart.curves]
    parts.append("</g>")
    parts += [_mark(mark, px, height) for mark in chart.marks]
    parts.append("</svg>")
    frame = [LEFT, width - RIGHT, TOP, height - BOTTOM, x_low, x_high, y_low, y_high]
    last = sorted(chart.curves, key=lambda c: c.run)
    events = json.dumps([[m.run, m.event.step, m.text] for m in chart.marks])
    return (
        f'<figure class="{"chart wide" if chart.wide else "chart"}" '
        f'data-axis="{escape(chart.axis)}" data-events="{escape(events)}" '
        f"data-frame='{json.dumps([*map(_plain, frame), int(logarithmic)])}'>"
        f"<figcaption><b>{escape(chart.title)}</b>{_legend(chart, last)}</figcaption>"
        f'<div class="plot">{"".join(parts)}</div>{_data(last)}</figure>'
    )


def _range(chart: Chart, low: float, high: float) -> tuple[float, float, bool]:
    """Both ends of the vertical axis, and whether it is logarithmic."""
    values = np.concatenate([c.series.values for c in chart.curves])
    if chart.spikes and len(values) >= 200:
        high = min(high, 1.1 * float(np.quantile(values, 0.995)))
    if chart.log and low > 0 and high / low > 8:
        return low / 1.1, high * 1.1, True
    if chart.from_zero and low >= 0:
        return 0.0, high * 1.06 or 1.0, False
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad, False


Place = Callable[[float], float]


def _behind(curve: Curve, px: Place, py: Place) -> str:
    """The values behind their mean."""
    points = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in _pairs(downsample(curve.series)))
    return f'<path class="{curve.colour} faint" data-run="{curve.run}" d="M{points}"/>'


def _curve(curve: Curve, px: Place, py: Place, base: float) -> str:
    """`base`: where bars stand."""
    if curve.style == "bars":
        return _bars(curve, px, py, base)
    thin = downsample(curve.mean or curve.series)
    points = [(px(x), py(y)) for x, y in _pairs(thin)]
    tag = f'class="{curve.colour} {curve.style}" data-run="{curve.run}"'
    if curve.style == "points":
        named = [*curve.names, *[""] * len(points)]
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(name)}</title></circle>'
            for (x, y), name in zip(points, named, strict=False)
        )
        return f"<g {tag}>{dots}</g>"
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    out = f'<path {tag} d="{path}"/>' if len(points) > 1 else ""
    if curve.style == "dots" or len(points) == 1:
        every = points if len(points) <= 200 else points[-1:]
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in every)
        out += f"<g {tag}>{dots}</g>"
    return out


def _bars(curve: Curve, px: Place, py: Place, base: float) -> str:
    """Half a bar's width of room on either side."""
    wide = 0.76 * (px(1.0) - px(0.0))
    out = []
    for i, (x, y) in enumerate(_pairs(curve.series)):
        top, low = sorted((py(y), base))
        kind = ' class="marked"' if i in curve.marked else ""
        named = f"<title>{escape(curve.names[i])}</title>" if curve.names else ""
        out.append(
            f'<rect{kind} x="{px(x) - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
            f'height="{max(low - top, 0.8):.1f}">{named}</rect>'
        )
    return f'<g class="{curve.colour} bars" data-run="{curve.run}">{"".join(out)}</g>'


def _mark(mark: Mark, px: Place, height: int) -> str:
    x, own = px(mark.event.step), f" own c{mark.run % 6}" if mark.name else ""
    return (
        f'<g class="mark{" bad" if mark.event.bad else ""}{own}" data-run="{mark.run}">'
        f"<title>{escape(mark.text)}</title>"
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        f'<path d="M{x - 4:.1f} {TOP - 5}h8l-4 6z"/></g>'
    )


def _legend(chart: Chart, curves: list[Curve]) -> str:
    """What the colours are if there are several, and the note or last value of a single one."""
    if chart.note:
        return f'<span class="legend">{escape(chart.note)}</span>'
    if len(curves) == 1 and curves[0].series.last is not None:
        last = curves[0].series.last
        return f'<span class="last">{_value(last)}{escape(chart.unit)}</span>'
    items = [
        f'<span class="key {c.colour} {c.style}" data-run="{c.run}">{escape(c.label)}</span>'
        for c in curves
    ]
    return f'<span class="legend">{"".join(items)}</span>'


def _data(curves: list[Curve]) -> str:
    """What the script shows under the pointer."""
    out = []
    for curve in curves:
        own: dict[str, object] = {"label": curve.label, "run": curve.run, "colour": curve.colour}
        chosen = kept(curve.series)
        found = {"x": curve.series.steps, "y": curve.series.values}
        if curve.mean is not None:
            found["mean"] = curve.mean.values
        shown = {name: [_plain(v) for v in values[chosen]] for name, values in found.items()}
        out.append({**own, **shown})
    text = json.dumps(out, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _pairs(series: Series) -> list[tuple[float, float]]:
    steps: Floats = series.steps
    return list(zip(steps.tolist(), series.values.tolist(), strict=True))


def _plain(value: float) -> float | int:
    rounded = float(f"{value:.6g}")
    return int(value) if value == int(value) else rounded


def _value(value: float) -> str:
    return short(value) if abs(value) >= 1000 or abs(value) < 1e-4 else f"{value:.4g}"
