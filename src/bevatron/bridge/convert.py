"""The two directions of conversion: into a native checkpoint, and out of one."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import written_bytes
from bevatron.bridge.conversion_report import ConversionReport, non_finite_notes, shown_progress
from bevatron.bridge.export_hf import identical, move_tensors, write_rest
from bevatron.bridge.export_plan import (
    ExportPlan,
    parse_size,
    plan_export,
)
from bevatron.bridge.foreign_checkpoint import Foreign, import_foreign
from bevatron.bridge.hf_folder import SourceError
from bevatron.bridge.import_hf import import_folder
from bevatron.bridge.merged_weights import merge_notes, read_through
from bevatron.bridge.nanotron_read import is_nanotron, open_nanotron
from bevatron.bridge.nanotron_write import left_out, plan_nanotron, write_around
from bevatron.bridge.open_native import Native
from bevatron.bridge.open_weights import open_model
from bevatron.bridge.remote_code import wont_read
from bevatron.bridge.source_changes import stamps, unchanged
from bevatron.bridge.tensor_hashes import read_back
from bevatron.checkpoint.dtypes import (
    parse_dtype,
)
from bevatron.checkpoint.new_folder import check_space, check_target, new_folder
from bevatron.checkpoint.run_folder import resolve
from bevatron.checkpoint.storage import is_url, located
from bevatron.errors import BevatronError


def import_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    source_format: str = "auto",
    accept: Collection[str] = (),
) -> ConversionReport:
    """Convert an HF folder or Hub id, or a Nanotron checkpoint, into a native one at `dst`.

    Args:
        source_format: hf, nanotron, or auto, which looks at the folder.
        dtype: bf16, fp16 or fp32 for all parameters; None keeps each as it is.
        revision: of a Hub id.
        overwrite: replace `dst`, which stays until the new one is complete.
        accept: fields of config.json that are not understood and that the user says do nothing.
    Raises BevatronError; nothing is left at `dst` then, and an old one stays as it was.
    """
    dst = located(dst)
    to = parse_dtype(dtype) if dtype else None
    check_target(dst, overwrite=overwrite)
    if foreign := open_foreign(src, source_format, revision, accept):
        return import_foreign(
            foreign, dst, dtype=to, overwrite=overwrite, show_progress=show_progress
        )
    return import_folder(
        src,
        dst,
        dtype=to,
        revision=revision,
        overwrite=overwrite,
        show_progress=show_progress,
        accept=accept,
    )


def open_foreign(
    src: str | Path, source_format: str, revision: str | None, accept: Collection[str] = ()
) -> Foreign | None:
    """`src` as a checkpoint of another format, or None if it is a Hugging Face one."""
    if source_format != "nanotron" and not (source_format == "auto" and is_nanotron(located(src))):
        return None
    if revision is not None:
        raise SourceError(f"{src}: is read from disk, so --revision has no meaning; drop it")
    if accept:
        raise SourceError(
            f"{src}: is a Nanotron checkpoint, and --accept-field is about config.json; drop it"
        )
    return open_nanotron(src)


def export_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    target_format: str = "hf",
) -> ConversionReport:
    """Convert a native checkpoint, or a run's latest step, into an HF folder at `dst`, or into a
    Nanotron checkpoint.

    Args:
        target_format: hf or nanotron.
        dtype: bf16, fp16 or fp32; None keeps the stored one.
        max_shard_size: such as 5GB (the default where shards are laid out anew).
        overwrite: replace `dst`, which stays until the new one is complete.
    Raises BevatronError; nothing is left at `dst` then, and an old one stays as it was.
    """
    started = time.perf_counter()
    dst = folder_on_disk(dst)
    to = parse_dtype(dtype) if dtype else None
    limit = parse_size(max_shard_size) if max_shard_size is not None else None
    check_target(dst, overwrite=overwrite)
    before = stamps(resolve(src))
    native = open_model(src)
    for folder in read_through(native.folder):
        check_target(dst, overwrite=overwrite, apart_from=folder)
    nanotron = target_format == "nanotron"
    renewed: list[str] = []
    plan = plan_target(native, to, limit, target_format)
    check_space(dst, written_bytes(plan.tasks))
    with (
        new_folder(dst, overwrite=overwrite, apart_from=native.folder) as folder,
        unchanged(native.folder, before),
    ):
        total = sum(t.nbytes for t in plan.tasks)
        with shown_progress("exporting", total, show_progress) as advance, Mover(advance) as mover:
            hashes, non_finite, notes = move_tensors(native, plan, mover, folder)
        if nanotron:
            files, more = write_around(native, folder, dst, plan.dtype)
            verified = read_back(open_nanotron(folder).native(), hashes, None, show_progress)
            notes += more
        else:
            files, verified, renewed = write_rest(native, plan, folder, hashes, show_progress)
    stored = [place for t in plan.tasks for places in t.tensors for _, place in places]
    skipped = native.provenance.skipped if native.provenance else {}
    if native.moved_from and not nanotron:
        notes.append(
            f"the model is no longer a {native.moved_from}; it was written as {native.family.name}"
        )
    if native.family.name == "llama_nemotron":
        notes += wont_read(native.spec)
    return ConversionReport(
        source=str(src),
        target=str(dst),
        family=native.family.name,
        parameters=sum(p.numel for p in native.spec.parameters()),
        tensors=len(plan.headers) if nanotron else len(stored),
        nbytes=sum(t.nbytes for t in stored),
        dtype=plan.dtype,
        step=native.manifest.step,
        files=files,
        seconds=round(time.perf_counter() - started, 3),
        verified=verified,
        identical=identical(native, plan) and not renewed,
        skipped=left_out(native) if nanotron else dict(skipped),
        non_finite=non_finite,
        notes=merge_notes(native.folder) + non_finite_notes(non_finite) + renewed + notes,
    )


def folder_on_disk(dst: str | Path) -> Path:
    """`dst`, refused if it is a URL."""
    if is_url(str(dst)):
        raise BevatronError(
            f"{dst}: an export is written to a folder on disk, where other programs can read "
            "it; name such a folder, and copy it to the URL from there"
        )
    return Path(dst)


def plan_target(
    native: Native, dtype: str | None, max_shard_size: int | None, target_format: str
) -> ExportPlan:
    """The plan of an export to hf or nanotron. Raises FamilyError if the model cannot be expressed
    there."""
    if target_format != "nanotron":
        return plan_export(native, dtype, max_shard_size)
    if max_shard_size is not None:
        raise BevatronError(
            "--max-shard-size has no meaning with --to nanotron, which has a file for each "
            "parameter; drop it"
        )
    return ExportPlan(*plan_nanotron(native, dtype), index=None, source_files=False)
