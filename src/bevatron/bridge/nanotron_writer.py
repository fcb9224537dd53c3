"""What a Nanotron checkpoint made of a native one consists of: weight files, and files around them.

One shard of everything (TP = PP = 1): Nanotron cuts it to the layout that it is started with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import Task
from bevatron.bridge.conversion_report import shown_progress
from bevatron.bridge.hf_folder import TOKENIZER_FILES
from bevatron.bridge.import_hf import copy_file
from bevatron.bridge.nanotron import LATEST, METADATA, TOKENIZER, open_nanotron
from bevatron.bridge.nanotron_config import NAME as CONFIG
from bevatron.bridge.nanotron_config import model_config
from bevatron.bridge.nanotron_format import KEY, VERSION, parameters, spell_metadata
from bevatron.bridge.open_native import Native
from bevatron.bridge.tensor_hashes import hashes_of_native, prove
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.run_folder import read_train_state
from bevatron.checkpoint.safetensors_file import Stored, write_header
from bevatron.families.registry import FamilyError, by_name


def plan_nanotron(native: Native, dtype: str | None) -> tuple[tuple[Task, ...], dict[str, bytes]]:
    """Where every native tensor goes, and the first bytes of every weight file.

    The HF tensors of a task lie one below the other in its one file.
    Raises FamilyError if Nanotron cannot express the model."""
    try:
        model_config(native.spec, native.config)
    except FamilyError as error:
        raise FamilyError(
            f"{native.folder}: this {native.family.name} model cannot be written for Nanotron: "
            f"{error}; use --to hf"
        ) from error
    tasks, headers = [], {}
    for parameter in parameters(native.spec):
        name = f"model/{parameter.entry.native.name}"
        old = native.manifest.tensors[name].dtype
        to = dtype or old
        suffix = "" if parameter.split is None else "_pp-rank-0-of-1_tp-rank-0-of-1"
        file = f"{_step(native)}/{parameter.folder}/{parameter.stem}{suffix}.safetensors"
        headers[file] = write_header([(KEY, to, parameter.shape)], spell_metadata(parameter))
        at, places = len(headers[file]), []
        for source in parameter.entry.sources:
            end = at + TensorEntry(to, source.shape, ()).nbytes
            places.append(((file, Stored(to, source.shape, at, end)),))
            at = end
        tasks.append(Task(name, parameter.entry, old, to, tuple(places)))
    return tuple(tasks), headers


def left_out(native: Native) -> dict[str, str]:
    """What of the native checkpoint has no place in Nanotron's, with why."""
    found = {}
    for name in native.manifest.tensors:
        if name.startswith("carried/"):
            found[name] = "no parameter of Nanotron's model"
    if any(name.startswith("optimizer/") for name in native.manifest.tensors):
        found["optimizer/"] = "Nanotron keeps optimizer state in pickles"
    source = native.folder / "source"
    for path in sorted(source.rglob("*")) if source.is_dir() else []:
        name = path.relative_to(source).as_posix()
        if path.is_file() and name not in (*TOKENIZER_FILES, "config.json"):
            found[f"source/{name}"] = "not part of a Nanotron checkpoint"
    return found


def tokenizer_files(native: Native) -> dict[str, Path]:
    """The tokenizer's files of source/, and where they go."""
    source, folder = native.folder / "source", f"{_step(native)}/{TOKENIZER}"
    return {f"{folder}/{n}": source / n for n in TOKENIZER_FILES if (source / n).is_file()}


def write_around(
    native: Native, folder: Path, dst: Path, dtype: str, hashes: Mapping[str, str]
) -> tuple[int, dict[str, Any], list[str]]:
    """Write all files besides weights into `folder`, then read it as any Nanotron checkpoint is and
    compare.

    Args:
        dst: where `folder` will lie, for the path of the tokenizer.
        dtype: of the weights, as config.json spells it; `hashes`: of every HF tensor as written.

    Returns:
        How many files were kept, what reading back showed, and notes.
    """
    step = _step(native)
    config, notes = model_config(native.spec, native.config)
    tokenizer = _tokenizer_name(native, dst)
    if tokenizer is None:
        notes.append(
            "the checkpoint has no tokenizer: set tokenizer_name_or_path in config.yaml before "
            "Nanotron generates"
        )
    (folder / step).mkdir(exist_ok=True)
    _write_json(folder / step / CONFIG, config)
    _write_json(folder / step / METADATA, _metadata(native))
    run = _run_config(native, config, tokenizer, dtype)
    (folder / step / "config.yaml").write_text(_yaml(run), encoding="utf-8")
    (folder / LATEST).write_text(step, encoding="utf-8")
    kept = tokenizer_files(native)
    with Mover(lambda n: None) as mover:
        for name, path in kept.items():
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(mover, path, folder / name)
    return len(kept), _read_back(folder, hashes), notes


def _read_back(folder: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    found = open_nanotron(folder)
    family = by_name(found.manifest.family)
    made = Native.made(found.path, found.manifest, found.spec, family)
    with shown_progress("verifying", found.nbytes) as advance:
        written, damage = hashes_of_native(made, advance)
    return prove(written, hashes, damage, str(folder))


def _step(native: Native) -> str:
    return str(native.manifest.step)


def _metadata(native: Native) -> dict[str, Any]:
    """Counts of the training so far. Nanotron insists that those of its stages add up."""
    state = read_train_state(native.folder) or {}
    samples = state.get("samples", 0)
    stage = {"name": "bevatron", "start_training_step": 1, "consumed_train_samples": samples}
    return {
        "version": VERSION,
        "tp": 1,
        "dp": 1,
        "cp": 1,
        "custom_metas": None,
        "metas": {
            "consumed_train_samples": samples,
            "consumed_tokens_total": state.get("tokens", 0),
            "last_train_step": native.manifest.step,
            "last_stage_idx": 0,
            "data_stages": [{**stage, "consumed_tokens_per_dataset_folder": {}}],
        },
    }


def _run_config(
    native: Native, config: Mapping[str, Any], tokenizer: str | None, dtype: str
) -> dict[str, Any]:
    """What Nanotron's generator reads, and no more: nothing is guessed about a training run."""
    return {
        "general": {"project": "bevatron", "run": "export", "step": native.manifest.step},
        "parallelism": {"dp": 1, "pp": 1, "tp": 1},
        "model": {
            "model_config": dict(config),
            "init_method": {"std": config["initializer_range"]},
            "dtype": dtype,
            "make_vocab_size_divisible_by": 1,
        },
        "tokenizer": {"tokenizer_name_or_path": tokenizer},
    }


def _tokenizer_name(native: Native, dst: Path) -> str | None:
    """The Hub id that the model came from, or the folder of the tokenizer's files."""
    record = native.provenance
    if record is not None and record.revision is not None and not Path(record.source).exists():
        return record.source
    if tokenizer_files(native):
        return str(dst.absolute() / _step(native) / TOKENIZER)
    return None


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=True, allow_unicode=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
