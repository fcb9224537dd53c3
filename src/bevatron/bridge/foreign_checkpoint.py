"""A checkpoint of another format: native tensors whose chunks are boxes in its files.

A reader of a format makes one of these. Everything else (import, training, generation, inspect,
verify) works on boxes and so needs to know nothing of the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bevatron.bridge.source_changes import Stamp
from bevatron.checkpoint.dtypes import FLOATS
from bevatron.checkpoint.manifest import Manifest
from bevatron.checkpoint.safetensors_file import Stored
from bevatron.spec.model import ModelSpec


@dataclass(frozen=True)
class Foreign:
    """What a reader found.

    Attributes:
        kind: the format, in one word; `name`: the path as the user gave it.
        path: the folder that chunks, `stored` and `others` are relative to.
        manifest: `model/...` tensors; the hashes of their chunks are empty.
        step: that the format records, if any.
        stored: weight file -> the one tensor in it; every one of them is used.
        config: a Hugging Face config.json that describes the model, token ids included.
        others: path below `path` -> name in `source/`: files to keep byte for byte.
        stamps: of all files that are read, taken before that.
        skipped: path -> why it is not taken along; `notes`: what the user should know.
    """

    kind: str
    name: str
    path: Path
    spec: ModelSpec
    manifest: Manifest
    step: int | None
    stored: Mapping[str, Stored]
    config: Mapping[str, Any]
    stamps: Mapping[str, Stamp]
    others: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.stored.values())

    def config_text(self, dtype: str | None = None) -> str:
        """config.json, for weights that became `dtype` (safetensors' spelling) if that is given."""
        config = dict(self.config)
        if dtype is not None:
            config |= {"dtype": FLOATS[dtype], "torch_dtype": FLOATS[dtype]}
        return json.dumps(config, indent=2) + "\n"
