"""The results of a search on one self-contained HTML page.

The page shows losses against sizes, how the order of candidates changes from stage to stage, the
curves of the distillations, and a table of all candidates.
"""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bevatron.charts.chart import COLOURS, Chart, Curve, draw, ranks
from bevatron.charts.html_page import document, table
from bevatron.charts.thinning import Series, smooth
from bevatron.checkpoint.new_folder import replace_text
from bevatron.compress.search.search_results import (
    LONG,
    PRUNED,
    SHORT,
    SIZES,
    State,
    prune_command,
    standing,
)
from bevatron.errors import BevatronError
from bevatron.train.report.report_tables import count
from bevatron.train.report.run_reading import read_run

AFTER = {PRUNED: "pruned", SHORT: "short distillation", LONG: "long distillation"}
TITLES = {
    PRUNED: "Loss after pruning, by parameters",
    SHORT: "Loss after the short distillation, by parameters",
    LONG: "Loss after the long distillation, by parameters",
}
FILE = "search.html"
NATS = "nats per token"
Found = dict[str, Any]


def write_page(state: State) -> None:
    """Write the page, as a whole or not at all."""
    replace_text(state.folder / FILE, page(state))


def page(state: State) -> str:
    """The HTML, of a search that goes on too."""
    found, order = state.found, standing(state.candidates)
    name = Path(found["model"]["path"]).name or "a model"
    title = f"Architecture search in {name}"
    stages = [s["name"] for s in found["stages"] if any(s["name"] in c["losses"] for c in order)]
    body = [_header(found, order, title), _commands(found, order, state.folder)]
    losses = [_losses(order, stage) for stage in stages]
    if len(losses) % 2:  # two in a row
        losses[-1] = replace(losses[-1], wide=True)
    curves = [chart for stage in stages[1:] for chart in _curves(state, order, stage)]
    body.append(f'<section class="charts">{"".join(map(draw, losses))}</section>')
    if len(stages) > 1:
        body.append(_ranks(order, stages))
    if drawn := "".join(map(draw, curves)):
        body.append(f'<h2>Distillations</h2><section class="charts">{drawn}</section>')
    body.append(_table(found, order, [s["name"] for s in found["stages"]]))
    body.append(_dropped(found))
    body.append(_asked(found))
    return document(title, "".join(body))


def _header(found: Found, order: list[Found], title: str) -> str:
    model, request, best = found["model"], found["request"], found["best"]
    total = found["space"]["combinations"] if found["space"] else 0
    tiles = [("Target", count(request["params"]), f"within {100 * request['within']:g}%")]
    tiles.append(("Candidates", f"{len(order):,}", f"of {total:,} combinations"))
    if model["loss"] is not None:
        note = f"{count(model['parameters'])} parameters"
        tiles.append(("Whole model", f"{model['loss']:.4f}", note))
    if best is not None and best["loss"] is not None:
        [winner] = [c for c in order if c["name"] == best["name"]]
        tiles.append(("Best loss", f"{best['loss']:.4f}", AFTER[best["stage"]]))
        tiles.append(("Best size", count(winner["parameters"]), f"{winner['off']:+.2%}"))
        shape = " · ".join(f"{winner[k]:,} {v}" for k, v in SIZES.items() if winner[k])
        chip = '<span class="chip done">finished</span>'
        lead = f"Best: {shape}"
    else:
        done = sum(len(c["losses"]) for c in order)
        chip = f'<span class="chip">{_progress(found, done)}</span>'
        lead = f"{model['family']} · {model['path']}"
    shown = "".join(f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in tiles)
    return (
        f'<h1>{escape(title)}{chip}</h1><p class="over">{escape(_question(found))}</p>'
        f'<p class="over">{escape(lead)}</p>'
        f'<dl class="tiles">{shown}</dl>'
    )


def _question(found: Found) -> str:
    """What was asked, in a sentence."""
    request, model = found["request"], found["model"]
    tried = [
        f"{' or '.join(f'{n:,}' for n in request[key])} {name}"
        for key, name in SIZES.items()
        if request.get(key)
    ]
    among = f" among shapes of {', '.join(tried)}" if tried else ""
    on = ", ".join(Path(path).name for path in model.get("validation", ()))
    return (
        f"Asked: which {request['params']:,} parameters (within {100 * request['within']:g}%) of "
        f"{Path(model['path']).name or model['path']} have the lowest loss"
        f"{f' on {on}' if on else ''}{among}?"
    )


def _commands(found: Found, order: list[Found], folder: Path) -> str:
    """What makes each candidate, the best first."""
    if not order:
        return ""
    lines = [
        f'<p class="over"><span class="dot {f"c{i}" if i < COLOURS else "rest"}"></span>'
        f"<code>{escape(prune_command(found, c, folder))}</code></p>"
        for i, c in enumerate(order)
    ]
    rest = f"<details><summary>The others</summary>{''.join(lines[1:])}</details>"
    which = "best" if found["best"] else "first"
    return f"<h2>To prune to the {which}</h2>{lines[0]}{rest if lines[1:] else ''}<br>"


def _progress(found: Found, done: int) -> str:
    number = len(found["candidates"])
    whole = sum(min(number, s["entrants"] or number) for s in found["stages"])
    return f"{done} of {whole} results"


def _losses(order: list[Found], stage: str) -> Chart:
    """Loss against parameters; the candidates that lead in their colours."""
    curves, rest = [], []
    for i, c in enumerate(order):
        loss = c["losses"].get(stage)
        if loss is None:
            continue
        if i < COLOURS:
            series = Series(np.array([float(c["parameters"])]), np.array([loss]))
            curves.append(Curve(c["name"], i, series, "points", names=(_named(c, loss),)))
        else:
            rest.append((c, loss))
    if rest:
        rest.sort(key=lambda x: x[0]["parameters"])
        sizes = np.array([float(c["parameters"]) for c, _ in rest])
        values = np.array([loss for _, loss in rest])
        names = tuple(_named(c, loss) for c, loss in rest)
        others = Series(sizes, values)
        curves.insert(0, Curve("others", COLOURS, others, "points", rest=True, names=names))
    return Chart(TITLES[stage], curves, axis="parameters", value=NATS)


def _named(candidate: Found, loss: float) -> str:
    return f"{candidate['name']}: {candidate['parameters']:,} parameters, loss {loss:.4f}"


def _ranks(order: list[Found], stages: list[str]) -> str:
    """A line per candidate from its rank in one stage to that in the next; the leaders on top."""
    lines = []
    for i, c in reversed(list(enumerate(order))):
        found = [c["ranks"][s] for s in stages if s in c["ranks"]]
        lines.append((c["name"], f"c{i}" if i < COLOURS else "rest", found))
    return ranks("Ranks from stage to stage", [AFTER[s] for s in stages], lines)


def _curves(state: State, order: list[Found], stage: str) -> list[Chart]:
    """Of a stage's runs: the loss on held-out text, and what was minimised."""
    held_out, objective = [], []
    for i, c in enumerate(order):
        folder = state.folder / "candidates" / c["name"] / stage
        best = state.found["best"]
        if best is not None and (best["name"], best["stage"]) == (c["name"], stage):
            folder = state.folder / best["path"]
        try:
            series = read_run(folder).series
        except BevatronError:
            continue
        run, rest = min(i, COLOURS), i >= COLOURS
        validation = series.get("val_ce", series.get("val_loss"))
        if validation is not None:
            held_out.append(Curve(c["name"], run, validation, "dots", rest))
        if "loss" in series:
            mean = smooth(series["loss"])
            objective.append(Curve(c["name"], run, series["loss"], "line", rest, mean=mean))
    what = "short" if stage == SHORT else "long"
    charts = [
        Chart(f"Held-out loss above the leader's, {what}", _above(held_out), wide=True, value=NATS),
        Chart(f"Held-out loss, {what} distillation", held_out[::-1], value=NATS),
        Chart(f"Objective, {what} distillation", objective[::-1], value=NATS),
    ]
    return [chart for chart in charts if chart.curves]


def _above(curves: list[Curve]) -> list[Curve]:
    """Each less the first at the same steps: whether the ranks had settled."""
    if len(curves) < 2:
        return []
    known = dict(zip(curves[0].series.steps.tolist(), curves[0].series.values, strict=True))
    out = []
    for curve in curves:
        both = [i for i, step in enumerate(curve.series.steps.tolist()) if step in known]
        steps = curve.series.steps[both]
        lead = np.array([known[step] for step in steps.tolist()])
        out.append(replace(curve, series=Series(steps, curve.series.values[both] - lead)))
    return out[::-1]


def _table(found: Found, order: list[Found], stages: list[str]) -> str:
    heads = ["candidate", *SIZES.values(), "parameters", "off", *(AFTER[s] for s in stages)]
    best = found["best"]["name"] if found["best"] else None
    rows = []
    for i, c in enumerate(order):
        colour = f"c{i}" if i < COLOURS else "rest"
        cells = [f'<td><span class="dot {colour}">{escape(c["name"])}</span></td>']
        numbers = [f"{c[k]:,}" if c[k] else "" for k in SIZES]
        numbers += [f"{c['parameters']:,}", f"{c['off']:+.2%}"]
        for stage in stages:
            loss, rank = c["losses"].get(stage), c["ranks"].get(stage)
            shown = "not finite" if loss is None else f"{loss:.4f}"
            numbers.append(f"{shown}<small>{rank}</small>" if rank else "")
        row = "".join([*cells, *(f'<td class="n">{n}</td>' for n in numbers)])
        rows.append(row if c["name"] != best else row.replace("<td", '<td style="font-weight:600"'))
    return f"<h2>Candidates</h2>{table(heads, rows, numbers=1)}"


def _dropped(found: Found) -> str:
    if not found["space"]:
        return ""
    rows = [
        f'<td class="n">{d["count"]:,}</td><td>{escape(d["rule"])}</td>'
        for d in found["space"]["dropped"]
    ]
    rows.append(f'<td class="n">{len(found["candidates"]):,}</td><td>candidates</td>')
    heads = ["combinations", "what became of them"]
    return f"<h2>Combinations</h2>{table(heads, rows, numbers=0, only=True)}"


def _asked(found: Found) -> str:
    items = "".join(
        f"<div><dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(_said(v))}</dd></div>"
        for k, v in found["request"].items()
        if v is not None and v != []
    )
    return f'<h2>Asked for</h2><div class="columns"><dl class="rows">{items}</dl></div>'


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
