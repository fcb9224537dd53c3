"""The plan of a conversion, made from names, shapes and headers before any byte is moved.

A plan is data: it can be printed, compared and tested. Nothing is lost silently, because a plan is
made only if every source tensor is used exactly once or listed with a reason, and every native
parameter is filled. Otherwise the conversion is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bevatron.bridge.hf_folder import SourceError, shown
from bevatron.bridge.write_native import FILE_BYTES, lay_out
from bevatron.checkpoint.dtypes import FLOATS, ITEMSIZE, NATIVE
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.read_boxes import runs
from bevatron.checkpoint.safetensors_file import Stored
from bevatron.families.registry import Family
from bevatron.families.weight_map import Entry, Rows, Source
from bevatron.spec import ModelSpec, ParameterSpec, Shape

# Which fields of config.json decide the shape of a parameter, by its role.
_FIELDS = {
    "embedding": "vocab_size, hidden_size",
    "head": "vocab_size, hidden_size",
    "score": "id2label (its number of labels), hidden_size",
    "norm": "hidden_size",
    "qkv": "num_attention_heads, num_key_value_heads, head_dim, hidden_size",
    "o": "num_attention_heads, head_dim, hidden_size",
    "gate_up": "intermediate_size, hidden_size",
    "up": "intermediate_size, hidden_size",
    "down": "intermediate_size, hidden_size",
    "linear": "hidden_size",
    "bias": "attention_bias, mlp_bias and the sizes they go with",
}


@dataclass(frozen=True)
class Task:
    """One native tensor and the HF tensors that it consists of.

    Attributes:
        native: its name in the manifest (`model/...` or `carried/...`).
        dtype, to: as read and as written; `dtypes`: as read, of each of `entry.sources`, where they
            differ. That is so only if all become another one.
        tensors: where each of `entry.sources` lies: file names and places. More than one place
            per source if a copy of it has another name (a tied head stored as well).
    """

    native: str
    entry: Entry
    dtype: str
    to: str
    tensors: tuple[tuple[tuple[str, Stored], ...], ...]
    dtypes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """As read."""
        if self.dtypes:
            return sum(places[0][1].nbytes for places in self.tensors)
        return self.entry.native.numel * ITEMSIZE[self.dtype]

    def dtype_of(self, source: int) -> str:
        """As read, of one of `entry.sources`."""
        return self.dtypes[source] if self.dtypes else self.dtype


def written_bytes(tasks: Iterable[Task]) -> int:
    """What the tasks' native tensors take after conversion."""
    return sum(t.entry.native.numel * ITEMSIZE[t.to] for t in tasks)


@dataclass(frozen=True)
class ImportPlan:
    """What an import will do.

    Attributes:
        places: native name -> file and byte where it goes; `headers`: file -> its first bytes.
        duplicates: HF tensor -> the HF tensor of which it must be a copy (a tied head).
        carried: HF tensor that is no parameter -> why; it returns on export.
    """

    tasks: tuple[Task, ...]
    places: Mapping[str, tuple[str, int]]
    headers: Mapping[str, bytes]
    duplicates: Mapping[str, str]
    carried: Mapping[str, str]


def row_elements(entry: Entry) -> int:
    """Elements of one row, as the entry's `rows` count them: a vector of the sources' last
    dimension, or one element where the sources are 1-D."""
    shape = entry.sources[0].shape
    return shape[-1] if len(shape) > 1 else 1


def box_of_run(start: int, count: int, shape: Shape) -> tuple[Shape, Shape]:
    """Offset and shape of the box that a run of elements of a row-major tensor is: whole slices of
    it, or whole slices of one of its slices, and so on."""
    offset: list[int] = []
    stride = math.prod(shape)
    for i, size in enumerate(shape if count else ()):
        stride //= size
        index, start = divmod(start, stride)
        if count >= stride:
            rest = shape[i + 1 :]
            sides = [1] * len(offset)
            return (*offset, index, *[0] * len(rest)), (*sides, count // stride, *rest)
        offset.append(index)
    return (0,) * len(shape), shape if count else (0,) * len(shape)


def carry(name: str, shape: Shape) -> Entry:
    """A tensor that is no parameter, taken along as it is."""
    numel = math.prod(shape)
    count = numel // (shape[-1] if len(shape) > 1 else 1) if numel else 0
    native = ParameterSpec(name, shape, "norm", tuple("other" for _ in shape))
    return Entry(native, "carry", (Source(name, shape),), (Rows(0, 0, 0, count),))


def head_name(family: Family, spec: ModelSpec) -> str | None:
    """What a stored head would be called in a tied model; None if the model is not tied."""
    if not spec.tied:
        return None
    entries = family.weight_map(replace(spec, tie_word_embeddings=False))
    return next((e.sources[0].name for e in entries if e.native.role == "head"), None)


def plan_import(
    where: str,
    family: Family,
    spec: ModelSpec,
    found: Mapping[str, tuple[str, Stored]],
    dtype: str | None,
    file_bytes: int = FILE_BYTES,
) -> ImportPlan:
    """Account for every tensor of a source and lay out the native files.

    Args:
        where: the source, for messages.
        found: every tensor of the source: the file that holds it, and where.
        dtype: what all parameters become, or None to keep each as it is.
    Raises SourceError naming tensors that are missing, unknown or of another shape or dtype.
    """
    entries = family.weight_map(spec)
    wanted = {s.name: (e, s) for e in entries for s in e.sources}
    _check_present(where, entries, found)
    tasks = []
    for entry in entries:
        for source in entry.sources:
            _check_tensor(where, entry, source, *found[source.name])
        dtypes = tuple(found[s.name][1].dtype for s in entry.sources)
        if len(set(dtypes)) > 1 and dtype is None:
            raise _mixed(where, entry, dtypes)
        old, mixed = dtypes[0], dtypes if len(set(dtypes)) > 1 else ()
        stored_at = tuple((found[s.name],) for s in entry.sources)
        tasks.append(Task(f"model/{entry.native.name}", entry, old, dtype or old, stored_at, mixed))
    duplicates: dict[str, str] = {}
    carried: dict[str, str] = {}
    unknown: list[str] = []
    head = head_name(family, spec)
    embed = next(e.sources[0].name for e in entries if e.native.role == "embedding")
    for name, (file, stored) in found.items():
        if name in wanted:
            continue
        reason = family.skip(name)
        if name == head:
            _check_same_kind(where, name, stored, embed, found[embed][1])
            duplicates[name] = embed
        elif reason is not None and stored.dtype in NATIVE:
            carried[name] = reason
            entry = carry(name, stored.shape)
            place = (((file, stored),),)
            tasks.append(Task(f"carried/{name}", entry, stored.dtype, stored.dtype, place))
        else:
            unknown.append(name)
    if unknown:
        raise SourceError(
            f"{where}: {len(unknown)} tensors belong to no parameter of this model: "
            f"{shown(unknown)}; config.json describes another model, or this architecture has "
            "parts that are not supported"
        )
    places, headers = lay_out([(t.native, t.to, t.entry.native.shape) for t in tasks], file_bytes)
    return ImportPlan(tuple(tasks), places, headers, duplicates, carried)


@dataclass(frozen=True)
class Piece:
    """`nbytes` of a native tensor: at byte `at` of `file` (part of chunk number `chunk`), and from
    byte `begin` on of HF tensor number `source`."""

    file: str
    at: int
    nbytes: int
    chunk: int
    source: int
    begin: int


def pieces(entry: Entry, tensor: TensorEntry) -> Iterator[Piece]:
    """How a stored native tensor falls into its HF tensors, in native row-major order. The pieces
    of one HF tensor, and those of one chunk, come in that one's own order."""
    row = row_elements(entry) * ITEMSIZE[tensor.dtype]
    rows = iter(entry.rows)
    begin = left = source = 0
    for run in runs(tensor):
        done = 0
        while done < run.nbytes:
            if not left:
                part = next(rows)
                source, begin, left = part.source, part.source_start * row, part.count * row
            count = min(left, run.nbytes - done)
            yield Piece(run.file, run.at + done, count, run.chunk, source, begin)
            done, begin, left = done + count, begin + count, left - count


def _check_present(
    where: str, entries: Sequence[Entry], found: Mapping[str, tuple[str, Stored]]
) -> None:
    missing = [s.name for e in entries for s in e.sources if s.name not in found]
    if not missing:
        return
    _check_wrapped(where, missing, found)
    heads = [s.name for e in entries if e.native.role == "head" for s in e.sources]
    advice = "the download is incomplete, or config.json describes another model"
    if missing == heads:
        advice = (
            "config.json says tie_word_embeddings is false; set it to true if the model shares "
            "its embedding, else the file is incomplete"
        )
    raise SourceError(f"{where}: {len(missing)} tensors are missing: {shown(missing)}; {advice}")


# What puts its name into those of the tensors, and how to get rid of it.
_ADAPTER = "merge the adapter (peft: model.merge_and_unload()) and save the model that it returns"
_WRAPPERS = {
    "module": "DistributedDataParallel or DeepSpeed: save model.module",
    "_orig_mod": "torch.compile: save model._orig_mod",
    "_fsdp_wrapped_module": "FSDP: save a full state dict",
    "_checkpoint_wrapped_module": "activation checkpointing: save the model without the wrapper",
    "base_layer": _ADAPTER,
}


def _check_wrapped(where: str, missing: Sequence[str], found: Collection[str]) -> None:
    """Refuse tensors that have the names of this model with more before or between."""
    for name in found:
        if name.startswith("base_model.model.") or ".lora_" in name:
            raise SourceError(
                f"{where}: its tensors are those of an adapter and of what it is put on, such as "
                f"{shown([name])}; {_ADAPTER}"
            )
    inside = {}
    for name in found:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain != name:
            inside[plain] = name
    wrapped = [name for name in missing if name in inside]
    if 2 * len(wrapped) > len(missing):
        parts = inside[wrapped[0]].split(".")
        wrapper = next(part for part in parts if part in _WRAPPERS)
        raise SourceError(
            f"{where}: {len(wrapped)} tensors have {wrapper}. in their names, such as "
            f"{shown([inside[wrapped[0]]])}, expected {wrapped[0]}: they were saved from inside "
            f"{_WRAPPERS[wrapper]}, or rename the tensors"
        )
    ends: dict[str, int] = {}
    wanted = set(missing)
    for name in found:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in wanted:
                prefix = ".".join(parts[:i]) + "."
                ends[prefix] = ends.get(prefix, 0) + 1
    prefix, count = max(ends.items(), key=lambda item: item[1], default=("", 0))
    if 2 * count > len(missing):
        raise SourceError(
            f"{where}: {count} tensors have {shown([prefix])} in front of their names: they are a "
            "part of a larger model; save that part alone, or rename the tensors"
        )


def _check_tensor(where: str, entry: Entry, source: Source, file: str, stored: Stored) -> None:
    if stored.dtype not in FLOATS:
        raise SourceError(
            f"{where}: {source.name} in {file} has dtype {stored.dtype}, expected one of "
            f"{', '.join(FLOATS)}; quantised checkpoints are not supported: use the original one"
        )
    if stored.shape != source.shape:
        raise SourceError(
            f"{where}: {source.name} in {file} has shape {list(stored.shape)}, expected "
            f"{list(source.shape)}; config.json disagrees with the weights, see its "
            f"{_FIELDS[entry.native.role]}"
        )


def _mixed(where: str, entry: Entry, dtypes: Sequence[str]) -> SourceError:
    listed = ", ".join(f"{s.name} {d}" for s, d in zip(entry.sources, dtypes, strict=True))
    return SourceError(
        f"{where}: the parts of {entry.native.name} have different dtypes ({listed}); import it "
        "with --dtype, which gives all of them one"
    )


def _check_same_kind(where: str, name: str, stored: Stored, other: str, model: Stored) -> None:
    if (stored.dtype, stored.shape) != (model.dtype, model.shape):
        raise SourceError(
            f"{where}: {name} is {stored.dtype} {list(stored.shape)} but {other}, which "
            f"config.json ties it to, is {model.dtype} {list(model.shape)}; set "
            "tie_word_embeddings to false if they are meant to differ"
        )
