"""A checkpoint in another format, seen as native tensors whose chunks lie in its files; its import.

A reader of a format makes a `Foreign`. Everything else (import, training, generation, inspect,
verify) reads boxes and needs to know nothing of the format. An import streams the boxes in
row-major order.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import bevatron
from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import row_elements
from bevatron.bridge.conversion_report import ConversionReport, non_finite_notes, shown_progress
from bevatron.bridge.open_native import Native
from bevatron.bridge.provenance import FILE_NAME as PROVENANCE
from bevatron.bridge.provenance import Provenance, fingerprint
from bevatron.bridge.source_changes import Stamp, unchanged
from bevatron.bridge.tensor_hashes import Advance, read_back
from bevatron.bridge.write_native import Table, commit, lay_out, write_tensors
from bevatron.checkpoint.dtypes import FLOATS, ITEMSIZE, Converter, NonFinite, main_dtype
from bevatron.checkpoint.manifest import Manifest, TensorEntry
from bevatron.checkpoint.new_folder import check_space, check_target, new_folder
from bevatron.checkpoint.read_boxes import HASH_BUFFER, hash_range, new_hasher, spell, stream_rows
from bevatron.checkpoint.safetensors_file import Stored
from bevatron.checkpoint.storage import open_file
from bevatron.families.registry import by_name
from bevatron.families.weight_map import Entry, Rows
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

    def native(self) -> Native:
        """The same as if it were native."""
        family = by_name(self.manifest.family)
        return Native.made(self.path, self.manifest, self.spec, family)

    def config_text(self, dtype: str | None = None) -> str:
        """config.json, for weights that became `dtype` (safetensors' spelling) if that is given."""
        config = dict(self.config)
        if dtype is not None:
            config |= {"dtype": FLOATS[dtype], "torch_dtype": FLOATS[dtype]}
        return json.dumps(config, indent=2) + "\n"


class ForeignPlan(NamedTuple):
    """What an import will write: native name -> tensor (without chunks), the same as a table, and
    the tensor's file and byte; file -> its first bytes."""

    wanted: Mapping[str, TensorEntry]
    table: Table
    places: Mapping[str, tuple[str, int]]
    headers: Mapping[str, bytes]


@dataclass
class _Found:
    """What moving the tensors showed: of weight files and of HF tensors the hash as read, of HF
    tensors how many values are not finite, and notes."""

    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_foreign(source: Foreign, dtype: str | None) -> ForeignPlan:
    """Lay the native tensors out, all of `dtype` if that is given."""
    tensors = source.manifest.tensors
    wanted = {name: TensorEntry(dtype or t.dtype, t.shape, ()) for name, t in tensors.items()}
    table = [(name, t.dtype, t.shape) for name, t in wanted.items()]
    return ForeignPlan(wanted, table, *lay_out(table))


def import_foreign(
    source: Foreign, dst: Path, *, dtype: str | None, overwrite: bool, show_progress: bool = True
) -> ConversionReport:
    """Write a native checkpoint at `dst`.

    Args:
        dtype: in safetensors' spelling, for all parameters; None keeps each as it is.
    Raises BevatronError; nothing is left at `dst` then, and an old one stays as it was.
    """
    started = time.perf_counter()
    check_target(dst, overwrite=overwrite, apart_from=source.path)
    plan = plan_foreign(source, dtype)
    check_space(dst, sum(t.nbytes for t in plan.wanted.values()))
    family = by_name(source.manifest.family)
    with (
        new_folder(dst, overwrite=overwrite, apart_from=source.path) as folder,
        unchanged(source.path, source.stamps),
    ):
        (folder / "source").mkdir()
        with shown_progress("importing", source.nbytes, show_progress) as advance:
            entries, found = _write(source, plan, folder, advance)
        with Mover(lambda n: None) as mover:
            for path, kept in source.others.items():
                mover.copy(source.path / path, folder / "source" / kept)
        config = source.config_text(dtype)
        (folder / "source" / "config.json").write_text(config, encoding="utf-8")
        manifest = replace(source.manifest, tensors=entries)
        made = Native.made(folder, manifest, source.spec, family)
        verified = read_back(made, found.tensors, dtype, show_progress)
        record = Provenance(
            bevatron=bevatron.__version__,
            source=source.name,
            revision=None,
            family=manifest.family,
            dtype=dtype,
            weights=fingerprint(manifest),
            headers={},
            tensors={
                file: {
                    "dtype": t.dtype,
                    "shape": t.shape,
                    "file": file,
                    "xxh3": found.files[file][5:],
                }
                for file, t in source.stored.items()
            },
            skipped=source.skipped,
            non_finite=found.non_finite,
            verified=verified,
        )
        (folder / PROVENANCE).write_text(record.to_json(), encoding="utf-8")
        commit(folder, source.spec, manifest)
    return ConversionReport(
        source=source.name,
        target=str(dst),
        family=manifest.family,
        parameters=sum(p.numel for p in source.spec.parameters()),
        tensors=len(source.stored),
        nbytes=source.nbytes,
        dtype=main_dtype((t.dtype, t.nbytes) for t in plan.wanted.values()),
        step=manifest.step,
        files=len(source.others),
        seconds=round(time.perf_counter() - started, 3),
        verified=verified,
        skipped=dict(source.skipped),
        non_finite=found.non_finite,
        notes=[*source.notes, *non_finite_notes(found.non_finite), *found.notes],
    )


def _write(
    source: Foreign, plan: ForeignPlan, folder: Path, advance: Advance
) -> tuple[dict[str, TensorEntry], _Found]:
    """Execute the plan: manifest entries, and what was seen on the way."""
    found = _Found()
    stored = {name: (entry, tensor) for name, entry, tensor in source.native().entries()}

    def content(name: str) -> Iterator[memoryview]:
        entry, tensor = stored[name]
        # Right before they are read again, so that the second read costs no disk.
        found.files |= _hash_files(source, tensor, found.files)
        to, begin = plan.wanted[name].dtype, 0
        convert = Converter(tensor.dtype, to) if to != tensor.dtype else None
        read = [new_hasher() for _ in entry.sources]
        watch = [NonFinite(tensor.dtype) for _ in entry.sources]
        for view in stream_rows(source.path, tensor, memoryview(bytearray(HASH_BUFFER))):
            for number, part in _by_source(entry, ITEMSIZE[tensor.dtype], begin, view):
                read[number].update(part)
                watch[number].update(part)
            yield convert(view) if convert else view
            begin += len(view)
            advance(len(view))
        names = [s.name for s in entry.sources]
        found.tensors |= {n: spell(h) for n, h in zip(names, read, strict=True)}
        found.non_finite |= {n: w.count for n, w in zip(names, watch, strict=True) if w.count}
        if convert and convert.overflows:
            found.notes.append(
                f"{name}: {convert.overflows} values are too large for {FLOATS[to]} and "
                "became infinite; use bf16"
            )

    return write_tensors(folder, plan.table, content), found


def _by_source(
    entry: Entry, itemsize: int, begin: int, view: memoryview
) -> Iterator[tuple[int, memoryview]]:
    """The parts of a native tensor's bytes from `begin` on that belong to each HF tensor, by its
    number. They come in that one's own order."""
    row, end = row_elements(entry) * itemsize, begin + len(view)
    for rows in _meeting(entry, begin // row, -(-end // row)):
        low = max(begin, rows.native_start * row)
        high = min(end, (rows.native_start + rows.count) * row)
        yield rows.source, view[low - begin : high - begin]


def _meeting(entry: Entry, first: int, last: int) -> Sequence[Rows]:
    """Those of the entry's row runs that meet native rows `first` to `last`."""
    starts = [rows.native_start for rows in entry.rows]
    return entry.rows[bisect_right(starts, first) - 1 : bisect_left(starts, last)]


def _hash_files(source: Foreign, tensor: TensorEntry, known: dict[str, str]) -> dict[str, str]:
    """Hashes of the data of the files that a tensor lies in."""
    found, buffer = {}, memoryview(bytearray(HASH_BUFFER))
    for file in dict.fromkeys(c.file for c in tensor.chunks if c.file not in known):
        stored = source.stored[file]
        with closing(open_file(source.path / file)) as opened:
            found[file] = hash_range(opened, stored.begin, stored.nbytes, buffer)
    return found
