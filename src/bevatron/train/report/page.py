"""The page of a report: one file, no request to anywhere, all text from runs escaped.

The policy in its head forbids every load, so that not even a mistake here could make one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import bevatron
from bevatron.bridge.inspect import sizes
from bevatron.progress import duration
from bevatron.spec import ModelSpec
from bevatron.train.report.chart import Chart, Curve, draw
from bevatron.train.report.curves import smooth
from bevatron.train.report.record import Checkpoint, Record

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HERE = Path(__file__).parent


def page(records: Sequence[Record]) -> str:
    """HTML about one run, or several side by side."""
    title = " and ".join(r.name for r in records) if len(records) < 3 else f"{len(records)} runs"
    body = [_header(records[0]) if len(records) == 1 else _header_of_several(records, title)]
    body.append(f'<section class="charts">{"".join(map(draw, charts(records)))}</section>')
    body += [_differences(records), _events(records), _checkpoints(records)]
    specs: list[ModelSpec] = []
    for record in records:
        if record.spec is not None and record.spec not in specs:
            specs.append(record.spec)
            body.append(_model(record, record.name if len(specs) > 1 else ""))
    body += [*(_configuration(r, len(records) > 1) for r in records)]
    body += [_origin(r) for r in records]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main>{''.join(body)}"
        f"<footer>Bevatron {escape(bevatron.__version__)}</footer></main>"
        f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def charts(records: Sequence[Record]) -> list[Chart]:
    """What is drawn, in its order. One run has its validation among the losses, several have it on
    a chart of its own."""
    marks = [(i, e) for i, r in enumerate(records) for e in r.events]
    one = len(records) == 1
    loss = _curves(records, "loss", smoothed=True)
    if one and (held_out := records[0].series.get("val_loss")) is not None:
        loss.append(Curve("validation", 1, held_out, "dots"))
    out = [Chart("Loss", loss, wide=True, settles=True, marks=marks)]
    if not one:
        known = all("val_bpb" in r.series for r in records)
        title = "Validation, bits per byte" if known else "Validation loss"
        val = _curves(records, "val_bpb" if known else "val_loss", dots=True)
        out.append(Chart(title, val, wide=True, settles=True))
    norm, lr = _curves(records, "grad_norm", smoothed=True), _curves(records, "lr")
    speed = _curves(records, "tokens_per_s", smoothed=True)
    memory = _curves(records, "memory_gib")
    return [
        *out,
        Chart("Gradient norm", norm, log=True, marks=marks),
        Chart("Learning rate", lr, from_zero=True),
        Chart("Tokens per second", speed, from_zero=True, spikes=True),
        Chart("Peak memory of the first rank", memory, unit=" GiB", from_zero=True),
    ]


def _curves(
    records: Sequence[Record], key: str, *, smoothed: bool = False, dots: bool = False
) -> list[Curve]:
    behind, front = [], []
    for i, record in enumerate(records):
        series = record.series.get(key)
        if series is None:
            continue
        label = record.name if len(records) > 1 else key.replace("_", " ")
        mean = smooth(series) if smoothed else None
        if mean is not None:
            behind.append(Curve(label, i, series, "faint"))
        front.append(Curve(label, i, mean or series, "dots" if dots else "line"))
    return behind + front


# --- the top ----------------------------------------------------------------------------------


def _header(record: Record) -> str:
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
        for name, value, note in _tiles(record)
    )
    return (
        f"<h1>{escape(record.name)}{_chip(record)}</h1>"
        f'<p class="over">{escape(_what(record))}</p><dl class="tiles">{tiles}</dl>'
    )


def _header_of_several(records: Sequence[Record], title: str) -> str:
    heads = ["run", "steps", "loss", "validation", "tokens", "time", "tokens/s", "memory"]
    rows = []
    for i, r in enumerate(records):
        found = {name: value for name, value, _ in _tiles(r)}
        cells = [found.get(k, "") for k in ("Steps", "Loss", "Validation", "Tokens", "Time")]
        cells += [found.get("Tokens per second", ""), found.get("Memory", "")]
        name = f'<td><span class="dot c{i % 6}">{escape(r.name)}</span>{_chip(r)}</td>'
        rows.append(name + "".join(f'<td class="n">{c}</td>' for c in cells))
    table = _table(heads, rows, numbers=1)
    return f'<h1>{escape(title)}</h1><section class="runs">{table}</section>'


def _chip(record: Record) -> str:
    done, planned = record.headline["steps"], record.headline["planned_steps"]
    stopped = record.events and record.events[-1].kind == "stopped"
    if done is not None and planned is not None and done >= planned:
        return '<span class="chip done">finished</span>'
    if stopped and done is not None and record.events[-1].step >= done:
        return '<span class="chip">stopped</span>'
    return f'<span class="chip">{int(100 * done / planned)}%</span>' if done and planned else ""


def _what(record: Record) -> str:
    parts = [str(record.path)]
    if record.headline["parameters"] and record.family:
        parts.insert(0, f"{record.family}, {_count(record.headline['parameters'])} parameters")
    return " · ".join(parts)


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """Name, value, note of the headline numbers that are known; nothing in them needs escaping."""
    h = record.headline
    out = [("Steps", f"{h['steps'] or 0:,.0f}", "")]
    if h["planned_steps"] and h["planned_steps"] != h["steps"]:
        out = [("Steps", f"{h['steps'] or 0:,.0f}", f"of {h['planned_steps']:,.0f}")]
    if h["loss"] is not None:
        out.append(("Loss", f"{h['loss']:.4f}", "last step"))
    if h["val_loss"] is not None:
        note = f"best {h['best_val_loss']:.4f}"
        note = f"{h['val_bpb']:.4f} bits per byte" if h["val_bpb"] is not None else note
        out.append(("Validation", f"{h['val_loss']:.4f}", note))
    if h["tokens"] is not None:
        out.append(("Tokens", _count(h["tokens"]), ""))
    if h["seconds"] is not None:
        out.append(("Time", duration(h["seconds"]), "in steps"))
    if h["tokens_per_s"] is not None:
        out.append(("Tokens per second", _count(h["tokens_per_s"]), "median"))
    if h["mfu"] is not None and h["mfu_causal"] is not None:
        out.append(("MFU", f"{h['mfu']:.1%}", f"{h['mfu_causal']:.1%} causal"))
    if h["memory_gib"] is not None:
        out.append(("Memory", f"{h['memory_gib']:.1f} GiB", "first rank"))
    return out


# --- tables -----------------------------------------------------------------------------------


def _events(records: Sequence[Record]) -> str:
    several = len(records) > 1
    rows = [
        (f"<td>{escape(r.name)}</td>" if several else "")
        + f'<td class="n">{e.step:,}</td><td>{escape(e.kind)}</td><td>{escape(e.text)}</td>'
        for r in records
        for e in r.events
    ]
    heads = [*(["run"] if several else []), "step", "event", "what happened"]
    return _folded("Events", heads, rows, first_number=int(several)) if rows else ""


def _checkpoints(records: Sequence[Record]) -> str:
    several = len(records) > 1
    rows = [
        (f"<td>{escape(r.name)}</td>" if several else "") + _checkpoint(c)
        for r in records
        for c in r.checkpoints
    ]
    heads = [*(["run"] if several else []), "step", "folder", "size", "state"]
    return _folded("Checkpoints", heads, rows, first_number=int(several)) if rows else ""


def _checkpoint(c: Checkpoint) -> str:
    good = c.state == "complete"
    kind = " (weights only)" if c.kind == "weights" else ""
    return (
        f'<td class="n">{c.step:,}</td><td class="mono">{escape(c.folder)}{kind}</td>'
        f"<td>{_bytes(c.nbytes)}</td>"
        f'<td class="{"good" if good else "bad"}">{escape(c.state)}</td>'
    )


def _folded(title: str, heads: list[str], rows: list[str], first_number: int) -> str:
    """A table whose rows beyond the last twenty are folded away."""
    text = f"<h2>{title}</h2>"
    if len(rows) > 24:
        older = _table(heads, rows[:-20], numbers=first_number, only=True)
        text += f"<details><summary>{len(rows) - 20:,} earlier</summary>{older}</details>"
        rows = rows[-20:]
    return f"<section>{text}{_table(heads, rows, numbers=first_number, only=True)}</section>"


def _table(heads: list[str], rows: Iterable[str], numbers: int, only: bool = False) -> str:
    """`numbers`: the first column of numbers; of those after it too unless `only`."""
    shown = "".join(
        f'<th class="n">{h}</th>' if i == numbers or (i > numbers and not only) else f"<th>{h}</th>"
        for i, h in enumerate(heads)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{shown}</tr>{body}</table></div>'


# --- the model and where it comes from ---------------------------------------------------------


def _model(record: Record, of: str) -> str:
    spec = record.spec
    assert spec is not None
    facts: dict[str, Any] = {"family": record.family, "layers": len(spec.layers)}
    facts["parameters"] = sum(p.numel for p in spec.parameters())
    rows = {k: _said(v) for k, v in {**facts, **sizes(spec)}.items()}
    title = f"Model of {escape(of)}" if of else "Model"
    return f"<h2>{title}</h2>{_layers(spec)}<div class='columns'>{_rows(rows)}</div>"


def _layers(spec: ModelSpec) -> str:
    """Where the parameters are: a bar per layer, its attention below and its MLP on top."""
    both = []
    for i in range(len(spec.layers)):
        attention = mlp = 0
        for p in spec.layer_parameters(i):
            if p.name.split(".")[2].startswith("attention"):
                attention += p.numel
            else:
                mlp += p.numel
        both.append((attention, mlp))
    most = max(map(sum, both)) or 1
    bars = "".join(
        f'<span title="layer {i}: attention {a:,}, MLP {m:,} parameters">'
        f'<i class="c0" style="height:{a / most:.1%}"></i>'
        f'<i class="c1" style="height:{m / most:.1%}"></i></span>'
        for i, (a, m) in enumerate(both)
    )
    legend = '<span class="key c0">attention</span><span class="key c1">MLP</span>'
    return (
        f'<div class="layers" role="img" aria-label="parameters per layer">{bars}</div>'
        f'<p class="legend">Parameters per layer {legend}</p>'
    )


def _differences(records: Sequence[Record]) -> str:
    flat = [_flat(r.config) for r in records]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if k != "run.dir"]
    rows = [
        f'<td class="k">{escape(k)}</td>'
        + "".join(f"<td>{escape(_said(f.get(k)))}</td>" for f in flat)
        for k in keys
        if len({_said(f.get(k)) for f in flat}) > 1
    ]
    if not rows:
        return ""
    heads = ["key", *(escape(r.name) for r in records)]
    return f"<h2>What differs</h2>{_table(heads, rows, numbers=99)}"


def _configuration(record: Record, folded: bool) -> str:
    if not record.config:
        return ""
    top = {k: v for k, v in record.config.items() if not isinstance(v, dict)}
    sections = {k: v for k, v in record.config.items() if isinstance(v, dict)}
    if top:
        sections = {"": top, **sections}
    parts = [
        f'<div class="section"><h3>{escape(str(name))}</h3>'
        f"{_rows({k: _said(v) for k, v in _flat(values).items()})}</div>"
        for name, values in sections.items()
        if values
    ]
    body = f'<div class="columns">{"".join(parts)}</div>'
    if folded:
        title = f"Configuration of {escape(record.name)}"
        return f"<details><summary>{title}</summary>{body}</details>"
    return f"<h2>Configuration</h2>{body}"


def _origin(record: Record) -> str:
    """Every start, newest first, with what it said of versions, layout and data."""
    if not record.starts:
        return ""
    blocks = []
    for i, start in enumerate(reversed(record.starts[-50:])):
        rows = _rows({k: _said(v) for k, v in _flat(start).items()})
        number = len(record.starts) - i
        opened = " open" if i == 0 else ""
        head = f"start {number}, at step {escape(_said(start.get('step', 0)))}"
        blocks.append(
            f'<details{opened}><summary>{head}</summary><div class="columns">{rows}</div></details>'
        )
    return f"<h2>What produced {escape(record.name)}</h2>{''.join(blocks)}"


def _rows(values: dict[str, str]) -> str:
    items = "".join(
        f"<div><dt>{escape(str(k)).replace('_', ' ')}</dt><dd>{escape(v)}</dd></div>"
        for k, v in values.items()
    )
    return f'<dl class="rows">{items}</dl>'


def _flat(value: dict[str, Any], path: str = "", depth: int = 0) -> dict[str, Any]:
    """Nested sections as dotted keys."""
    out: dict[str, Any] = {}
    for key, inner in value.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(inner, dict) and inner and depth < 8:
            out |= _flat(inner, dotted, depth + 1)
        else:
            out[dotted] = inner
    return out


def _said(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_said(v) for v in value)
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_said(v)}" for k, v in value.items())
    return str(value)


def _count(n: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if n >= factor:
            return f"{n / (factor if unit != 'k' else 1e3):.3g}{unit}"
    return f"{n:,.0f}"


def _bytes(n: int) -> str:
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n / 1024:,.1f} KiB"
