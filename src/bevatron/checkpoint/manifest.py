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
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from bevatron.checkpoint.dtypes import ITEMSIZE, NATIVE
from bevatron.checkpoint.strict_json import parse_object
from bevatron.errors import CheckpointError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"

SIZE_LIMIT = 1 << 62  # of any number of elements or bytes


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
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    raw = parse_object(data, str(path))
    version = raw.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        raise (NewerFormatError if newer else CheckpointError)(
            f"{path}: format version {version!r:.80}, this Bevatron reads {FORMAT_VERSION}; "
            "install the version that wrote it"
        )
    family, step, tensors = raw.get("family"), raw.get("step"), raw.get("tensors")
    files = raw.get("files", {})  # of a run's step: hashes of those that hold no tensors
    for name, good in (
        ("family", isinstance(family, str)),
        ("step", _is_size(step)),
        ("tensors", isinstance(tensors, dict)),
        ("files", isinstance(files, dict) and all(map(_stays_inside, files))),
    ):
        if not good:
            raise CheckpointError(f"{path}: damaged: {name} is {raw.get(name)!r:.80}")
    assert isinstance(family, str) and isinstance(step, int) and isinstance(tensors, dict)
    inside: set[str] = set()
    found = {name: _tensor(path, name, value, inside) for name, value in tensors.items()}
    known = {"format", "version", "family", "step", "tensors"}
    extra = {k: v for k, v in raw.items() if k not in known}
    return Manifest(family, step, found, version, extra)


def _tensor(path: Path, name: str, raw: Any, inside: set[str]) -> TensorEntry:
    """One tensor, checked. `inside`: files that are known to lie in the folder, to which this adds.

    Column by column, for a large run's manifest has millions of chunks."""
    if type(raw) is not dict or raw.keys() != {"dtype", "shape", "chunks"}:
        raise CheckpointError(f"{path}: {name!r:.200} must have exactly dtype, shape and chunks")
    dtype, shape, listed = raw["dtype"], raw["shape"], raw["chunks"]
    if type(dtype) is not str or dtype not in NATIVE:
        raise CheckpointError(f"{path}: {name!r:.200} has unknown dtype {dtype!r:.80}")
    if type(shape) is not list or not _are_sizes(shape) or len(shape) > 64:
        raise CheckpointError(f"{path}: {name!r:.200} has the shape {shape!r:.80}; it is damaged")
    if type(listed) is not list or not all(type(c) is dict and c.keys() == _KEYS for c in listed):
        keys = ", ".join(_CHUNK)
        raise CheckpointError(f"{path}: {name!r:.200} must have a list of chunks, each with {keys}")
    if not listed:
        entry = TensorEntry(dtype, tuple(shape), ())
    else:
        offsets, shapes, files, at, hashes = zip(*map(itemgetter(*_CHUNK), listed), strict=True)
        boxes = (*offsets, *shapes)
        if set(map(type, boxes)) != {list} or {*map(type, hashes), *map(type, files)} != {str}:
            raise CheckpointError(f"{path}: a chunk of {name!r:.200} has values of wrong types")
        if not _are_sizes([*chain.from_iterable(boxes), *at]):
            raise CheckpointError(f"{path}: a chunk of {name!r:.200} has sizes that are none")
        for file in set(files) - inside:
            if not _lies_inside(file):
                raise CheckpointError(
                    f"{path}: {name!r:.200} points outside of the folder: {file!r:.200}"
                )
            inside.add(file)
        columns = (map(tuple, offsets), map(tuple, shapes), files, at, hashes)
        entry = TensorEntry(dtype, tuple(shape), tuple(map(Chunk, *columns)))
    if problem := tiling_problem(entry):
        raise CheckpointError(f"{path}: the chunks of {name!r:.200} {problem}; it is damaged")
    return entry


_CHUNK = ("offset", "shape", "file", "at", "hash")
_KEYS = set(_CHUNK)


def _lies_inside(file: Any) -> bool:
    """Whether it is the relative path of a file of ours."""
    plain = isinstance(file, str) and file.isprintable() and 0 < len(file) <= 1000
    return plain and "\\" not in file and _stays_inside(file)


def _stays_inside(file: str) -> bool:
    """Whether a relative path stays in the folder and can be opened. A source's files may have any
    names."""
    return not (Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= SIZE_LIMIT


def _are_sizes(values: list[Any]) -> bool:
    types = set(map(type, values))
    return types <= {int} and (not values or (min(values) >= 0 and max(values) <= SIZE_LIMIT))


def tiling_problem(entry: TensorEntry) -> str | None:
    """How the chunks fail to tile the tensor: every element in exactly one of them; None if they
    do."""
    chunks, rank = entry.chunks, len(entry.shape)
    if any(len(c[0]) != rank or len(c[1]) != rank for c in chunks):
        return f"do not have its {rank} dimensions"
    for d, size in enumerate(entry.shape):
        if max((c[0][d] + c[1][d] for c in chunks), default=0) > size:
            return f"lie outside of its shape {list(entry.shape)}"
    covered = sum([math.prod(c[1]) for c in chunks])
    if covered != math.prod(entry.shape):
        return f"hold {covered} elements, expected the shape {list(entry.shape)}"
    boxes = [c[:2] for c in chunks if 0 not in c[1]]
    return _overlap(boxes) if len(boxes) > 1 else None


Box = tuple[tuple[int, ...], tuple[int, ...]]
PAIRWISE = 1000


def _overlap(boxes: list[Box]) -> str | None:
    """Two of the boxes that overlap, if there are two. Whatever layout wrote them, they are cut by
    one plane after another, so that planes part them again."""
    for d in range(len(boxes[0][0])):
        boxes.sort(key=lambda box, d=d: box[0][d])  # type: ignore[misc]
        groups: list[list[Box]] = []
        end = -1
        for box in boxes:
            begin = box[0][d]
            if begin >= end:
                groups.append([])
            groups[-1].append(box)
            end = max(end, begin + box[1][d])
        if len(groups) > 1:
            several = (group for group in groups if len(group) > 1)
            return next((found for group in several if (found := _overlap(group))), None)
    if len(boxes) > PAIRWISE:
        return f"overlap: no plane parts {len(boxes)} of them"
    for i, (low, size) in enumerate(boxes):
        for other, extent in boxes[i + 1 :]:
            shared = zip(low, size, other, extent, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in shared):
                return f"overlap: {list(size)} at {list(low)} and {list(extent)} at {list(other)}"
    return None
