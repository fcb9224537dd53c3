"""What a user asks of sampling, over what the checkpoint or nobody says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from bevatron.bridge.opened import Opened
from bevatron.errors import BevatronError
from bevatron.generate.request import Sampling

RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
TOP_K = 50  # transformers', where generation_config.json asks for sampling and names none


def chosen(base: Sampling, asked: Mapping[str, Any]) -> Sampling:
    """`base` with what was asked for; None is not asked for."""
    names = {field.name for field in fields(Sampling)}
    return replace(base, **{k: v for k, v in asked.items() if k in names and v is not None})


def recommended(opened: Opened) -> Sampling:
    """How generation_config.json says that the model's answers in a chat are sampled, as
    transformers reads it: greedily unless `do_sample`."""
    text = opened.source_text("generation_config.json")
    if text is None:
        return Sampling()
    where = f"{opened.source or opened.folder}/generation_config.json"
    try:
        config = json.loads(text)
    except ValueError as error:
        raise BevatronError(f"{where}: is no JSON ({error})") from error
    if not isinstance(config, dict) or config.get("do_sample") is not True:
        return Sampling()
    found: dict[str, Any] = {"temperature": 1.0, "top_k": TOP_K}
    for name in RECOMMENDED:
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    try:
        return Sampling(**found)
    except BevatronError as error:
        raise BevatronError(f"{where}: {error}") from error
