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

from bevatron.train.report.curves import downsample, extent, log_ticks, short, ticks
from bevatron.train.report.record import Event, Floats, Series

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 26


@dataclass(frozen=True)
class Curve:
    """`style`: line, faint (behind a smoothed one; not under the pointer), dots, or points, which
    nothing connects. `rest`: in no colour of its own. `names`: of the points."""

    label: str
    run: int
    series: Series
    style: Literal["line", "faint", "dots", "points"] = "line"
    rest: bool = False
    names: tuple[str, ...] = ()

    @property
    def colour(self) -> str:
        """A class of the page's style."""
        return "rest" if self.rest else f"c{self.run % 6}"


@dataclass(frozen=True)
class Chart:
    """`from_zero`: the vertical axis begins at 0. `settles`: what lies above everything after the
    first fiftieth of the steps leaves the picture. `spikes`: the highest half percent of the values
    may. A wide range of positive values gets a logarithmic axis if `log`."""

    title: str
    curves: list[Curve]
    unit: str = ""
    wide: bool = False
    from_zero: bool = False
    log: bool = False
    spikes: bool = False
    settles: bool = False
    marks: list[tuple[int, Event]] = field(default_factory=list)  # run, event
    axis: str = "step"  # what is counted from left to right


def draw(chart: Chart) -> str:
    """A <figure> with the chart; nothing if there is no point to draw."""
    xs = extent([c.series.steps for c in chart.curves])
    ys = extent([c.series.values for c in chart.curves])
    if xs is None or ys is None:
        return ""
    width, height = (1096, 320) if chart.wide else (536, 216)
    x_low, x_high = xs if xs[1] > xs[0] else (xs[0] - 0.5, xs[0] + 0.5)
    x_low = 0.0 if 0 < x_low < 0.02 * x_high else x_low
    if all(c.style == "points" for c in chart.curves):  # none on the edge
        x_low, x_high = x_low - 0.04 * (x_high - x_low), x_high + 0.04 * (x_high - x_low)
    y_low, y_high, logarithmic = _range(chart, *ys, x_low + 0.02 * (x_high - x_low))
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
        parts.append(f'<text class="x" x="{px(tick):.1f}" y="{height - 8}">{short(tick)}</text>')
    name = f"clip{zlib.crc32(chart.title.encode())}"
    parts.append(
        f'<clipPath id="{name}"><rect x="{LEFT}" y="{TOP - 4}" width="{width - LEFT - RIGHT + 4}" '
        f'height="{height - TOP - BOTTOM + 5}"/></clipPath><g clip-path="url(#{name})">'
    )
    parts += [_curve(curve, px, py) for curve in chart.curves]
    parts.append("</g>")
    parts += [_mark(run, event, px, height) for run, event in chart.marks]
    parts.append("</svg>")
    frame = [LEFT, width - RIGHT, TOP, height - BOTTOM, x_low, x_high, y_low, y_high]
    last = sorted((c for c in chart.curves if c.style != "faint"), key=lambda c: c.run)
    return (
        f'<figure class="{"chart wide" if chart.wide else "chart"}" '
        f'data-axis="{escape(chart.axis)}" '
        f"data-frame='{json.dumps([*map(_plain, frame), int(logarithmic)])}'>"
        f"<figcaption><b>{escape(chart.title)}</b>{_legend(chart, last)}</figcaption>"
        f'<div class="plot">{"".join(parts)}</div>{_data(last)}</figure>'
    )


def _range(chart: Chart, low: float, high: float, settled: float) -> tuple[float, float, bool]:
    """Both ends of the vertical axis, and whether it is logarithmic."""
    if chart.settles:
        later = extent([c.series.values[c.series.steps >= settled] for c in chart.curves])
        high = later[1] if later is not None else high
    values = np.concatenate([c.series.values for c in chart.curves])
    if chart.spikes and len(values) >= 200:
        high = min(high, 1.1 * float(np.quantile(values, 0.995)))
    if chart.log and low > 0 and high / low > 8:
        return low / 1.1, high * 1.1, True
    if chart.from_zero and low >= 0:
        return 0.0, high * 1.06 or 1.0, False
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad, False


def _curve(curve: Curve, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    thin = downsample(curve.series)
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


def _mark(run: int, event: Event, px: Callable[[float], float], height: int) -> str:
    x = px(event.step)
    said = escape(f"step {event.step:,}: {event.kind}. {event.text}")
    return (
        f'<g class="mark {"bad" if event.kind in ("skip", "rewind") else ""}" data-run="{run}">'
        f"<title>{said}</title>"
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        f'<path d="M{x - 4:.1f} {TOP - 5}h8l-4 6z"/></g>'
    )


def _legend(chart: Chart, curves: list[Curve]) -> str:
    """What the colours are if there are several, and the last value of a single one."""
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
        thin = downsample(curve.series)
        xs, ys = ([_plain(v) for v in values.tolist()] for values in (thin.steps, thin.values))
        own = {"label": curve.label, "run": curve.run, "colour": curve.colour}
        out.append({**own, "x": xs, "y": ys})
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
