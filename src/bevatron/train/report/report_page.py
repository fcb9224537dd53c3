"""The page of a report: its charts and its headline numbers. All text from runs is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bevatron.charts.chart import Chart, Curve, Mark, draw
from bevatron.charts.html_page import document, table
from bevatron.charts.thinning import smooth
from bevatron.progress import duration
from bevatron.spec import ModelSpec
from bevatron.train.report.report_tables import (
    checkpoints,
    configuration,
    count,
    differences,
    events,
    model,
    origin,
)
from bevatron.train.report.rollouts_section import policy_charts, rollouts
from bevatron.train.report.run_reading import Event, Record


def page(records: Sequence[Record]) -> str:
    """HTML about one run, or several side by side."""
    title = " and ".join(r.name for r in records) if len(records) < 3 else f"{len(records)} runs"
    body = [_header(records[0]) if len(records) == 1 else _header_of_several(records, title)]
    body.append(f'<section class="charts">{"".join(map(draw, charts(records)))}</section>')
    body += [rollouts(r) for r in records]
    body += [differences(records), events(records), checkpoints(records)]
    specs: list[ModelSpec] = []
    for record in records:
        if record.spec is not None and record.spec not in specs:
            specs.append(record.spec)
            body.append(model(record, record.name if len(specs) > 1 else ""))
    body += [*(configuration(r, len(records) > 1) for r in records)]
    body += [origin(r) for r in records]
    return document(title, "".join(body))


def charts(records: Sequence[Record]) -> list[Chart]:
    """What is drawn, in its order. One run has its validation among the losses, several have it on
    a chart of its own."""
    one = len(records) == 1
    marks = [
        Mark(i, e.step, _said(e, "" if one else f"{r.name}, "), e.bad, own=not one)
        for i, r in enumerate(records)
        for e in r.events
    ]
    nats = "nats per token"
    loss = _curves(records, "loss", smoothed=True)
    if one and (held_out := records[0].series.get("val_loss")) is not None:
        loss.append(Curve("validation", 1, held_out, "dots"))
    out = [Chart("Loss", loss, wide=True, marks=marks, value=nats)]
    if not one:
        known = all("val_bpb" in r.series for r in records)
        title = "Validation, bits per byte" if known else "Validation loss"
        val = _curves(records, "val_bpb" if known else "val_loss", dots=True)
        out.append(Chart(title, val, wide=True, value="bits per byte" if known else nats))
    norm, lr = _curves(records, "grad_norm", smoothed=True), _curves(records, "lr")
    speed = _curves(records, "tokens_per_s", smoothed=True)
    memory = _curves(records, "memory_gib")
    return [
        *policy_charts(records),
        *out,
        Chart("Gradient norm", norm, log=True, marks=marks, value="norm, before clipping"),
        Chart("Learning rate", lr, from_zero=True, value="learning rate"),
        Chart("Speed", speed, from_zero=True, spikes=True, value="tokens per second"),
        Chart("Peak memory of the first rank", memory, unit=" GiB", from_zero=True, value="GiB"),
    ]


def _said(event: Event, whose: str) -> str:
    return f"{whose}step {event.step:,}: {event.kind}. {event.text}"


def _curves(
    records: Sequence[Record], key: str, *, smoothed: bool = False, dots: bool = False
) -> list[Curve]:
    out = []
    for i, record in enumerate(records):
        series = record.series.get(key)
        if series is None:
            continue
        label = record.name if len(records) > 1 else key.replace("_", " ")
        mean = smooth(series) if smoothed else None
        out.append(Curve(label, i, series, "dots" if dots else "line", mean=mean))
    return out


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
    shown = table(heads, rows, numbers=1)
    return f'<h1>{escape(title)}</h1><section class="runs">{shown}</section>'


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
        parts.insert(0, f"{record.family}, {count(record.headline['parameters'])} parameters")
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
        out.append(("Tokens", count(h["tokens"]), ""))
    if h["seconds"] is not None:
        out.append(("Time", duration(h["seconds"]), "in steps"))
    if h["tokens_per_s"] is not None:
        out.append(("Tokens per second", count(h["tokens_per_s"]), "median"))
    if h["mfu"] is not None and h["mfu_causal"] is not None:
        out.append(("MFU", f"{h['mfu']:.1%}", f"{h['mfu_causal']:.1%} causal"))
    if h["memory_gib"] is not None:
        out.append(("Memory", f"{h['memory_gib']:.1f} GiB", "first rank"))
    return out
