"""Where a run starts: its own newest step, other weights, or random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bevatron.bridge.opened import Opened, open_weights
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.data.tokenizer import open_tokenizer
from bevatron.errors import BevatronError
from bevatron.families import for_spec
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.new_head import with_head


@dataclass(frozen=True)
class Start:
    """What a run starts from: a step of its own folder, other weights, or nothing (random).
    `fresh`: parameters of a new head, which the weights do not have."""

    spec: ModelSpec
    weights: Opened | None
    resumed: Path | None
    family: str
    fresh: tuple[str, ...] = ()


def find_start(config: RunConfig) -> Start:
    """Decide where to start. A complete step in the run folder wins over `model.init`. The model
    gets the head that the objective needs."""
    newest = RunFolder(Path(config.run.dir)).newest()
    objective = config.objective
    if newest is not None:
        opened = open_weights(newest)
        start = Start(opened.spec, opened, newest, opened.manifest.family)
        objective = objective.model_copy(update={"new_head": False})  # it has been replaced
    elif config.model.init is not None:
        opened = open_weights(config.model.init)
        start = Start(opened.spec, opened, None, opened.manifest.family)
    else:
        spec = spec_named(str(config.model.spec))
        changes = {"std": config.model.init_std, "depth_scaled": config.model.depth_scaled}
        given = {name: value for name, value in changes.items() if value is not None}
        spec = replace(spec, init=replace(spec.init, **given))  # type: ignore[arg-type]
        start = Start(spec, None, None, for_spec(spec).name)

    def pad() -> int | None:
        tokenizer = open_tokenizer(tokenizer_of(config, start))
        return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id

    spec, fresh = with_head(start.spec, objective, start.family, pad)
    return replace(start, spec=spec, fresh=fresh)


def tokenizer_of(config: RunConfig, start: Start) -> str | Path:
    """The configured tokenizer, or the one that lies with the weights."""
    if config.tokenizer is not None:
        return config.tokenizer
    if start.weights is None or start.weights.source is None:
        raise BevatronError("tokenizer: missing; the model comes without one, so name its folder")
    return start.weights.source


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
