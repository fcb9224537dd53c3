"""A config.json, wherever it is (a folder, an object, a dict, the Hub), and what it means.

No weights are touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bevatron.bridge.hf_folder import HFFolder, SourceError, fetch_config, locate, read_config
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError
from bevatron.families.config_fields import spec_of
from bevatron.families.registry import Family, for_config
from bevatron.spec.model import ModelSpec


def as_dict(config: object) -> dict[str, Any]:
    """A transformers config object or a dict, as config.json would have it."""
    if isinstance(config, Mapping):
        return dict(config)
    to_json = getattr(config, "to_json_string", None)
    if to_json is None:
        raise BevatronError(
            f"a config of type {type(config).__name__} is neither a transformers config nor a dict"
        )
    found: dict[str, Any] = json.loads(to_json())
    return found


def config_of(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder, or of a Hub id, from which nothing else is downloaded for it."""
    if os.path.lexists(path):
        return read_config(locate(path, revision)[0])
    return read_object(fetch_config(str(path), revision))


def spec_at(path: str | Path, config: Mapping[str, Any]) -> ModelSpec:
    """What the config.json at `path` means; errors name the path."""
    try:
        return understand(config)[1]
    except BevatronError as error:
        raise type(error)(f"{path}: {error}") from error


def read_spec(
    source: HFFolder, accept: Collection[str] = ()
) -> tuple[Family, ModelSpec, dict[str, Any]]:
    """The family and spec that the folder's config.json means, and the fields that were accepted;
    errors name the folder."""
    try:
        return understand(source.config, accept)
    except BevatronError as error:
        raise type(error)(f"{source.path}: {error}") from error


def understand(
    config: Mapping[str, Any], accept: Collection[str] = ()
) -> tuple[Family, ModelSpec, dict[str, Any]]:
    """The family and spec that a config.json means, and which of the fields to `accept` it needed
    for that. Raises BevatronError naming what it does not understand."""
    if config.get("quantization_config"):
        raise SourceError(
            "config.json has a quantization_config; quantised checkpoints are not supported: use "
            "the original one"
        )
    family = for_config(config)
    return family, *spec_of(family, config, accept)
