"""The table of what one rank wrote of a step, a small file for the rank that commits the step.

While a step is written, `ranks/rank-00003.txt` appears in its partial folder as soon as rank 3's
files are on disk. The rank that commits waits for all tables and joins them into a manifest. So
saving needs no collective and can go on beside training. Joining moves text and makes no objects,
because at 16,384 ranks a step has millions of chunks.

The first line of a table is a JSON object with the sizes of the rank's files. Every other line is
one tensor: its name, dtype, shape, the number of elements, and the chunk (JSON, between tabs).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.manifest import FORMAT_VERSION, TensorEntry, chunk_json, manifest_json
from bevatron.checkpoint.new_folder import replace_text
from bevatron.errors import CheckpointError

FOLDER = "ranks"


@dataclass
class _Row:
    dtype: str
    shape: tuple[int, ...]
    chunks: list[str]
    elements: int = 0


@dataclass
class Merged:
    """All ranks' tables, joined: what a manifest is written from.

    Attributes:
        tensors: the name as JSON -> its chunks as JSON.
        sizes: file -> bytes.
    """

    family: str
    step: int
    tensors: dict[str, _Row] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        head = {"version": FORMAT_VERSION, "family": self.family, "step": self.step, **self.extra}
        rows = ((n, row.dtype, row.shape, row.chunks) for n, row in self.tensors.items())
        return manifest_json(head, rows)


def leave_table(folder: Path, rank: int, entries: Mapping[str, TensorEntry]) -> None:
    """Say that this rank's files are complete. `entries`: what it wrote of every tensor."""
    lines, files = [], set()
    for name, entry in entries.items():
        about = f"{json.dumps(name)}\t{entry.dtype}\t{json.dumps(entry.shape)}"
        for chunk in entry.chunks:
            files.add(chunk.file)
            lines.append(f"{about}\t{math.prod(chunk.shape)}\t{chunk_json(chunk)}")
        if not entry.nbytes:
            lines.append(f"{about}\t0\t")
    sizes = {file: (folder / file).stat().st_size for file in sorted(files)}
    replace_text(
        folder / FOLDER / f"rank-{rank:05d}.txt",
        "\n".join([json.dumps(sizes), *lines]),
        durable=False,
    )


def wait_for_tables(folder: Path, ranks: int, stop: threading.Event) -> bool:
    """Wait until every rank has left its table; False if `stop` was set before."""
    pause = 0.005
    while _count(folder / FOLDER) < ranks:
        if stop.wait(pause):
            return False
        pause = min(1.0, 1.5 * pause)
    return True


def _count(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(not entry.name.startswith(".") for entry in entries)


def merge_tables(folder: Path, ranks: int, family: str, step: int) -> Merged:
    """Join all ranks' tables, and remove them.

    Raises CheckpointError if a file or a part of a tensor is missing."""
    merged = Merged(family, step)
    for rank in range(ranks):
        text = (folder / FOLDER / f"rank-{rank:05d}.txt").read_text(encoding="utf-8")
        sizes, *lines = text.split("\n")
        merged.sizes |= json.loads(sizes)
        _join(merged.tensors, lines)
    for name, row in merged.tensors.items():
        if row.elements != math.prod(row.shape):
            raise CheckpointError(
                f"{folder}: the ranks wrote {row.elements} elements of {name}, expected the shape "
                f"{list(row.shape)}"
            )
    check_sizes(folder, merged.sizes)
    shutil.rmtree(folder / FOLDER)
    return merged


def _join(tensors: dict[str, _Row], lines: list[str]) -> None:
    for line in lines:
        name, dtype, shape, elements, chunk = line.split("\t")
        row = tensors.get(name)
        if row is None:
            row = tensors[name] = _Row(dtype, tuple(json.loads(shape)), [])
        if chunk:
            row.chunks.append(chunk)
            row.elements += int(elements)


def check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Raises CheckpointError if a file is missing or of another size."""
    for file, size in sizes.items():
        try:
            found = (folder / file).stat().st_size
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder / file}: is missing; expected {size} bytes") from error
        if found != size:
            raise CheckpointError(
                f"{folder / file}: has {found} bytes, expected {size}; it is damaged"
            )


def sizes_of(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    """The files that a manifest's tensors lie in, and where the last chunk in each ends."""
    ends: dict[str, int] = {}
    for entry in entries.values():
        for chunk in entry.chunks:
            end = chunk.at + math.prod(chunk.shape) * ITEMSIZE[entry.dtype]
            ends[chunk.file] = max(end, ends.get(chunk.file, 0))
    return ends
