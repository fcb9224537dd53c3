"""Importance scores on one self-contained HTML page.

The page shows layers, channels, and for each layer its heads and neurons, the most important first.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from bevatron.charts.chart import Chart, Curve, draw, heat
from bevatron.charts.html_page import document, table
from bevatron.charts.thinning import Series
from bevatron.checkpoint.new_folder import replace_text
from bevatron.compress.importance_scores import Floats, Scores
from bevatron.compress.pruned_spec import layers_to_keep

COLUMNS = 96  # of a heat map; neurons beyond are averaged in groups of neighbours


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
    body.append(_dropped(scores, heads, neurons))
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
    values = scores.block_influence
    going = frozenset(_going(scores, _fewer(len(values))[0]))
    names = tuple(f"layer {i}: {v:.4g}" for i, v in enumerate(values.tolist()))
    influence = Curve("block influence", 0, _series(values), "bars", names=names, marked=going)
    note = f"red: what --num-layers {_fewer(len(values))[0]} drops" if going else ""
    cosine = "1 - mean cosine of the residual stream before and after"
    charts = [
        Chart("Block influence", [influence], wide=True, from_zero=True, axis="layer",
              value=cosine, note=note)
    ]  # fmt: skip
    for n in [1, *(n for n in scores.spans if n > 1)]:
        found = scores.loss_without(n)
        if found is None or scores.loss is None:
            continue
        added = found - scores.loss
        what = "a layer" if n == 1 else f"{n} layers"
        names = tuple(f"without {_span(i, n)}: {v:.4f}" for i, v in enumerate(found.tolist()))
        curve = Curve("loss added", 0, _series(added), "bars", names=names)
        charts.append(
            Chart(
                f"Loss added by leaving out {what}",
                [curve],
                wide=True,
                from_zero=True,
                axis="layer" if n == 1 else "first of the layers",
                value="nats per token",
                note=f"whole model {scores.loss:.4f}",
            )
        )
    channels = Curve("channels", 0, _series(np.sort(scores.channels)[::-1]))
    return [
        *charts,
        Chart("Channels of the residual stream", [channels], wide=True, from_zero=True,
              axis="channels, from the most important on",
              value=_scored(scores), note=f"{len(scores.channels):,} channels"),
    ]  # fmt: skip


def _scored(scores: Scores) -> str:
    """What a score is."""
    over = scores.metadata.get("aggregation", "").split(",")
    how = f": {over[0]} over samples, {over[1]} over the sequence" if len(over) == 2 else ""
    return f"score: size of the activations{how}"


def _span(first: int, layers: int) -> str:
    return f"layer {first}" if layers == 1 else f"layers {first} to {first + layers - 1}"


def _fewer(layers: int) -> tuple[int, int]:
    """How many layers three quarters and half are."""
    return max(1, 3 * layers // 4), max(1, layers // 2)


def _going(scores: Scores, keep: int) -> list[int]:
    """The layers that `bevatron prune --num-layers KEEP` drops."""
    count = len(scores.block_influence)
    if keep >= count:
        return []
    kept = layers_to_keep(scores, count, keep, "influence")
    return [i for i in range(count) if i not in kept]


def _dropped(scores: Scores, heads: dict[int, Floats], neurons: dict[int, Floats]) -> str:
    """What pruning would drop: which layers, and how much of the scores goes with the rest."""
    rows = []
    for keep in _fewer(len(scores.block_influence)):
        if going := _going(scores, keep):
            command = f"bevatron prune CKPT DST --scores SCORES --num-layers {keep}"
            said = f"layers {', '.join(map(str, going))}"
            rows.append(f"<td><code>{command}</code></td><td>{said}</td>")
    parts = [table(["command", "drops"], rows, numbers=9)] if rows else []
    kinds = {"channels of the residual stream": [scores.channels],
             "heads, of each layer": list(heads.values()),
             "neurons, of each layer": list(neurons.values())}  # fmt: skip
    shares = []
    for kind, each in kinds.items():
        if each:
            lost = [np.mean([_lowest(v, part) for v in each]) for part in (0.25, 0.5)]
            numbers = "".join(f'<td class="n">{share:.1%}</td>' for share in lost)
            shares.append(f"<td>{kind}</td>{numbers}")
    names = ["what goes", "the least quarter has", "the least half has"]
    parts.append(table(names, shares, numbers=1))
    return (
        "<h2>What pruning would drop</h2>" + "".join(parts) + '<p class="over">Shares are of the '
        "sum of scores. Heads go as many from every KV group, so a little more than this.</p>"
    )


def _lowest(values: Floats, part: float) -> float:
    """The share of the sum that the lowest `part` of the values has."""
    ordered = np.sort(values.astype(np.float64))
    return float(ordered[: int(len(ordered) * part)].sum() / (ordered.sum() or 1.0))


def _series(values: Floats) -> Series:
    return Series(np.arange(len(values), dtype=np.float64), values.astype(np.float64))


def _heat(title: str, what: str, rows: dict[int, Floats]) -> str:
    """A row per layer: scores from the highest on, those beyond the columns in groups."""
    if not rows:
        return ""
    columns = min(COLUMNS, max(map(len, rows.values())))
    cells = {}
    for layer, values in rows.items():
        groups = np.array_split(np.argsort(-values), min(columns, len(values)))
        cells[layer] = [
            (f"{what} {g[0]}" if len(g) == 1 else f"{len(g)} {what}s", float(values[g].mean()))
            for g in groups
        ]
    return heat(title, "score", f"{what}s of a layer, from the most important on", cells)


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
