"""Laying Hugging Face tensors out in new safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevatron.bridge.hf_folder import SINGLE
from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.safetensors_file import Header, Stored, parse_header, write_header
from bevatron.errors import BevatronError

SHARD_SIZE = 5_000_000_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: str | int) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(size).upper())
    unit = match[2] if match else None
    unit = f"{unit}B" if unit and not unit.endswith("B") else unit
    nbytes = int(float(match[1]) * _UNITS[unit]) if match and unit in _UNITS else 0
    if nbytes < 1:
        raise BevatronError(f"shard size {size!r} is not a size such as 5GB, 500MB or 2GiB")
    return nbytes


def new_shards(
    wanted: Mapping[str, tuple[str, tuple[int, ...]]], limit: int
) -> tuple[dict[str, tuple[str, Stored]], dict[str, bytes], dict[str, Any] | None]:
    """Lay tensors out in new files: their places, the files' headers, and the index if needed."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    sizes = [0]
    for name, (dtype, shape) in wanted.items():
        nbytes = _nbytes(dtype, shape)
        if groups[-1] and sizes[-1] + nbytes > limit:
            groups.append([])
            sizes.append(0)
        groups[-1].append((name, dtype, shape))
        sizes[-1] += nbytes
    places: dict[str, tuple[str, Stored]] = {}
    headers: dict[str, bytes] = {}
    for i, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        group.sort(key=lambda t: (-ITEMSIZE[t[1]], t[0]))  # the order of the safetensors library
        headers[file] = write_header(group, {"format": "pt"})
        at = len(headers[file])
        for name, dtype, shape in group:
            end = at + _nbytes(dtype, shape)
            places[name] = (file, Stored(dtype, shape, at, end))
            at = end
    if len(groups) == 1:
        return places, headers, None
    elements = sum(_nbytes(d, s) // ITEMSIZE[d] for d, s in wanted.values())
    index = {
        "metadata": {"total_parameters": elements, "total_size": sum(sizes)},
        "weight_map": {name: places[name][0] for name in sorted(places)},
    }
    return places, headers, index


# What transformers takes for the format of a file, without which it opens none.
FORMATS = ("pt", "tf", "flax", "mlx")


def readable(header: Header) -> Header:
    """The same tensors in the same places, in a file that transformers opens."""
    if header.metadata.get("format") in FORMATS:
        return header
    table = sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    tensors = [(name, stored.dtype, stored.shape) for name, stored in table]
    text = write_header(tensors, {**header.metadata, "format": "pt"})[8:]
    return parse_header(text, Path(SINGLE), None)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return TensorEntry(dtype, shape, ()).nbytes
