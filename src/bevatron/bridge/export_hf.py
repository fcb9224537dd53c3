"""Exporting a native checkpoint to a Hugging Face folder; unchanged parts are written as they were.

If the tensors still have the names, shapes and dtypes of the imported ones, the weight files get
the headers and layout recorded at import, so an unmodified import comes back byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bevatron
from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import Task, pieces
from bevatron.bridge.conversion_report import shown_progress
from bevatron.bridge.export_plan import ExportPlan, unmodified
from bevatron.bridge.hf_folder import GENERATION_CONFIG, INDEX
from bevatron.bridge.model_card import write_record
from bevatron.bridge.open_native import CONFIG, Native
from bevatron.bridge.provenance import fingerprint
from bevatron.bridge.remote_code import renew_own_code, write_remote_code
from bevatron.bridge.tensor_hashes import hashes_of_files, prove
from bevatron.checkpoint.dtypes import (
    FLOATS,
    ITEMSIZE,
    Converter,
    NonFinite,
)
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.read_boxes import damaged, new_hasher, spell
from bevatron.checkpoint.safetensors_file import read_header
from bevatron.checkpoint.storage import copy_tree
from bevatron.families.config_fields import TOKEN_IDS


def move_tensors(
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
            if chunk.hash and spell(hasher) != chunk.hash:  # what is merged has none
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


def write_rest(
    native: Native, plan: ExportPlan, folder: Path, hashes: dict[str, str], show_progress: bool
) -> tuple[int, dict[str, Any], list[str]]:
    """Check the weight files by reading them again, and write the other ones. Returns how many were
    kept of the source, what reading showed, and notes."""
    renewed: list[str] = []
    files = _copy_source(native, plan, folder)
    if native.family.name == "llama_nemotron":
        renewed = renew_own_code(folder)
    verified = _read_back(native, plan, folder, hashes, show_progress)
    _write_own_files(native, plan, folder, hashes, verified)
    return files, verified, renewed


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
        count = copy_tree(source, folder, mover.copy)
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
    dtype = plan.dtype
    coded = native.family.name == "llama_nemotron" and not identical(native, plan)
    mapped = not coded or bool((native.config or {}).get("auto_map"))  # else that is added to it
    if not _config_holds(native, plan, dtype) or not mapped:
        config = native.family.config(native.spec, dtype, native.config)
        _write_json(folder / CONFIG, config)
        if not (folder / GENERATION_CONFIG).exists():
            _write_generation_config(folder, config)
    if identical(native, plan):
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


def identical(native: Native, plan: ExportPlan) -> bool:
    """Whether every file is as it was imported."""
    return plan.source_files and unmodified(native) and _config_holds(native, plan, plan.dtype)


def _write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    ids = {k: config.get(k) for k in TOKEN_IDS}
    known = {k: v for k, v in ids.items() if v is not None}
    if known:
        _write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **known})


def _facts(
    native: Native, plan: ExportPlan, hashes: Mapping[str, str], verified: Mapping[str, Any]
) -> dict[str, Any]:
    """bevatron.json: where this export came from, what was done, and what it holds."""
    record, dtype = native.provenance, plan.dtype
    places = {n: f for t in plan.tasks for n, f in _files(t).items()}
    done = ["made from random weights" if record is None else "imported"]
    if record and record.dtype:
        done.append(f"converted to {FLOATS.get(record.dtype, record.dtype)} on import")
    pruned = record.pruned if record else {}
    if pruned:
        done.append(f"pruned from {pruned['from']:,} to {pruned['to']:,} parameters")
    merged = record.merged if record else {}
    if merged:
        done.append("merged of " + " + ".join(f"{w:.4g} x {path}" for path, w in merged.items()))
    if native.manifest.step:
        done.append(f"trained for {native.manifest.step} steps")
    elif record and not pruned and not merged and not unmodified(native):
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
