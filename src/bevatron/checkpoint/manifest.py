"""manifest.json: the table of contents of a native checkpoint, written last.

Its presence commits the folder. Tensors are global: a chunk is a box of one tensor that lies as
contiguous row-major bytes in one safetensors file. Names are `model/<parameter>` for weights,
`optimizer/<state>/<parameter>` for optimizer state, `carried/<hf name>` for source tensors that are
no parameters but return on export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bevatron.errors import BevatronError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"

# Bytes per element of every dtype that a native checkpoint may hold, in safetensors' spelling.
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
ITEMSIZE |= {"BOOL": 1}


class CheckpointError(BevatronError):
    """A native checkpoint that is missing, incomplete, damaged or from another format version."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins (elements per dimension), its shape, and where it lies.

    `file` is relative to the checkpoint; `at` is the byte position in it; `hash` is
    `xxh3:<32 hex digits>` of its bytes (XXH3, 128 bit)."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    at: int
    hash: str


@dataclass(frozen=True)
class TensorEntry:
    """One global tensor. Its chunks are disjoint and cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        n = ITEMSIZE[self.dtype]
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    family: str
    step: int
    tensors: Mapping[str, TensorEntry]
    version: int = FORMAT_VERSION
    extra: Mapping[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, TensorEntry]:
        """The model's parameters by native name."""
        return {n[6:]: t for n, t in self.tensors.items() if n.startswith("model/")}

    def to_json(self) -> str:
        """One tensor a line, so that a manifest can be read and compared by eye."""
        head = {"format": "bevatron", "version": self.version, "family": self.family}
        head |= {"step": self.step, **self.extra}
        lines = [f'  "{k}": {json.dumps(v)},' for k, v in head.items()]
        tensors = []
        for name, t in self.tensors.items():
            chunks = [
                {"offset": c.offset, "shape": c.shape, "file": c.file, "at": c.at, "hash": c.hash}
                for c in t.chunks
            ]
            entry = {"dtype": t.dtype, "shape": t.shape, "chunks": chunks}
            tensors.append(f"    {json.dumps(name)}: {json.dumps(entry)}")
        body = ",\n".join(tensors)
        return "{\n" + "\n".join(lines) + '\n  "tensors": {\n' + body + "\n  }\n}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`: version, dtypes, and chunks that tile each tensor."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {FILE_NAME}; this is not a complete native checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, this Bevatron reads {FORMAT_VERSION}; "
                "install the version that wrote it"
            )
        tensors = {name: _tensor(t) for name, t in raw["tensors"].items()}
        known = {"format", "version", "family", "step", "tensors"}
        extra = {k: v for k, v in raw.items() if k not in known}
        manifest = Manifest(raw["family"], raw["step"], tensors, version, extra)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    for name, tensor in manifest.tensors.items():
        _check_tensor(path, name, tensor)
    return manifest


def _tensor(raw: Any) -> TensorEntry:
    chunks = tuple(
        Chunk(tuple(c["offset"]), tuple(c["shape"]), c["file"], c["at"], c["hash"])
        for c in raw["chunks"]
    )
    return TensorEntry(raw["dtype"], tuple(raw["shape"]), chunks)


def _check_tensor(path: Path, name: str, tensor: TensorEntry) -> None:
    if tensor.dtype not in ITEMSIZE:
        raise CheckpointError(f"{path}: {name} has unknown dtype {tensor.dtype!r}")
    covered = 0
    for chunk in tensor.chunks:
        inside = len(chunk.offset) == len(chunk.shape) == len(tensor.shape) and all(
            o >= 0 and n >= 0 and o + n <= size
            for o, n, size in zip(chunk.offset, chunk.shape, tensor.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(f"{path}: a chunk of {name} lies outside of its tensor")
        parts = Path(chunk.file).parts
        if Path(chunk.file).is_absolute() or ".." in parts or "\\" in chunk.file:
            raise CheckpointError(f"{path}: {name} points outside of the folder: {chunk.file!r}")
        elements = 1
        for n in chunk.shape:
            elements *= n
        covered += elements
    if covered * ITEMSIZE[tensor.dtype] != tensor.nbytes:
        raise CheckpointError(
            f"{path}: the chunks of {name} hold {covered} elements, expected shape {tensor.shape}"
        )
