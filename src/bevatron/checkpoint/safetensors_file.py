"""The header of a safetensors file: read strictly, written as safetensors writes it.

A file is 8 bytes of header length (little-endian), the header (JSON, padded with spaces), then the
tensors' bytes without gaps. The safetensors library accepts a duplicate tensor name (the last one
wins) and explains a Git LFS pointer as "header too large"; both are clear errors here, and no
tensor is ever loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.storage import open_file
from bevatron.checkpoint.strict_json import parse_object
from bevatron.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
SIZE_LIMIT = 1 << 62
DIMENSION_LIMIT = 64  # that of torch and numpy


class SafetensorsError(CheckpointError):
    """A file that is no valid safetensors file."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes are `begin` to `end` of the file (absolute)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a header says, in its own order of tensors, and its text as it stands in the file
    (padding included, so that it can be written again byte for byte)."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    text: bytes

    @property
    def data_start(self) -> int:
        return 8 + len(self.text)

    @property
    def file_size(self) -> int:
        return max((t.end for t in self.tensors.values()), default=self.data_start)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file against the size of the file.

    Raises SafetensorsError saying what is wrong with which tensor."""
    with closing(open_file(path)) as file:
        size = file.size
        start = bytearray(min(size, 512))
        file.read(memoryview(start), 0)
        _check_kind(bytes(start), path)
        if size < 8:
            raise SafetensorsError(
                f"{path}: has {size} bytes, too few for a safetensors file; download it again"
            )
        length = int.from_bytes(start[:8], "little")
        if length > HEADER_LIMIT:
            raise SafetensorsError(
                f"{path}: claims a header of {length} bytes, more than the {HEADER_LIMIT} that "
                "safetensors allows; this is no safetensors file, or it is damaged"
            )
        if length + 8 > size:
            raise SafetensorsError(
                f"{path}: claims a header of {length} bytes but has only {size}; it is truncated "
                "or damaged: download it again"
            )
        text = bytearray(length)
        file.read(memoryview(text), 8)
    return parse_header(bytes(text), path, size)


def parse_header(text: bytes, path: Path, size: int | None) -> Header:
    """Check the text of a header. `size`: of the whole file, or None if there is no file."""
    if not text.startswith(b"{"):
        raise SafetensorsError(f"{path}: its header does not begin with '{{'; it is damaged")
    try:
        raw = parse_object(text, f"{path}: header")
    except CheckpointError as error:
        raise SafetensorsError(str(error)) from error
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise SafetensorsError(f"{path}: __metadata__ must map strings to strings")
    start = 8 + len(text)
    tensors = {name: _tensor(value, name, start, path) for name, value in raw.items()}
    _check_tiling(tensors, start, size, path)
    return Header(tensors, metadata, text)


def write_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file (length included) whose tensors lie in the given order.

    Args:
        tensors: name, dtype and shape of each.
        metadata: becomes `__metadata__`; left out if empty.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * ITEMSIZE[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(value: Any, name: str, start: int, path: Path) -> Stored:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(
            f"{path}: {_shown(name)} must have exactly dtype, shape and data_offsets"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise SafetensorsError(f"{path}: {_shown(name)} is no Unicode text; rename it") from error
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if isinstance(shape, list) and len(shape) > DIMENSION_LIMIT:
        raise SafetensorsError(
            f"{path}: {_shown(name)} has {len(shape)} dimensions, expected at most "
            f"{DIMENSION_LIMIT}; the file is damaged"
        )
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise SafetensorsError(
            f"{path}: {_shown(name)} has dtype {dtype!r:.200}, which is unknown or "
            f"packed; known are {', '.join(ITEMSIZE)}"
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorsError(
            f"{path}: {_shown(name)} has shape {shape!r:.200} and data_offsets "
            f"{offsets!r:.200}; expected non-negative integers, begin before end"
        )
    nbytes = ITEMSIZE[dtype]
    for n in shape:
        nbytes *= n
        if max(n, nbytes) > SIZE_LIMIT:
            raise SafetensorsError(
                f"{path}: {_shown(name)} of shape {shape} is larger than any file"
            )
    if nbytes != offsets[1] - offsets[0]:
        raise SafetensorsError(
            f"{path}: {_shown(name)} of shape {shape} in {dtype} takes {nbytes} bytes, but the "
            f"header gives it {offsets[1] - offsets[0]}; the file is damaged"
        )
    return Stored(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _shown(name: str) -> str:
    return repr(name[:200])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_tiling(tensors: Mapping[str, Stored], start: int, size: int | None, path: Path) -> None:
    at, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            what = "overlaps" if tensor.begin < at else "leaves a gap after"
            raise SafetensorsError(
                f"{path}: {_shown(name)} begins at byte {tensor.begin} and {what} {before}, "
                f"which ends at {at}; the file is damaged"
            )
        at, before = tensor.end, _shown(name)
    if size is not None and size != at:
        what = "is truncated" if size < at else "has trailing bytes"
        raise SafetensorsError(
            f"{path}: has {size} bytes, its header describes {at}; it {what}: download it again"
        )


def _check_kind(start: bytes, path: Path) -> None:
    """Files that are often found where weights should be. A header's length may look like the
    first bytes of any of them, so what follows it decides."""
    advice = None
    if start[8:9] == b"{":
        return
    head = start.lstrip().lower()
    if not start:
        advice = "is empty (0 bytes); download it again"
    elif start.startswith(b"version https://git-lfs"):
        advice = (
            "is a Git LFS pointer, not the weights; run `git lfs pull` in its folder or download "
            "it with `hf download`"
        )
    elif head.startswith((b"<!doctype", b"<html", b"<?xml")):
        advice = "is a web page, not weights (often a login or an error page); download it again"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        advice = "is a PyTorch pickle, not safetensors, and is not opened; convert it first"
    elif start.startswith(b"GGUF"):
        advice = "is a GGUF file, not safetensors"
    if advice:
        raise SafetensorsError(f"{path}: {advice}")
