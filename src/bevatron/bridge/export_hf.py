"""Native checkpoint -> Hugging Face folder: what did not change is written as it was.

If the tensors still have the names, shapes and dtypes of the imported ones, the weight files get
the headers and layout recorded at import, so an unmodified import comes back byte for byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bevatron
from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import Task, pieces
from bevatron.bridge.conversion_report import ConversionReport, non_finite_notes, shown_progress
from bevatron.bridge.export_shards import SHARD_SIZE, new_shards, parse_size, readable
from bevatron.bridge.hf_folder import GENERATION_CONFIG, INDEX, SINGLE
from bevatron.bridge.import_hf import copy_file, written_bytes
from bevatron.bridge.model_card import write_record
from bevatron.bridge.nanotron_writer import left_out, plan_nanotron, write_around
from bevatron.bridge.open_native import CONFIG, Native, open_native
from bevatron.bridge.provenance import fingerprint
from bevatron.bridge.remote_code import renew_own_code, wont_read, write_remote_code
from bevatron.bridge.source_changes import stamps, unchanged
from bevatron.bridge.tensor_hashes import hashes_of_files, prove
from bevatron.checkpoint.dtypes import (
    FLOATS,
    ITEMSIZE,
    Converter,
    NonFinite,
    main_dtype,
    parse_dtype,
)
from bevatron.checkpoint.locate import resolve
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.new_folder import check_space, check_target, new_folder
from bevatron.checkpoint.read_boxes import damaged, new_hasher, spell
from bevatron.checkpoint.safetensors_file import Header, Stored, read_header
from bevatron.checkpoint.storage import copy_tree, is_url
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError
from bevatron.families.config_fields import TOKEN_IDS
from bevatron.families.registry import FamilyError


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
    native = open_native(src)
    check_target(dst, overwrite=overwrite, apart_from=native.folder)
    nanotron, renewed = target_format == "nanotron", []
    plan = plan_target(native, to, limit, target_format)
    check_space(dst, written_bytes(plan.tasks))
    with (
        new_folder(dst, overwrite=overwrite, apart_from=native.folder) as folder,
        unchanged(native.folder, before),
    ):
        total = sum(t.nbytes for t in plan.tasks)
        with shown_progress("exporting", total, show_progress) as advance, Mover(advance) as mover:
            hashes, non_finite, notes = _move_tensors(native, plan, mover, folder)
        if nanotron:
            files, verified, more = write_around(native, folder, dst, _dtype(plan), hashes)
            notes += more
        else:
            files = _copy_source(native, plan, folder)
            if native.family.name == "llama_nemotron":
                renewed = renew_own_code(folder)
            verified = _read_back(native, plan, folder, hashes, show_progress)
            _write_own_files(native, plan, folder, hashes, verified)
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
        dtype=_dtype(plan),
        step=native.manifest.step,
        files=files,
        seconds=round(time.perf_counter() - started, 3),
        verified=verified,
        identical=_identical(native, plan) and not renewed,
        skipped=left_out(native) if nanotron else dict(skipped),
        non_finite=non_finite,
        notes=non_finite_notes(non_finite) + renewed + notes,
    )


def folder_on_disk(dst: str | Path) -> Path:
    """`dst`, refused if it is a URL."""
    if is_url(str(dst)):
        raise BevatronError(
            f"{dst}: an export goes into a folder on disk, since other programs are to read it; "
            "name one, and copy it from there"
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
        found = old if _unmodified(native) else {f: readable(h) for f, h in old.items()}
        places = {n: (file, t) for file, h in found.items() for n, t in h.tensors.items()}
        headers = {f: len(h.text).to_bytes(8, "little") + h.text for f, h in found.items()}
        index = None if _unmodified(native) else _readable_index(native, places)
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


def _move_tensors(
    native: Native, plan: ExportPlan, mover: Mover, folder: Path
) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """Execute the plan; every chunk's hash is checked on the way. Returns of every HF tensor the
    hash as written, and how many values are not finite if any; and notes."""
    for file, header in plan.headers.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        mover.write(folder / file, 0, header)
    hashes: dict[str, str] = {}
    non_finite: dict[str, int] = {}
    notes = []
    for task in plan.tasks:
        convert = Converter(task.dtype, task.to) if task.to != task.dtype else None
        tensor = native.manifest.tensors[task.native]
        ratio = (ITEMSIZE[task.to], ITEMSIZE[task.dtype])
        hashers = [new_hasher() for _ in tensor.chunks]
        written = [new_hasher() for _ in task.entry.sources]
        watch = [NonFinite(task.dtype) for _ in task.entry.sources] if task.dtype in FLOATS else []
        for piece in pieces(task.entry, tensor):
            begin = piece.begin * ratio[0] // ratio[1]
            targets = tuple(
                (folder / file, stored.begin + begin) for file, stored in task.tensors[piece.source]
            )
            mover.move(
                (native.folder / piece.file, piece.at),
                piece.nbytes,
                targets,
                read_hashers=(hashers[piece.chunk],),
                written_hashers=(written[piece.source],),
                convert=convert,
                watch=watch[piece.source] if watch else None,
            )
        hashes |= {s.name: spell(h) for s, h in zip(task.entry.sources, written, strict=True)}
        for chunk, hasher in zip(tensor.chunks, hashers, strict=True):
            if spell(hasher) != chunk.hash:
                nbytes = TensorEntry(tensor.dtype, chunk.shape, ()).nbytes
                path = native.folder / chunk.file
                raise damaged(path, chunk, nbytes, spell(hasher), task.native)
        sources = (s.name for s in task.entry.sources)
        non_finite |= {n: w.count for n, w in zip(sources, watch, strict=False) if w.count}
        if convert and convert.overflows:
            notes.append(
                f"{task.native}: {convert.overflows} values are too large for {FLOATS[task.to]} "
                "and became infinite; use bf16"
            )
    return hashes, non_finite, notes


def _read_back(
    native: Native, plan: ExportPlan, folder: Path, hashes: dict[str, str], show_progress: bool
) -> dict[str, Any]:
    """Read the new weight files again, headers first, and compare every tensor."""
    headers = {file: read_header(folder / file) for file in plan.headers}
    written = sum(t.nbytes for h in headers.values() for t in h.tensors.values())
    with shown_progress("verifying", written, show_progress) as advance:
        found = hashes_of_files(folder, headers, advance)
    copies = {copy: hashes[other] for copy, other in native.duplicates().items()}
    return prove(found, hashes | copies, [], str(folder))


def _copy_source(native: Native, plan: ExportPlan, folder: Path) -> int:
    """The files that the source held besides weights; how many."""
    source = native.folder / "source"
    if not source.is_dir():
        return 0
    with Mover(lambda n: None) as mover:
        count = copy_tree(source, folder, partial(copy_file, mover))
    if (folder / INDEX).exists() and not plan.source_files:
        (folder / INDEX).unlink()
        count -= 1
    return count


def _write_own_files(
    native: Native,
    plan: ExportPlan,
    folder: Path,
    hashes: Mapping[str, str],
    verified: Mapping[str, Any],
) -> None:
    """What must differ from the source, and what the source had none of."""
    if plan.index is not None:
        _write_json(folder / INDEX, plan.index)
    dtype = _dtype(plan)
    coded = native.family.name == "llama_nemotron" and not _identical(native, plan)
    mapped = not coded or bool((native.config or {}).get("auto_map"))  # else that is added to it
    if not _config_holds(native, plan, dtype) or not mapped:
        config = native.family.config(native.spec, dtype, native.config)
        _write_json(folder / CONFIG, config)
        if not (folder / GENERATION_CONFIG).exists():
            _write_generation_config(folder, config)
    if _identical(native, plan):
        return
    if coded:
        write_remote_code(folder)
    facts = _facts(native, plan, hashes, verified)
    write_record(folder, native.spec, facts)


def _config_holds(native: Native, plan: ExportPlan, dtype: str) -> bool:
    """Whether source/config.json still describes the model, so that it keeps its bytes."""
    if native.config is None or native.provenance is None or native.moved_from:
        return False  # without a provenance there is no file whose bytes could be kept
    named = native.config.get("dtype") or native.config.get("torch_dtype")
    if not plan.source_files and named is not None and named != dtype:
        return False
    return native.described() == native.spec


def _identical(native: Native, plan: ExportPlan) -> bool:
    """Whether every file is as it was imported."""
    return plan.source_files and _unmodified(native) and _config_holds(native, plan, _dtype(plan))


def _unmodified(native: Native) -> bool:
    record = native.provenance
    return record is not None and record.weights == fingerprint(native.manifest)


def _dtype(plan: ExportPlan) -> str:
    tensors: Sequence[tuple[str, int]] = [(t.to, t.entry.native.numel) for t in plan.tasks]
    return main_dtype(tensors)


def _write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    ids = {k: config.get(k) for k in TOKEN_IDS}
    known = {k: v for k, v in ids.items() if v is not None}
    if known:
        _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **known})


def _facts(
    native: Native, plan: ExportPlan, hashes: Mapping[str, str], verified: Mapping[str, Any]
) -> dict[str, Any]:
    """bevatron.json: where this export came from, what was done, and what it holds."""
    record, dtype = native.provenance, _dtype(plan)
    places = {n: f for t in plan.tasks for n, f in _files(t).items()}
    done = ["made from random weights" if record is None else "imported"]
    if record and record.dtype:
        done.append(f"converted to {FLOATS.get(record.dtype, record.dtype)} on import")
    pruned = record.pruned if record else {}
    if pruned:
        done.append(f"pruned from {pruned['from']:,} to {pruned['to']:,} parameters")
    if native.manifest.step:
        done.append(f"trained for {native.manifest.step} steps")
    elif record and not pruned and not _unmodified(native):
        done.append("weights changed")
    replaced = native.replaced_head()
    if replaced is not None:
        done.append(f"given a new {native.spec.head.kind} head")
    if native.moved_from:
        done.append(f"written as {native.family.name}, no longer a {native.moved_from}")
    if any(t.dtype != t.to for t in plan.tasks):
        done.append(f"converted to {dtype} on export")
    return {
        "bevatron": bevatron.__version__,
        "family": native.family.name,
        "step": native.manifest.step,
        "parameters": sum(p.numel for p in native.spec.parameters()),
        "dtype": dtype,
        "source": record.source if record else None,
        "revision": record.revision if record else None,
        "done": done,
        "source_tensors": len(record.tensors) if record else None,
        "carried": dict(record.carried) if record else {},
        "accepted": dict(record.accepted) if record else {},
        "skipped": (dict(record.skipped) if record else {}) | (replaced or {}),
        "weights": fingerprint(native.manifest),
        "verified": dict(verified),
        "tensors": {n: {"file": places[n], "xxh3": h[5:]} for n, h in hashes.items()},
    }


def _files(task: Task) -> dict[str, str]:
    """HF tensor -> the file that it is in."""
    places = zip(task.entry.sources, task.tensors, strict=True)
    return {source.name: found[0][0] for source, found in places}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
