"""`bevatron search --dry-run`: the candidates and their exact counts, from a spec alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bevatron.bridge.hf_folder import fetch_config, read_config
from bevatron.bridge.import_hf import understand
from bevatron.bridge.nanotron import is_nanotron, open_nanotron
from bevatron.bridge.open_native import read_spec
from bevatron.checkpoint.locate import is_native, resolve
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.storage import located
from bevatron.checkpoint.strict_json import read_object
from bevatron.compress.importance_scores import Scores
from bevatron.compress.search.search_space import Axes, Goal, enumerate_space
from bevatron.compress.search.search_state import described, stages_of
from bevatron.errors import BevatronError
from bevatron.families.published_models import PRESETS, preset
from bevatron.families.registry import Family, by_name, for_spec
from bevatron.spec import ModelSpec
from bevatron.spec.count import parameter_count


def outline(ckpt: str) -> tuple[ModelSpec, Family]:
    """Of anything that holds weights, of a folder with a config.json alone, of a Hub id, whose
    config.json alone is downloaded, or of a published model by its name."""
    path = Path(ckpt)
    folder = located(ckpt)
    if folder.is_dir() and is_native(folder):
        native = resolve(folder)
        return read_spec(native), by_name(read_manifest(native).family)
    if is_nanotron(folder):
        foreign = open_nanotron(ckpt)
        return foreign.spec, by_name(foreign.manifest.family)
    if not path.exists() and ckpt in PRESETS:
        spec = preset(ckpt)
        return spec, for_spec(spec)
    config = read_config(path) if path.is_dir() else read_object(fetch_config(ckpt))
    try:
        family, spec, _ = understand(config)
    except BevatronError as error:
        raise type(error)(f"{ckpt}: {error}") from error
    return spec, family


def dry_run(
    ckpt: str,
    axes: Axes,
    goal: Goal,
    *,
    scores: Path | None,
    steps: int,
    short: int,
    long_steps: int,
    long: int,
) -> dict[str, Any]:
    """What `search.json` would begin with. Nothing is computed or written."""
    spec, family = outline(ckpt)
    found = Scores.read(scores) if scores is not None else None
    if found is not None:
        found.check(spec, str(scores))
    stages = stages_of(steps, short, long_steps, long)
    space, whole = enumerate_space(spec, family, axes, goal, found), parameter_count(spec)
    return {
        "dry_run": True,
        "model": {"path": ckpt, "family": family.name, "parameters": whole, "loss": None},
        "request": {"params": goal.parameters, "within": goal.within},
        "space": space.to_dict(),
        "stages": stages,
        "candidates": [described(c, goal.parameters, whole) for c in space.candidates],
        "best": None,
    }
