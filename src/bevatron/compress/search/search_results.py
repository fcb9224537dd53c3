"""What a search has found so far: `search.json`, which is written anew after every result.

The file is both the state that a killed search continues from and the final result. It holds no
times, and no paths but those that the user gave, so a search that was killed and continued ends
with the same file as one that was not. The table for the terminal is made here as well.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bevatron.checkpoint.new_folder import replace_text
from bevatron.checkpoint.strict_json import read_object
from bevatron.compress.search.search_space import Candidate, Space
from bevatron.compress.verb_options import Comparison
from bevatron.errors import BevatronError

FILE, FORMAT, VERSION = "search.json", "bevatron-search", 1
PRUNED, SHORT, LONG = "pruned", "short", "long"  # the stages, whose losses candidates have

HEADS = {PRUNED: "pruned", SHORT: "short", LONG: "long"}
SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
}


class SearchError(BevatronError):
    """A search that cannot be started or gone on with as asked."""


def stages_of(asked: Comparison) -> list[dict[str, Any]]:
    """The stages of a search: name, steps of distillation, how many candidates enter."""
    steps, short, long_steps, long = asked.steps, asked.short, asked.long_steps, asked.long
    stages: list[dict[str, Any]] = [{"name": PRUNED, "steps": 0, "entrants": None}]
    if steps:
        stages.append({"name": SHORT, "steps": steps, "entrants": short})
    if long_steps and long_steps <= steps:
        raise SearchError(
            f"--long-steps is {long_steps}, expected more than the {steps} of --steps"
        )
    if long_steps and not steps:
        raise SearchError("--long-steps goes on where --steps has chosen; give both")
    if long_steps:
        if long > short:
            raise SearchError(f"--long is {long}, expected at most the {short} of --short")
        stages.append({"name": LONG, "steps": long_steps, "entrants": long})
    return stages


class State:
    """`search.json`, as `found`:

    request: everything that decides the result; another command has another one
    model: name, parameters, and `loss`, held-out, of the model that is pruned
    space: combinations, and by which rules the others went
    stages: name, steps and entrants of each
    candidates: name, sizes, layers, parameters, off (share of the target), exports_as, notes, and
        by stage: losses (nats per held-out token; null if not finite) and ranks (from 1)
    best: name, stage, loss and path (in the folder); null until all is done
    """

    def __init__(self, folder: Path, found: dict[str, Any]) -> None:
        self.folder, self.found = folder, found

    @classmethod
    def begin(
        cls, folder: Path, request: Mapping[str, Any], model: Mapping[str, Any], stages: list[Any]
    ) -> State:
        """The state in `folder`, or a new one. Raises SearchError if it is of another command."""
        path = folder / FILE
        if not path.is_file():
            others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
            if others:
                raise SearchError(
                    f"{folder}: holds {others[0]} and no {FILE}; name a new or an empty folder"
                )
            head = {"format": FORMAT, "version": VERSION, "request": dict(request)}
            state = cls(folder, {**head, "model": {**model, "loss": None}, "space": None})
            state.found |= {"stages": stages, "candidates": [], "best": None}
            state.write()
            return state
        found = read_object(path)
        known = found.get("format") == FORMAT and found.get("version") == VERSION
        if not known or not isinstance(found.get("request"), dict):
            raise SearchError(
                f"{path}: is no {FILE} of version {VERSION} (its format is "
                f"{found.get('format')!r}, its version {found.get('version')!r}); name a new folder"
            )
        if changed := _differences(found["request"], request):
            raise SearchError(
                f"{folder}: holds another search: {'; '.join(changed)}. Repeat its command to go "
                "on with it, or name a new folder"
            )
        return cls(folder, found)

    def write(self) -> None:
        """As a whole or not at all."""
        self._rank()
        text = json.dumps(self.found, indent=1, allow_nan=False) + "\n"
        replace_text(self.folder / FILE, text)

    # --- candidates ---------------------------------------------------------------------------

    @property
    def candidates(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.found["candidates"]
        return found

    def enter(self, space: Space, goal: int, model: int) -> None:
        """Take the candidates in."""
        self.found["space"] = space.to_dict()
        self.found["candidates"] = [described(c, goal, model) for c in space.candidates]
        self.write()

    def record(self, stage: str, name: str, loss: float) -> None:
        """A candidate's loss in a stage."""
        [candidate] = [c for c in self.candidates if c["name"] == name]
        candidate["losses"][stage] = loss if math.isfinite(loss) else None
        self.write()

    def best(self, stage: str, count: int) -> list[str]:
        """The names of the best candidates of a stage so far, best first."""
        return [c["name"] for c in ranked(self.candidates, stage)[:count]]

    def _rank(self) -> None:
        for stage in (PRUNED, SHORT, LONG):
            for rank, candidate in enumerate(ranked(self.candidates, stage), 1):
                candidate["ranks"][stage] = rank


def ranked(candidates: Sequence[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Those that have a loss in the stage, the lowest first; a loss that is not finite is last."""

    def key(c: dict[str, Any]) -> tuple[float, int, str]:
        loss = c["losses"][stage]
        return (math.inf if loss is None else loss, c["parameters"], c["name"])

    return sorted((c for c in candidates if stage in c["losses"]), key=key)


def standing(candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All candidates, the best first: by the last stage that each has come to."""
    out: list[dict[str, Any]] = []
    for stage in (LONG, SHORT, PRUNED):
        out += [c for c in ranked(candidates, stage) if c not in out]
    return out + [c for c in candidates if c not in out]


def described(candidate: Candidate, goal: int, model: int) -> dict[str, Any]:
    """A candidate as `search.json` has it."""
    t = candidate.targets
    return {
        "name": candidate.name,
        "num_layers": t.num_layers,
        "hidden_size": t.hidden_size,
        "num_attention_heads": t.num_attention_heads,
        "intermediate_size": t.intermediate_size,
        "layers": list(candidate.layers) if candidate.layers is not None else None,
        "parameters": candidate.parameters,
        "share": round(candidate.parameters / model, 4),
        "off": round(candidate.parameters / goal - 1, 6),
        "exports_as": candidate.exports_as,
        "notes": list(candidate.notes),
        "losses": {},
        "ranks": {},
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a command asks for otherwise than the one that began."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if a != b:
            found.append(f"{key} is {_said(b)}, was {_said(a)}")
    return found


def _said(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    if isinstance(value, list):
        return " ".join(map(_said, value))
    return str(value)


# --- the table --------------------------------------------------------------------------------


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
