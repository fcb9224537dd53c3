"""manifest.json: the table of contents of a native checkpoint, written last.

Its presence commits the folder. Tensors are global: a chunk is a box of one tensor that lies as
contiguous row-major bytes in one safetensors file. Names are `model/<parameter>` for weights,
`optimizer/<state>/<parameter>` for optimizer state, `carried/<hf name>` for source tensors that are
no parameters but return on export.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bevatron.errors import BevatronError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"

# Bytes per element of every dtype that a native checkpoint may hold, in safetensors' spelling.
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
ITEMSIZE |= {"BOOL": 1}


class CheckpointError(BevatronError):
    """A native checkpoint that is missing, incomplete, damaged or from another format version."""


class NewerFormatError(CheckpointError):
    """A checkpoint of a format version that this Bevatron does not know; it is not damaged."""


class Chunk(NamedTuple):
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
        tensors = [
            (json.dumps(name), t.dtype, t.shape, map(chunk_json, t.chunks))
            for name, t in self.tensors.items()
        ]
        head = {"version": self.version, "family": self.family, "step": self.step}
        return manifest_json(head | dict(self.extra), tensors)


def manifest_json(
    head: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[str]]]
) -> str:
    """The text of a manifest.

    Args:
        head: what stands before the tensors: version, family, step, and more.
        tensors: of each its name (as JSON), dtype, shape, and chunks (as JSON).
    """
    lines = [f'  "{k}": {json.dumps(v)},' for k, v in {"format": "bevatron", **head}.items()]
    body = ",\n".join(
        f'    {name}: {{"dtype": "{dtype}", "shape": {list(shape)}, '
        f'"chunks": [{", ".join(chunks)}]}}'
        for name, dtype, shape, chunks in tensors
    )
    return "{\n" + "\n".join(lines) + '\n  "tensors": {\n' + body + "\n  }\n}\n"


def chunk_json(chunk: Chunk) -> str:
    """A chunk as the manifest spells it."""
    return (
        f'{{"offset": {list(chunk.offset)}, "shape": {list(chunk.shape)}, '
        f'"file": {json.dumps(chunk.file)}, "at": {chunk.at}, "hash": "{chunk.hash}"}}'
    )


@contextmanager
def _without_gc() -> Iterator[None]:
    """Millions of new objects, none of them garbage: the collector would walk them many times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`: version, dtypes, and chunks that tile each tensor.

    Raises CheckpointError; NewerFormatError if only a later Bevatron can read it."""
    with _without_gc():
        return _read_manifest(folder)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {FILE_NAME}; this is not a complete native checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["version"]
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            raise (NewerFormatError if newer else CheckpointError)(
                f"{path}: format version {version}, this Bevatron reads {FORMAT_VERSION}; "
                "install the version that wrote it"
            )
        tensors = {name: _tensor(t) for name, t in raw["tensors"].items()}
        known = {"format", "version", "family", "step", "tensors"}
        extra = {k: v for k, v in raw.items() if k not in known}
        manifest = Manifest(raw["family"], raw["step"], tensors, version, extra)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    inside: set[str] = set()
    try:
        for name, tensor in manifest.tensors.items():
            _check_tensor(path, name, tensor, inside)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    return manifest


def _tensor(raw: Any) -> TensorEntry:
    chunks = tuple(
        Chunk(tuple(c["offset"]), tuple(c["shape"]), c["file"], c["at"], c["hash"])
        for c in raw["chunks"]
    )
    return TensorEntry(raw["dtype"], tuple(raw["shape"]), chunks)


def _check_tensor(path: Path, name: str, tensor: TensorEntry, inside: set[str]) -> None:
    """`inside`: files that are known to lie in the folder, to which this adds."""
    if tensor.dtype not in ITEMSIZE:
        raise CheckpointError(f"{path}: {name} has unknown dtype {tensor.dtype!r}")
    covered, rank = 0, len(tensor.shape)
    for offset, shape, file, _, _ in tensor.chunks:
        fits = len(offset) == len(shape) == rank
        for o, n, size in zip(offset, shape, tensor.shape, strict=False):
            fits = fits and o >= 0 and n >= 0 and o + n <= size
        if not fits:
            raise CheckpointError(f"{path}: a chunk of {name} lies outside of its tensor")
        if file not in inside:
            if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file:
                raise CheckpointError(f"{path}: {name} points outside of the folder: {file!r}")
            inside.add(file)
        covered += math.prod(shape)
    if covered * ITEMSIZE[tensor.dtype] != tensor.nbytes:
        raise CheckpointError(
            f"{path}: the chunks of {name} hold {covered} elements, expected shape {tensor.shape}"
        )
