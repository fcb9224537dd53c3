"""Where a run starts: its own newest step, other weights, or random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bevatron.bridge.opened import Opened, open_weights
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.errors import BevatronError
from bevatron.families import for_spec
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig


@dataclass(frozen=True)
class Start:
    """What a run starts from: a step of its own folder, other weights, or nothing (random)."""

    spec: ModelSpec
    weights: Opened | None
    resumed: Path | None
    family: str


def find_start(config: RunConfig) -> Start:
    """Decide where to start. A complete step in the run folder wins over `model.init`."""
    newest = RunFolder(Path(config.run.dir)).newest()
    if newest is not None:
        opened = open_weights(newest)
        return Start(opened.spec, opened, newest, opened.manifest.family)
    if config.model.init is not None:
        opened = open_weights(config.model.init)
        return Start(opened.spec, opened, None, opened.manifest.family)
    spec = spec_named(str(config.model.spec))
    changes = {"std": config.model.init_std, "depth_scaled": config.model.depth_scaled}
    given = {name: value for name, value in changes.items() if value is not None}
    spec = replace(spec, init=replace(spec.init, **given))  # type: ignore[arg-type]
    return Start(spec, None, None, for_spec(spec).name)


def spec_named(name: str) -> ModelSpec:
    """A spec from a JSON file, or a preset by its name."""
    from bevatron.families.published import preset
    from bevatron.spec.json import from_json

    path = Path(name)
    if path.is_file():
        return from_json(path.read_text(encoding="utf-8"))
    if path.suffix == ".json":
        raise BevatronError(f"model.spec: {name} does not exist")
    return preset(name)
