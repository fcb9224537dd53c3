"""The tables of a report: a run's events, checkpoints, model, configuration and starts.

Everything that comes from a run is escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from html import escape
from typing import Any

from bevatron.bridge.inspect import sizes
from bevatron.charts.html_page import table
from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec
from bevatron.train.report.run_reading import Checkpoint, Record


def events(records: Sequence[Record]) -> str:
    several = len(records) > 1
    rows = [
        (f"<td>{escape(r.name)}</td>" if several else "")
        + f'<td class="n">{e.step:,}</td><td>{escape(e.kind)}</td><td>{escape(e.text)}</td>'
        for r in records
        for e in r.events
    ]
    heads = [*(["run"] if several else []), "step", "event", "what happened"]
    return _folded("Events", heads, rows, first_number=int(several)) if rows else ""


def checkpoints(records: Sequence[Record]) -> str:
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
        older = table(heads, rows[:-20], numbers=first_number, only=True)
        text += f"<details><summary>{len(rows) - 20:,} earlier</summary>{older}</details>"
        rows = rows[-20:]
    return f"<section>{text}{table(heads, rows, numbers=first_number, only=True)}</section>"


def model(record: Record, of: str) -> str:
    spec = record.spec
    assert spec is not None
    facts: dict[str, Any] = {"family": record.family, "layers": len(spec.layers)}
    facts["parameters"] = sum(p.numel for p in spec.parameters())
    if frozen := _frozen(record, spec):
        facts["frozen"] = frozen
    rows = {k: _said(v) for k, v in {**facts, **sizes(spec)}.items()}
    title = f"Model of {escape(of)}" if of else "Model"
    return f"<h2>{title}</h2>{_layers(spec)}<div class='columns'>{_rows(rows)}</div>"


def _frozen(record: Record, spec: ModelSpec) -> str:
    """How much of the model `train.freeze` holds still; empty if nothing."""
    patterns = record.config.get("train", {}).get("freeze")
    if not patterns:
        return ""
    from bevatron.train.freezing import describe, frozen_parameters  # torch, for few pages

    with suppress(BevatronError):  # of a configuration that somebody edited
        return describe(spec, frozen_parameters(spec, patterns))
    return ""


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


def differences(records: Sequence[Record]) -> str:
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
    return f"<h2>What differs</h2>{table(heads, rows, numbers=99)}"


def configuration(record: Record, folded: bool) -> str:
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


def origin(record: Record) -> str:
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


def count(n: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if n >= factor:
            return f"{n / (factor if unit != 'k' else 1e3):.3g}{unit}"
    return f"{n:,.0f}"


def _bytes(n: int) -> str:
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n / 1024:,.1f} KiB"
