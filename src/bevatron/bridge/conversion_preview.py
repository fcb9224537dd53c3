"""What a conversion would do, as a table made from headers alone. Nothing is written.

`import --dry-run` and `export --dry-run` show this table. The preview makes the same checks as the
conversion, so a conversion that passes here can fail only for lack of disk space or memory.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import Task, plan_import, written_bytes
from bevatron.bridge.convert import folder_on_disk, open_foreign, plan_target
from bevatron.bridge.export_plan import parse_size
from bevatron.bridge.foreign_checkpoint import Foreign, plan_foreign
from bevatron.bridge.hf_config import read_spec
from bevatron.bridge.hf_folder import open_hf
from bevatron.bridge.import_hf import (
    check_copies,
)
from bevatron.bridge.nanotron_write import left_out, tokenizer_files
from bevatron.bridge.open_weights import open_model
from bevatron.bridge.remote_code import MODULE, REPLACED, is_outdated
from bevatron.checkpoint.dtypes import ITEMSIZE, parse_dtype
from bevatron.checkpoint.new_folder import check_looked_at, check_space
from bevatron.checkpoint.storage import located
from bevatron.families.config_fields import check_accepted


@dataclass(frozen=True)
class Line:
    """One native tensor: what it is made of (or becomes), and what is written of it.

    `files`: those that are written; `nbytes`: of this tensor in them."""

    native: str
    shape: tuple[int, ...]
    transform: str
    tensors: tuple[str, ...]
    dtype: str
    to: str
    nbytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Preview:
    """The table and its totals.

    Attributes:
        read, written: bytes of tensors; `shards`: weight files and their sizes in bytes.
        skipped: tensors and files of the source that are not taken, with the reason.
    """

    source: str
    target: str
    family: str
    parameters: int
    lines: tuple[Line, ...]
    read: int
    written: int
    shards: Mapping[str, int]
    files: int
    duplicates: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"dry_run": True, **asdict(self)}

    def text(self) -> str:
        """The table, for people."""
        head = ("native tensor", "shape", "dtype", "transform", "Hugging Face tensors", "bytes")
        rows = [(*head, "written to")]
        for line in self.lines:
            rows.append(
                (
                    line.native,
                    "x".join(map(str, line.shape)) or "scalar",
                    line.dtype if line.dtype == line.to else f"{line.dtype} -> {line.to}",
                    line.transform,
                    folded(line.tensors),
                    f"{line.nbytes:,}",
                    ", ".join(line.files),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        table = [
            "  ".join(
                cell.rjust(w) if i == len(head) - 1 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, [*widths, 0], strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*table, "", *self._totals()])

    def _totals(self) -> list[str]:
        hf = sum(len(line.tensors) for line in self.lines) + len(self.duplicates)
        sizes = ", ".join(f"{name} {size:,}" for name, size in self.shards.items())
        return [
            f"{self.source} -> {self.target}: {self.family}, {self.parameters:,} parameters",
            f"{hf:,} Hugging Face tensors, {len(self.lines):,} native ones; {self.read:,} bytes "
            f"read, {self.written:,} written to {len(self.shards)} weight files ({sizes}); "
            f"{self.files} other files kept byte for byte",
            *(f"{name}: must be a copy of {other}" for name, other in self.duplicates.items()),
            *(f"{name}: carried along: {why}" for name, why in self.carried.items()),
            *(f"{name}: skipped: {why}" for name, why in self.skipped.items()),
            *self.notes,
            "nothing was written",
        ]


def preview_import(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    source_format: str = "auto",
    accept: Collection[str] = (),
) -> Preview:
    """What `import_checkpoint` with these arguments would do. Raises BevatronError as it would."""
    dst = located(dst)
    to = parse_dtype(dtype) if dtype else None
    check_looked_at(dst, overwrite=overwrite)
    if foreign := open_foreign(src, source_format, revision, accept):
        return _foreign(foreign, dst, to, overwrite)
    source = open_hf(src, revision)
    notes = check_looked_at(dst, overwrite=overwrite, apart_from=source.path)
    check_accepted(source.config, accept)
    family, spec, _ = read_spec(source, accept)
    plan = plan_import(str(source.path), family, spec, source.tensors(), to)
    check_space(dst, written_bytes(plan.tasks))
    with Mover(lambda nbytes: None) as mover:
        check_copies(source, plan.duplicates, mover, {})
    lines = tuple(_line(task, (plan.places[task.native][0],)) for task in plan.tasks)
    return Preview(
        source=source.name,
        target=str(dst),
        family=family.name,
        parameters=sum(p.numel for p in spec.parameters()),
        lines=lines,
        read=source.nbytes,
        written=written_bytes(plan.tasks),
        shards=_sizes(plan.headers, lines),
        files=len(source.others),
        duplicates=plan.duplicates,
        carried=plan.carried,
        skipped=source.skipped,
        notes=notes,
    )


def preview_export(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    target_format: str = "hf",
) -> Preview:
    """What `export_checkpoint` with these arguments would do. Raises BevatronError as it would."""
    dst = folder_on_disk(dst)
    to = parse_dtype(dtype) if dtype else None
    limit = parse_size(max_shard_size) if max_shard_size is not None else None
    check_looked_at(dst, overwrite=overwrite)
    native = open_model(src)
    notes = check_looked_at(dst, overwrite=overwrite, apart_from=native.folder)
    plan = plan_target(native, to, limit, target_format)
    check_space(dst, written_bytes(plan.tasks))
    lines = tuple(
        _line(task, tuple(dict.fromkeys(file for places in task.tensors for file, _ in places)))
        for task in plan.tasks
    )
    source, nanotron = native.folder / "source", target_format == "nanotron"
    others = sum(p.is_file() for p in source.rglob("*")) if source.is_dir() else 0
    skipped = left_out(native) if nanotron else {}
    decilm = native.family.name == "llama_nemotron" and not nanotron
    if decilm and is_outdated(source / f"{MODULE}.py"):
        others, skipped = others - 1, {f"{MODULE}.py": REPLACED}
    return Preview(
        source=str(src),
        target=str(dst),
        family=native.family.name,
        parameters=sum(p.numel for p in native.spec.parameters()),
        lines=lines,
        read=sum(t.nbytes for t in plan.tasks),
        written=sum(line.nbytes for line in lines),
        shards={
            file: len(header)
            + sum(t.nbytes for task in plan.tasks for p in task.tensors for f, t in p if f == file)
            for file, header in plan.headers.items()
        },
        files=len(tokenizer_files(native)) if nanotron else others,
        duplicates={} if nanotron else native.duplicates(),
        skipped=skipped,
        notes=notes,
    )


def _foreign(source: Foreign, dst: Path, dtype: str | None, overwrite: bool) -> Preview:
    """What an import of another format would do."""
    notes = check_looked_at(dst, overwrite=overwrite, apart_from=source.path)
    plan = plan_foreign(source, dtype)
    check_space(dst, sum(t.nbytes for t in plan.wanted.values()))
    native = source.native()
    lines = tuple(
        Line(
            native=name,
            shape=tensor.shape,
            transform=entry.transform,
            tensors=tuple(s.name for s in entry.sources),
            dtype=tensor.dtype,
            to=plan.wanted[name].dtype,
            nbytes=plan.wanted[name].nbytes,
            files=(plan.places[name][0],),
        )
        for name, entry, tensor in native.entries()
    )
    return Preview(
        source=source.name,
        target=str(dst),
        family=source.manifest.family,
        parameters=sum(p.numel for p in source.spec.parameters()),
        lines=lines,
        read=source.nbytes,
        written=sum(line.nbytes for line in lines),
        shards=_sizes(plan.headers, lines),
        files=len(source.others),
        skipped=source.skipped,
        notes=notes,
    )


def _line(task: Task, files: tuple[str, ...]) -> Line:
    entry = task.entry
    return Line(
        native=task.native,
        shape=entry.native.shape,
        transform=entry.transform,
        tensors=tuple(s.name for s in entry.sources),
        dtype=" and ".join(dict.fromkeys(task.dtypes)) or task.dtype,
        to=task.to,
        nbytes=entry.native.numel * ITEMSIZE[task.to],
        files=files,
    )


def _sizes(headers: Mapping[str, bytes], lines: tuple[Line, ...]) -> dict[str, int]:
    """Size of every weight file of an import: its header, and the tensors in it."""
    return {
        file: len(header) + sum(line.nbytes for line in lines if line.files == (file,))
        for file, header in headers.items()
    }


def folded(names: tuple[str, ...]) -> str:
    """Names that differ in one place as a shell would write them: a.{q,k,v}_proj.weight."""
    if len(names) < 2:
        return "".join(names)
    start = os.path.commonprefix(names)  # noqa: RUF071  (by characters is what is meant)
    rest = [name[len(start) :] for name in names]
    end = os.path.commonprefix([r[::-1] for r in rest])[::-1]  # noqa: RUF071
    return start + "{" + ",".join(r[: len(r) - len(end)] for r in rest) + "}" + end
