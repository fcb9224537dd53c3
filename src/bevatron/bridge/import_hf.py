"""Importing a Hugging Face folder as a native checkpoint: plan, move bytes, hash, commit."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import (
    ImportPlan,
    Task,
    plan_import,
    row_elements,
    written_bytes,
)
from bevatron.bridge.conversion_report import (
    ConversionReport,
    accepted_notes,
    non_finite_notes,
    shown_progress,
)
from bevatron.bridge.hf_config import read_spec
from bevatron.bridge.hf_folder import HFFolder, SourceError, open_hf
from bevatron.bridge.open_native import Native
from bevatron.bridge.provenance import FILE_NAME as PROVENANCE
from bevatron.bridge.provenance import describe, fingerprint
from bevatron.bridge.source_changes import unchanged
from bevatron.bridge.tensor_hashes import read_back
from bevatron.bridge.write_native import commit
from bevatron.checkpoint.dtypes import (
    FLOATS,
    ITEMSIZE,
    Converter,
    NonFinite,
    main_dtype,
)
from bevatron.checkpoint.manifest import Chunk, Manifest, TensorEntry
from bevatron.checkpoint.new_folder import check_space, check_target, new_folder
from bevatron.checkpoint.read_boxes import Hasher, new_hasher, spell
from bevatron.families.config_fields import check_accepted


def import_folder(
    src: str | Path,
    dst: Path,
    *,
    dtype: str | None,
    revision: str | None,
    overwrite: bool,
    show_progress: bool,
    accept: Collection[str],
) -> ConversionReport:
    """Write a native checkpoint at `dst` from an HF folder or Hub id; see `import_checkpoint`.

    Args:
        dtype: in safetensors' spelling.
    """
    started = time.perf_counter()
    source = open_hf(src, revision)
    check_target(dst, overwrite=overwrite, apart_from=source.path)
    check_accepted(source.config, accept)
    family, spec, accepted = read_spec(source, accept)
    plan = plan_import(str(source.path), family, spec, source.tensors(), dtype)
    check_space(dst, written_bytes(plan.tasks))
    with (
        new_folder(dst, overwrite=overwrite, apart_from=source.path) as folder,
        unchanged(source.path, source.stamps),
    ):
        (folder / "model").mkdir()
        shown = shown_progress("importing", source.nbytes, show_progress)
        with shown as advance, Mover(advance) as mover:
            chunks, hashes, non_finite, notes = _move_tensors(source, plan, mover, folder)
            check_copies(source, plan.duplicates, mover, hashes)
        _copy_others(source, folder / "source")
        manifest = Manifest(family.name, 0, chunks)
        native = Native.made(folder, manifest, spec, family)
        verified = read_back(native, hashes, dtype, show_progress)
        record = replace(
            describe(source, family.name, plan, hashes),
            dtype=dtype,
            accepted=accepted,
            weights=fingerprint(manifest),
            non_finite=non_finite,
            verified=verified,
        )
        (folder / PROVENANCE).write_text(record.to_json(), encoding="utf-8")
        commit(folder, spec, manifest)
    return ConversionReport(
        source=source.name,
        target=str(dst),
        family=family.name,
        parameters=sum(p.numel for p in spec.parameters()),
        tensors=len(source.tensors()),
        nbytes=source.nbytes,
        dtype=main_dtype((t.to, t.entry.native.numel) for t in plan.tasks),
        step=0,
        files=len(source.others),
        seconds=round(time.perf_counter() - started, 3),
        verified=verified,
        skipped=dict(source.skipped),
        non_finite=non_finite,
        notes=accepted_notes(accepted) + non_finite_notes(non_finite) + notes,
    )


def _move_tensors(
    source: HFFolder, plan: ImportPlan, mover: Mover, folder: Path
) -> tuple[dict[str, TensorEntry], dict[str, str], dict[str, int], list[str]]:
    """Execute the plan: manifest entries, hashes of the source tensors, how many of their values
    are not finite, and notes."""
    for file, header in plan.headers.items():
        mover.write(folder / file, 0, header)
    entries: dict[str, TensorEntry] = {}
    hashes: dict[str, str] = {}
    non_finite: dict[str, int] = {}
    notes: list[str] = []
    for task in plan.tasks:
        dtypes = [task.dtype_of(i) for i in range(len(task.entry.sources))]
        convert = [Converter(d, task.to) if d != task.to else None for d in dtypes]
        watch = [NonFinite(d) for d in dtypes] if dtypes[0] in FLOATS else []
        digest, found = _move_one(source, plan, task, mover, folder, convert, watch)
        hashes |= found
        non_finite |= {n: w.count for n, w in zip(found, watch, strict=False) if w.count}
        file, at = plan.places[task.native]
        shape = task.entry.native.shape
        chunk = Chunk((0,) * len(shape), shape, file, at, digest)
        entries[task.native] = TensorEntry(task.to, shape, (chunk,))
        if overflows := sum(c.overflows for c in convert if c):
            notes.append(
                f"{task.entry.native.name}: {overflows} values are too large for "
                f"{FLOATS[task.to]} and became infinite; use bf16"
            )
    return entries, hashes, non_finite, notes


def _move_one(
    source: HFFolder,
    plan: ImportPlan,
    task: Task,
    mover: Mover,
    folder: Path,
    convert: Sequence[Converter | None],
    watch: Sequence[NonFinite],
) -> tuple[str, dict[str, str]]:
    """Move one native tensor; its hash, and those of the HF tensors that it consists of."""
    file, at = plan.places[task.native]
    row = row_elements(task.entry)
    read = [new_hasher() for _ in task.entry.sources]
    same = len(read) == 1 and convert[0] is None
    written: Hasher = read[0] if same else new_hasher()
    for part in task.entry.rows:
        from_file, stored = task.tensors[part.source][0]
        itemsize = ITEMSIZE[task.dtype_of(part.source)]
        begin = stored.begin + part.source_start * row * itemsize
        mover.move(
            (source.path / from_file, begin),
            part.count * row * itemsize,
            ((folder / file, at + part.native_start * row * ITEMSIZE[task.to]),),
            read_hashers=(read[part.source],),
            written_hashers=() if same else (written,),
            convert=convert[part.source],
            watch=watch[part.source] if watch else None,
        )
    hashes = {s.name: spell(h) for s, h in zip(task.entry.sources, read, strict=True)}
    return spell(written), hashes


def check_copies(
    source: HFFolder, duplicates: Mapping[str, str], mover: Mover, hashes: dict[str, str]
) -> None:
    """Refuse a tensor that must be a copy of another (a tied head that is stored as well) and has
    other values: transformers would compute with the one, a tied model with the other.

    Args:
        duplicates: tensor -> the one that it must be a copy of.
        hashes: what is known of the tensors' hashes, to which this adds those that it needs.
    """
    tensors = source.tensors()
    for name, other in duplicates.items():
        for each in (name, other):
            if each not in hashes:
                file, stored = tensors[each]
                place, hasher = (source.path / file, stored.begin), new_hasher()
                mover.move(place, stored.nbytes, (), read_hashers=(hasher,))
                hashes[each] = spell(hasher)
        if hashes[name] != hashes[other]:
            raise SourceError(
                f"{source.path}: config.json ties {name} to {other} (tie_word_embeddings), but "
                f"their values differ; set it to false to keep both, or remove {name}"
            )


def _copy_others(source: HFFolder, folder: Path) -> None:
    folder.mkdir()
    for name in source.folders:
        (folder / name).mkdir()
    with Mover(lambda n: None) as mover:
        for name in source.others:
            mover.copy(source.path / name, folder / name)
