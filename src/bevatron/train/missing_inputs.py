"""Files that a configuration names and that do not exist.

A dry run does without them; a recipe lists all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from bevatron.bridge.hf_folder import looks_like_hub_id
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.checkpoint.storage import is_url
from bevatron.errors import BevatronError
from bevatron.train.config import ModelConfig, RunConfig


def stand_in(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The same for a dry run: where weights are not on this disk and `like` says what they are,
    the spec that it names; and what that was done to. Nothing is looked up on the Hub then."""
    notes = []

    def stands_in(key: str, path: str | None, like: str | None) -> bool:
        if path is None or like is None or os.path.lexists(path) or is_url(path):
            return False
        notes.append(f"{key}: {path} is not on this disk; planned with the sizes of {like}")
        return True

    model, objective = config.model, config.objective
    run_has_steps = _goes_on(config)
    if not run_has_steps and stands_in("model.init", model.init, model.like):
        model = ModelConfig(spec=model.like, override=model.override)
    for key in objective.paths:
        path, like = getattr(objective, key), getattr(objective, f"{key}_like", None)
        if stands_in(f"objective.{key}", path, like):
            objective = objective.model_copy(update={key: None})
    rewards = list(getattr(objective, "rewards", ()))
    for i, reward in enumerate(rewards):
        path, like = getattr(reward, "path", None), getattr(reward, "like", None)
        if stands_in(f"objective.rewards.{i}.path", path, like):
            rewards[i] = reward.model_copy(update={"path": ""})
            objective = objective.model_copy(update={"rewards": rewards})
    return config.model_copy(update={"model": model, "objective": objective}), notes


def check_present(config: RunConfig) -> None:
    """Say in one message all that a recipe's user has not supplied yet.

    Other configurations are left to the checks of each part, as are names that may be on the Hub.
    """
    if config.recipe is None:
        return
    weights = {"model.init": config.model.init}
    for key in config.objective.paths:
        weights[f"objective.{key}"] = getattr(config.objective, key)
    for i, reward in enumerate(getattr(config.objective, "rewards", ())):
        weights[f"objective.rewards.{i}.path"] = getattr(reward, "path", None)
    if _goes_on(config):
        del weights["model.init"]
    missing = [
        f"{key}: {path}"
        for key, path in weights.items()
        if path is not None and not (_there(path) or looks_like_hub_id(path))
    ]
    for part in ("train", "validation"):
        sources = enumerate(getattr(config.data, part))
        missing += [f"data.{part}.{i}.path: {s.path}" for i, s in sources if not _there(s.path)]
    if missing:
        name = config.recipe.name
        raise BevatronError(
            f"{name}: what it starts from is not there yet:\n  "
            + "\n  ".join(missing)
            + f"\n`bevatron recipes {name}` shows the commands that make them; a path of your own "
            "is given as key=path"
        )


def _goes_on(config: RunConfig) -> bool:
    """Whether the run goes on from a step, so that `model` is not read."""
    own = RunFolder(Path(config.run.dir)).step_folders()
    return bool(own) or config.run.branch_from is not None


def _there(path: str) -> bool:
    return os.path.lexists(path) or is_url(path)
