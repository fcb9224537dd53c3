"""A search as people read it on a terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from bevatron.compress.search.search_state import LONG, PRUNED, SHORT, standing

HEADS = {PRUNED: "pruned", SHORT: "short", LONG: "long"}
SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
}


def print_table(found: dict[str, Any], folder: Path) -> None:
    """The candidates, the best first, with their losses and ranks; what was dropped; the winner."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    dry = found.get("dry_run", False)
    best = found["best"]["name"] if found["best"] else None
    stages = [] if dry else [s["name"] for s in found["stages"]]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("candidate", no_wrap=True)
    for title in (*SIZES.values(), "parameters", "off"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage in stages:
        table.add_column(HEADS[stage], justify="right", no_wrap=True)
    for c in found["candidates"] if dry else standing(found["candidates"]):
        cells = [c["name"], *(_number(c[key]) for key in SIZES)]
        cells += [f"{c['parameters']:,}", f"{c['off']:+.2%}"]
        cells += [_loss(c, stage) for stage in stages]
        table.add_row(*cells, style="bold" if c["name"] == best else None)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    for line in summary(found, folder):
        console.print(line, soft_wrap=True, markup=False)


def summary(found: dict[str, Any], folder: Path) -> list[str]:
    """What stands below the table."""
    space, model, request = found["space"], found["model"], found["request"]
    kept = len(found["candidates"])
    lines = [
        f"{model['path']}: {model['parameters']:,} parameters; asked for {request['params']:,} "
        f"within {100 * request['within']:g}%",
        f"{kept} of {space['combinations']:,} combinations are candidates",
        *(f"  {d['count']:,} {d['rule']}" for d in space["dropped"]),
    ]
    for stage in found["stages"][1:]:
        n = min(kept, stage["entrants"])
        lines.append(f"{HEADS[stage['name']]} distillation: {stage['steps']:,} steps of {n}")
    if model["loss"] is not None:
        lines.append(f"loss of the whole model: {model['loss']:.4f}")
    if found["best"]:
        best = found["best"]
        said = "not finite" if best["loss"] is None else f"{best['loss']:.4f}"
        lines.append(f"best: {best['name']}, loss {said}, is in {folder / best['path']}")
        [winner] = [c for c in found["candidates"] if c["name"] == best["name"]]
        lines.append(f"its pruned weights: {prune_command(found, winner, folder)}")
        lines.append(f"the page is {folder / 'search.html'}")
    if found.get("dry_run"):
        lines.append("nothing was computed or written")
    return lines


def prune_command(found: dict[str, Any], candidate: dict[str, Any], folder: Path) -> str:
    """The command that makes a candidate's weights before any distillation."""
    options = {
        "--num-layers": candidate["num_layers"],
        "--num-attention-heads": candidate["num_attention_heads"],
        "--hidden-size": candidate["hidden_size"],
        "--intermediate-size": candidate["intermediate_size"],
    }
    words = ["bevatron", "prune", str(found["model"]["path"]), candidate["name"]]
    words += ["--scores", str(folder / "scores.safetensors")]
    words += [str(w) for pair in options.items() if pair[1] is not None for w in pair]
    if found["request"]["depth_by"] != "influence":
        words += ["--depth-by", found["request"]["depth_by"]]
    return shlex.join(words)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _loss(candidate: dict[str, Any], stage: str) -> str:
    if stage not in candidate["losses"]:
        return ""
    loss = candidate["losses"][stage]
    shown = "not finite" if loss is None else f"{loss:.4f}"
    return f"{shown} ({candidate['ranks'][stage]})"
