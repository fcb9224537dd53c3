"""What a user asks of sampling, over what the checkpoint or nobody says; what a model is called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.run_folder import is_step, step_of
from bevatron.errors import BevatronError
from bevatron.generate.request import Sampling

RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
TOP_K = 50  # transformers', where generation_config.json asks for sampling and names none


def chosen(base: Sampling, asked: Mapping[str, Any]) -> Sampling:
    """`base` with what was asked for; None is not asked for."""
    names = {field.name for field in fields(Sampling)}
    return replace(base, **{k: v for k, v in asked.items() if k in names and v is not None})


def recommended(opened: Opened) -> Sampling:
    """How generation_config.json says that the model is sampled, as transformers reads it: greedily
    unless `do_sample`. What nobody asks otherwise for, every verb does so."""
    text = opened.source_text("generation_config.json")
    if text is None:
        return Sampling()
    where = f"{opened.source or opened.folder}/generation_config.json"
    try:
        config = json.loads(text)
    except ValueError as error:
        raise BevatronError(f"{where}: is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise BevatronError(f"{where}: is no JSON object")
    found: dict[str, Any] = {}
    for name in RECOMMENDED:
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    if config.get("do_sample") is True:
        found = {"temperature": 1.0, "top_k": TOP_K, **found}
    else:
        found["temperature"] = 0.0
    try:
        return Sampling(**found)
    except BevatronError as error:
        raise BevatronError(f"{where}: {error}") from error


def in_words(sampling: Sampling) -> str:
    """Such as `temperature 0.6, top_p 0.9`, or `greedy`."""
    shown = {name: getattr(sampling, name) for name in RECOMMENDED}
    neutral = {name: getattr(Sampling(), name) for name in RECOMMENDED}
    if not sampling.temperature:
        shown |= {name: neutral[name] for name in ("top_k", "top_p", "min_p")}
    changed = [f"{name} {value:g}" for name, value in shown.items() if value != neutral[name]]
    return ", ".join(changed if sampling.temperature else ["greedy", *changed])


def model_name(ckpt: str) -> str:
    """What a model is called: its run, with the step if one is named; the last part of where it
    lies; a Hub id as it is."""
    path = Path(ckpt)
    if not path.exists() and ckpt.count("/") == 1 and not ckpt.startswith(("/", ".", "~")):
        return ckpt
    path = path.resolve()
    if is_step(path.name) and path.parent.name:
        return f"{path.parent.name}-step-{step_of(path)}"
    return path.name or "model"
