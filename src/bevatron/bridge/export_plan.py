"""Which file every Hugging Face tensor of an export goes into.

A tensor goes back into the file that it was imported from if it still fits there, else into a new
one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevatron.bridge.conversion_plan import Task
from bevatron.bridge.hf_folder import INDEX, SINGLE
from bevatron.bridge.open_native import Native
from bevatron.bridge.provenance import fingerprint
from bevatron.checkpoint.dtypes import (
    ITEMSIZE,
    main_dtype,
)
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.safetensors_file import (
    Header,
    Stored,
    parse_header,
    write_header,
)
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError
from bevatron.families.registry import FamilyError

SHARD_SIZE = 5_000_000_000
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do.

    Attributes:
        headers: weight file -> its first bytes; `index`: the index to write, if a new one.
        source_files: the weight files are those recorded at import, headers included.
    """

    tasks: tuple[Task, ...]
    headers: Mapping[str, bytes]
    index: Mapping[str, Any] | None
    source_files: bool

    @property
    def dtype(self) -> str:
        """Of most elements, as config.json spells it."""
        return main_dtype((t.to, t.entry.native.numel) for t in self.tasks)


def plan_export(native: Native, dtype: str | None, max_shard_size: int | None) -> ExportPlan:
    """Where every HF tensor goes: as it was imported if possible, else in new shards. A source may
    lack metadata that transformers asks for; files with other weights than its have it.

    Raises FamilyError if no class of transformers can express the model."""
    _check_family(native)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    kept: list[tuple[str, Any, TensorEntry, str]] = []
    for name, entry, tensor in native.entries():
        to = dtype if dtype and name.startswith("model/") else tensor.dtype
        kept.append((name, entry, tensor, to))
        for source in entry.sources:
            wanted[source.name] = (to, source.shape)
    copies: dict[str, list[str]] = {}
    for copy, other in native.duplicates().items():
        wanted[copy] = wanted[other]
        copies.setdefault(other, []).append(copy)
    old = _old_headers(native, wanted) if max_shard_size is None else None
    if old is not None:
        found = old if unmodified(native) else {f: readable(h) for f, h in old.items()}
        places = {n: (file, t) for file, h in found.items() for n, t in h.tensors.items()}
        headers = {f: len(h.text).to_bytes(8, "little") + h.text for f, h in found.items()}
        index = None if unmodified(native) else _readable_index(native, places)
    else:
        places, headers, index = new_shards(wanted, max_shard_size or SHARD_SIZE)
    tasks = []
    for name, entry, tensor, to in kept:
        targets = tuple(
            tuple(places[n] for n in (s.name, *copies.get(s.name, ()))) for s in entry.sources
        )
        tasks.append(Task(name, entry, tensor.dtype, to, targets))
    return ExportPlan(tuple(tasks), headers, index, old is not None)


def _check_family(native: Native) -> None:
    try:
        native.family.config(native.spec, "float32", native.config)
    except FamilyError as error:
        raise FamilyError(
            f"{native.folder}: no Hugging Face class that Bevatron writes can express this model: "
            f"{error}; it can be trained and used as it is, and --to nanotron may express it"
        ) from error


def _old_headers(
    native: Native, wanted: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, Header] | None:
    """The headers recorded at import, if they describe exactly the wanted tensors."""
    if native.provenance is None or native.moved_from:
        return None
    headers = native.provenance.parsed_headers()
    found = {n: (t.dtype, t.shape) for h in headers.values() for n, t in h.tensors.items()}
    listed = len(headers) == 1 and SINGLE in headers
    if not listed and not (native.folder / "source" / INDEX).is_file():
        return None
    return headers if found == dict(wanted) else None


def _readable_index(
    native: Native, places: Mapping[str, tuple[str, Stored]]
) -> dict[str, Any] | None:
    """The source's index with what transformers asks of one; None if it has that, or there is
    none."""
    path = native.folder / "source" / INDEX
    if not path.is_file():
        return None
    index = read_object(path)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        return None
    total = sum(stored.nbytes for _, stored in places.values())
    kept = metadata if isinstance(metadata, dict) else {}
    return {**index, "metadata": {**kept, "total_size": total}}


def unmodified(native: Native) -> bool:
    record = native.provenance
    return record is not None and record.weights == fingerprint(native.manifest)


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
