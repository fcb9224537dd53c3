"""How a model samples: by the user's options, the checkpoint's, or defaults; and its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.run_folder import is_step, step_of
from bevatron.errors import BevatronError
from bevatron.generate.request import Sampling

# Fields of Sampling that transformers has under the same names.
RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
TOP_K = 50  # transformers', where generation_config.json asks for sampling and names none


def chosen(base: Sampling, asked: Mapping[str, Any]) -> Sampling:
    """`base` with what was asked for; None is not asked for."""
    names = {field.name for field in fields(Sampling)}
    return replace(base, **{k: v for k, v in asked.items() if k in names and v is not None})


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint says of how it generates. Every verb does so where nobody asks otherwise.

    Attributes:
        stop_tokens: its end-of-sequence tokens.
    """

    sampling: Sampling
    stop_tokens: frozenset[int]


def defaults_of(opened: Opened) -> Defaults:
    """What generation_config.json says, as transformers reads it: greedily unless `do_sample`. Its
    end-of-sequence tokens are one or a list; where it has none, config.json's count."""
    where, config = _read(opened, "generation_config.json")
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
        sampling = Sampling(**found)
    except BevatronError as error:
        raise BevatronError(f"{where}: {error}") from error
    ends = config.get("eos_token_id")
    if ends is None:
        ends = _read(opened, "config.json")[1].get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return Defaults(sampling, frozenset(token for token in listed if isinstance(token, int)))


def _read(opened: Opened, name: str) -> tuple[str, dict[str, Any]]:
    """Where one of the source's JSON files lies and what it says: nothing, if there is none."""
    where, text = f"{opened.source or opened.folder}/{name}", opened.source_text(name)
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise BevatronError(f"{where}: is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise BevatronError(f"{where}: is not a JSON object")
    return where, found


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
