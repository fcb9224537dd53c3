"""Which model the adapter in a step folder belongs to: adapter.json names its base.

A step of a run that trains an adapter holds the adapter alone. Its base lies where it lay before
the run, and must be the same model still.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bevatron.checkpoint.dtypes import Converter
from bevatron.checkpoint.manifest import Manifest, TensorEntry
from bevatron.checkpoint.read_boxes import both_ends, read_box
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import CheckpointError
from bevatron.spec import ModelSpec
from bevatron.spec.json import to_json

RECORD = "adapter.json"


class BaseError(CheckpointError):
    """The base of an adapter is gone or changed. The step that holds the adapter is whole."""


@dataclass(frozen=True)
class Base:
    """Attributes:
    path: where the base lies, or its Hub id.
    fingerprint: of its weights, see `model_fingerprint`."""

    path: str
    fingerprint: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_base(folder: Path) -> Base:
    """What a step's adapter.json says. Raises CheckpointError."""
    raw = read_object(folder / RECORD)
    path, fingerprint = raw.get("path"), raw.get("fingerprint")
    if not isinstance(path, str) or not isinstance(fingerprint, str):
        raise CheckpointError(
            f"{folder / RECORD}: expected path and fingerprint as texts, found {raw!r:.200}"
        )
    return Base(path, fingerprint)


def values(
    folder: Path, entry: TensorEntry, offset: tuple[int, ...], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """A box of a tensor as float32."""
    bits = np.ascontiguousarray(read_box(folder, entry, offset, shape))
    raw = Converter(entry.dtype, "F32")(bits.reshape(-1).view("u1").data)
    return np.frombuffer(raw, "<f4").reshape(shape)


def model_fingerprint(spec: ModelSpec, folder: Path, manifest: Manifest) -> str:
    """Of the spec and of numbers at both ends of every tensor: another model, or the same one
    trained on, has another one, while the same one in another format or place has not. Reads
    little; not safe against intent."""
    hasher = hashlib.sha256(to_json(spec).encode())
    weights = manifest.weights()
    for name, offset, size in both_ends({name: entry.shape for name, entry in weights.items()}):
        hasher.update(name.encode() + values(folder, weights[name], offset, size).tobytes())
    return hasher.hexdigest()
