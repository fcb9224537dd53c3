"""Importance scores on one HTML page that needs nothing else: layers, channels, and per layer the
heads and neurons from the most important on."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from bevatron.checkpoint.new_folder import replace_text
from bevatron.compress.scores import Floats, Scores
from bevatron.train.report.chart import Chart, Curve, draw
from bevatron.train.report.page import document
from bevatron.train.report.record import Series
from bevatron.train.report.tables import table

COLUMNS = 96  # of a heat map; neurons beyond are averaged in groups of neighbours
WIDTH, LEFT, CELL = 1096, 52, 14


def write_page(scores: Scores, path: Path) -> None:
    """Write the page, as a whole or not at all."""
    replace_text(path, page(scores))


def page(scores: Scores) -> str:
    """The HTML."""
    layers = range(len(scores.block_influence))
    heads = {i: scores.heads(i) for i in layers if f"layers.{i}.attention.heads" in scores.tensors}
    neurons = {i: scores.neurons(i) for i in layers if f"layers.{i}.mlp.neurons" in scores.tensors}
    name = Path(scores.metadata.get("model", "")).name or "model"
    body = [_header(scores, f"Importance in {name}")]
    body.append(f'<section class="charts">{"".join(map(draw, _charts(scores)))}</section>')
    body.append(_heat("Attention heads, sorted within each layer", "head", heads))
    body.append(_heat("Neurons, sorted within each layer", "neuron", neurons))
    body.append(_table(scores, heads, neurons))
    return document(f"Importance in {name}", "".join(body))


def _header(scores: Scores, title: str) -> str:
    m = scores.metadata
    tiles = [("Layers", f"{len(scores.block_influence):,}", "")]
    tiles += [("Channels", f"{len(scores.channels):,}", "")]
    if "samples" in m and "seq_len" in m:
        tiles.append(("Samples", f"{int(m['samples']):,}", f"of {int(m['seq_len']):,} tokens"))
    tiles.append(("Aggregation", escape(m.get("aggregation", "")), "samples, sequence"))
    if "loss" in m:
        tiles.append(("Loss", f"{float(m['loss']):.4f}", "nats per token"))
    shown = "".join(f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in tiles)
    what = " · ".join(m[k] for k in ("family", "model") if k in m)
    return (
        f'<h1>{escape(title)}</h1><p class="over">{escape(what)}</p><dl class="tiles">{shown}</dl>'
    )


def _charts(scores: Scores) -> list[Chart]:
    influence = Curve("block influence", 0, _series(scores.block_influence), "dots")
    channels = Curve("channels", 0, _series(np.sort(scores.channels)[::-1]))
    losses = []
    if scores.loss is not None:
        whole = np.full(len(scores.block_influence), scores.loss, dtype=np.float32)
        losses.append(Curve("whole model", 0, _series(whole)))
    for run, n in enumerate([1, *(n for n in scores.spans if n > 1)], 1):
        if (found := scores.loss_without(n)) is not None:
            label = "without layer" if n == 1 else f"without {n} layers from"
            losses.append(Curve(label, run, _series(found), "dots"))
    return [
        Chart("Block influence", [influence], wide=True, from_zero=True, axis="layer"),
        *([Chart("Loss without layers", losses, wide=True, axis="layer")] if losses else []),
        Chart("Channels, sorted", [channels], wide=True, from_zero=True, axis="rank"),
    ]


def _series(values: Floats) -> Series:
    return Series(np.arange(len(values), dtype=np.float64), values.astype(np.float64))


def _heat(title: str, what: str, rows: dict[int, Floats]) -> str:
    """A row per layer: scores from the highest on, relative to it."""
    if not rows:
        return ""
    columns = min(COLUMNS, max(map(len, rows.values())))
    width = (WIDTH - LEFT) / columns
    parts = []
    for y, (layer, values) in enumerate(rows.items()):
        parts.append(f'<text x="{LEFT - 8}" y="{y * CELL + 10.5}">{layer}</text>')
        order = np.argsort(-values)
        groups = np.array_split(order, min(columns, len(order)))
        top = float(values.max()) or 1.0
        for x, group in enumerate(groups):
            mean = float(values[group].mean())
            named = f"{what} {group[0]}" if len(group) == 1 else f"{len(group)} {what}s"
            parts.append(
                f'<rect x="{LEFT + x * width:.1f}" y="{y * CELL}" width="{max(width - 1, 1):.1f}" '
                f'height="{CELL - 1}" fill-opacity="{max(mean / top, 0):.3f}">'
                f"<title>layer {layer}, {named}: {mean:.4g}</title></rect>"
            )
    return (
        f'<h2>{title}</h2><figure class="heat" style="margin:0"><svg role="img" '
        f'aria-label="{title}" viewBox="0 0 {WIDTH} {len(rows) * CELL}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _table(scores: Scores, heads: dict[int, Floats], neurons: dict[int, Floats]) -> str:
    """Per layer, and how many neurons make up half and nine tenths of the sum of scores."""
    names = ["layer", "block influence", "heads", "neurons", "half in", "nine tenths in"]
    rows = []
    for i, influence in enumerate(scores.block_influence.tolist()):
        cells = [f"{i}", f"{influence:.4g}", f"{len(heads[i]):,}" if i in heads else ""]
        if i in neurons:
            share = np.cumsum(np.sort(neurons[i].astype(np.float64))[::-1])
            share /= share[-1] or 1.0
            within = [int(np.searchsorted(share, part) + 1) for part in (0.5, 0.9)]
            cells += [f"{len(share):,}", *(f"{min(n, len(share)):,}" for n in within)]
        else:
            cells += ["", "", ""]
        rows.append("".join(f'<td class="n">{cell}</td>' for cell in cells))
    return f"<h2>Layers</h2>{table(names, rows, numbers=0)}"
