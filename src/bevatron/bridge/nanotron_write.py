"""Nanotron's weight files: their names and headers, and writing them from a native checkpoint.

A Nanotron parameter stacks the Hugging Face tensors that make up a native one: qkv_proj is
[q | k | v], gate_up_proj is [gate | up]. Tensor parallelism cuts each of these on its own (o_proj
and down_proj along their columns), so a shard is not one range of the parameter: the slice pairs in
its header say which part of the parameter lies where in the shard.

The first half of this file has the names of files and the contents of headers, for reading and for
writing. The second half writes a checkpoint of one shard (TP = PP = 1), which Nanotron cuts to the
layout that it is started with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import Task
from bevatron.bridge.hf_folder import TOKENIZER_FILES
from bevatron.bridge.open_native import Native
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.run_folder import read_train_state
from bevatron.checkpoint.safetensors_file import Stored, write_header
from bevatron.errors import BevatronError
from bevatron.families.nanotron_config import NAME as CONFIG
from bevatron.families.nanotron_config import model_config
from bevatron.families.registry import FamilyError, by_name
from bevatron.families.weight_map import Entry
from bevatron.spec import ModelSpec, Shape

VERSION = "1.5"  # of the checkpoint format, as Nanotron 0.4 writes it
KEY = "data"  # the one tensor in every file
SHAPE, SLICES = "unsharded_shape", "local_global_slices_pairs"
LATEST, METADATA = "latest.txt", "checkpoint_metadata.json"
TOKENIZER = "tokenizer"  # Bevatron's own: the tokenizer's files, which Nanotron has no place for

# Native module -> Nanotron module, and the dimension that tensor parallelism cuts.
_MODULES: dict[str, tuple[str, int | None]] = {
    "embed": ("token_position_embeddings.pp_block.token_embedding", 0),
    "attention_norm": ("input_layernorm", None),
    "attention.qkv": ("attn.qkv_proj", 0),
    "attention.o": ("attn.o_proj", 1),
    "mlp_norm": ("post_attention_layernorm", None),
    "mlp.gate_up": ("mlp.gate_up_proj", 0),
    "mlp.down": ("mlp.down_proj", 1),
    "final_norm": ("final_layer_norm.pp_block", None),
    "head": ("lm_head.pp_block", 0),
}


class FormatError(BevatronError):
    """A Nanotron file that says something else than the format allows."""


class Cut(NamedTuple):
    """Indices `start` to `stop` of the whole parameter's cut dimension begin at index `local` of
    the shard's."""

    local: int
    start: int
    stop: int


@dataclass(frozen=True)
class Parameter:
    """One Nanotron parameter.

    Attributes:
        entry: the native parameter and the HF tensors that this one consists of.
        name: dotted, below the folder `model/`; `split`: the dimension that is cut, if any.
    """

    entry: Entry
    name: str
    split: int | None

    @property
    def shape(self) -> Shape:
        """Of the whole parameter."""
        tail = self.entry.sources[0].shape[1:]
        return (sum(s.shape[0] for s in self.entry.sources), *tail)

    @property
    def folder(self) -> str:
        return "model/" + self.name.rpartition(".")[0].replace(".", "/")

    @property
    def stem(self) -> str:
        """How its files' names begin."""
        return "model_" + self.name.rpartition(".")[2]


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every Nanotron parameter of a model with attention and MLP in each layer, in native order."""
    found = []
    for entry in by_name("llama").weight_map(spec):
        *module, kind = entry.native.name.split(".")
        prefix = "model."
        if module[0] == "layers":
            prefix, module = f"model.decoder.{module[1]}.pp_block.", module[2:]
        name, split = _MODULES[".".join(module)]
        found.append(Parameter(entry, f"{prefix}{name}.{kind}", split))
    return found


# ---------------------------------------------------------------------------------------------
# The text of headers
# ---------------------------------------------------------------------------------------------

_INTEGER = r"(?:np\.int[0-9]{1,2}\(([0-9]{1,15})\)|([0-9]{1,15}))"
_INTEGERS = re.compile(_INTEGER)
_TUPLE = re.compile(rf"\({_INTEGER}(?:, ?{_INTEGER})*,?\)")
_SLICE = re.compile(r"(None|[0-9]{1,15}),(None|[0-9]{1,15}),(?:None|1)")


def parse_shape(text: str) -> Shape:
    """`(128, 64)`, `(64,)` or, with numpy 2, `(np.int64(128), 64)`. Raises FormatError."""
    if not _TUPLE.fullmatch(text):
        raise FormatError(f"{SHAPE} is {text[:100]!r}, expected a tuple such as (128, 64)")
    return tuple(int(a or b) for a, b in _INTEGERS.findall(text))


def parse_slices(text: str, local: Shape, whole: Shape, split: int) -> list[Cut]:
    """The slice pairs of a shard of shape `local`, which must cut dimension `split` alone.

    Raises FormatError if they are malformed, lie outside, do not use every element of the shard
    once, or cut anything else."""
    cuts = []
    for pair in text.split(";"):
        sides = [side.split("|") for side in pair.split("#")]
        if len(sides) != 2 or any(len(side) != len(whole) for side in sides):
            raise _bad_pair(pair, f"expected local#global with {len(whole)} slices each")
        here = [_range(pair, s, size) for s, size in zip(sides[0], local, strict=True)]
        there = [_range(pair, s, size) for s, size in zip(sides[1], whole, strict=True)]
        for d, ((a, b), (c, e)) in enumerate(zip(here, there, strict=True)):
            if b - a != e - c:
                raise _bad_pair(pair, f"its two sides have {b - a} and {e - c} indices")
            if d != split and (e - c != whole[d] or b - a != local[d]):
                raise _bad_pair(pair, f"it cuts dimension {d}, expected {split} alone")
        cuts.append(Cut(here[split][0], *there[split]))
    position = 0
    for cut in sorted(cuts):
        if cut.local != position:
            what = "twice" if cut.local < position else "never"
            raise FormatError(f"{SLICES} {text[:200]!r} use index {position} of the shard {what}")
        position += cut.stop - cut.start
    if position != local[split]:
        raise FormatError(
            f"{SLICES} {text[:200]!r} use {position} of the shard's {local[split]} indices"
        )
    return cuts


def _range(pair: str, text: str, size: int) -> tuple[int, int]:
    match = _SLICE.fullmatch(text)
    if not match:
        raise _bad_pair(pair, f"{text[:40]!r} is no slice such as 0,32,None")
    start = 0 if match[1] == "None" else int(match[1])
    stop = size if match[2] == "None" else int(match[2])
    if not start < stop <= size:
        raise _bad_pair(pair, f"{text} lies outside of a dimension of {size}")
    return start, stop


def _bad_pair(pair: str, why: str) -> FormatError:
    return FormatError(f"{SLICES} has the pair {pair[:100]!r}: {why}")


def spell_metadata(parameter: Parameter) -> dict[str, str]:
    """What the header of the one shard of an uncut parameter says; nothing for a norm."""
    if parameter.split is None:
        return {}
    shape, split = parameter.shape, parameter.split
    sizes = [s.shape[0] for s in parameter.entry.sources] if split == 0 else [shape[split]]
    pairs, at = [], 0
    for size in sizes:
        here = f"{at},{at + size},None"
        local = here if len(sizes) > 1 else "None,None,None"
        pairs.append(f"{_slices(local, split, shape)}#{_slices(here, split, shape)}")
        at += size
    return {"version": VERSION, SLICES: ";".join(pairs), SHAPE: str(tuple(shape))}


def _slices(cut: str, split: int, shape: Sequence[int]) -> str:
    return "|".join(cut if d == split else "None,None,None" for d in range(len(shape)))


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


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


def write_around(native: Native, folder: Path, dst: Path, dtype: str) -> tuple[int, list[str]]:
    """Write all files besides weights into `folder`. Returns how many were kept, and notes.

    Args:
        dst: where `folder` will lie, for the path of the tokenizer.
        dtype: of the weights, as config.json spells it.
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
            mover.copy(path, folder / name)
    return len(kept), notes


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
