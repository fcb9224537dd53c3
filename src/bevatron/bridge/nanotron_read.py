"""Reading a Nanotron checkpoint without trusting it: its parameters as boxes in its own files.

Only safetensors headers and JSON are read here. Nanotron stores optimizer, schedule and random
states as pickles. A pickle can run code when it is opened, so these are never opened.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bevatron.bridge.conversion_plan import box_of_run, row_elements
from bevatron.bridge.foreign_checkpoint import Foreign
from bevatron.bridge.hf_folder import TOKENIZER_FILES, SourceError, confined, shown
from bevatron.bridge.nanotron_write import (
    KEY,
    LATEST,
    METADATA,
    SHAPE,
    SLICES,
    TOKENIZER,
    Cut,
    FormatError,
    Parameter,
    parameters,
    parse_shape,
    parse_slices,
)
from bevatron.bridge.source_changes import stamps
from bevatron.checkpoint.dtypes import FLOATS, ITEMSIZE
from bevatron.checkpoint.manifest import Chunk, Manifest, TensorEntry
from bevatron.checkpoint.safetensors_file import Stored, read_header
from bevatron.checkpoint.strict_json import read_object
from bevatron.families.nanotron_config import NAME as CONFIG
from bevatron.families.nanotron_config import hf_config, read_model_config
from bevatron.families.registry import FamilyError
from bevatron.spec import Attention, ModelSpec, Shape

_STEP = re.compile(r"[0-9]{1,12}")
_FILE = re.compile(
    r"(model_\w+?)"
    r"(?:_pp-rank-([0-9]{1,6})-of-([0-9]{1,6})_tp-rank-([0-9]{1,6})-of-([0-9]{1,6})"
    r"(_exp-rank-[0-9]{1,6}-of-[0-9]{1,6})?)?\.safetensors"
)
_PICKLES = "holds PyTorch pickles, which can run code when opened"
_SKIPPED = {
    "optimizer": f"optimizer state: {_PICKLES}",
    "lr_scheduler": f"the learning rate schedule: {_PICKLES}",
    "random": f"random states: {_PICKLES}",
    "config.yaml": "Nanotron's run configuration",
}
# model_config.json does not say that attention is scaled by 1/head_dim; the run configuration does.
_MUP = re.compile(r"^\s*use_mup:\s*true\b", re.MULTILINE | re.IGNORECASE)


def is_nanotron(path: Path) -> bool:
    """Whether `path` looks like a Nanotron checkpoint: a step folder, or the folder of them."""
    if (path / "config.json").exists() or (path / "manifest.json").exists():
        return False
    return (path / LATEST).is_file() or ((path / CONFIG).is_file() and (path / "model").is_dir())


def open_nanotron(source: str | Path) -> Foreign:
    """Read a Nanotron step folder, or the step that its parent's latest.txt names.

    Raises BevatronError for anything that is missing, damaged, contradictory or unsafe, and for
    files in `model/` that belong to no parameter."""
    path = _step_folder(Path(source))
    if not (path / CONFIG).is_file():
        raise SourceError(f"{path}: has no {CONFIG}, which says what the model is")
    before = stamps(path, tuple(_SKIPPED))
    raw = read_object(confined(path, path / CONFIG))
    try:
        meaning = read_model_config(raw)
    except FamilyError as error:
        raise FamilyError(f"{path}: {error}") from error
    _refuse_mup(path)
    stored: dict[str, Stored] = {}
    tensors: dict[str, TensorEntry] = {}
    for parameter in parameters(meaning.spec):
        shards = _shards(path, parameter)
        stored |= {s.file: s.stored for s in shards}
        dtype = _one_dtype(path, parameter, shards)
        heads = _interleaved_head_dim(meaning.spec, parameter) if meaning.interleaved else None
        chunks = tuple(_chunks(parameter, shards, ITEMSIZE[dtype], heads))
        native = parameter.entry.native
        tensors[f"model/{native.name}"] = TensorEntry(dtype, native.shape, chunks)
    skipped, others = _account(path, stored), _tokenizer(path)
    main = max(FLOATS, key=lambda d: sum(t.nbytes for t in tensors.values() if t.dtype == d))
    return Foreign(
        kind="nanotron",
        name=str(source),
        path=path,
        spec=meaning.spec,
        manifest=Manifest("llama", 0, tensors),
        step=_step(path),
        stored=stored,
        config=hf_config(raw, meaning.spec, FLOATS[main]),
        stamps={name: before[name] for name in (CONFIG, *stored, *others) if name in before},
        others=others,
        skipped=skipped,
        notes=meaning.notes,
    )


def _step_folder(path: Path) -> Path:
    if not path.is_dir():
        what = "is not a folder" if os.path.lexists(path) else "does not exist"
        raise SourceError(f"{path}: {what}; expected a Nanotron checkpoint")
    if (path / CONFIG).exists() or (path / "model").is_dir():
        return path
    steps = sorted((p.name for p in path.iterdir() if _STEP.fullmatch(p.name)), key=int)
    latest = path / LATEST
    if not latest.is_file():
        advice = f"name one of its steps: {shown(steps)}" if steps else "it is something else"
        raise SourceError(
            f"{path}: has neither {LATEST} nor {CONFIG}, one of which every Nanotron checkpoint "
            f"has; {advice}"
        )
    with confined(path, latest).open("rb") as file:
        name = file.read(200).decode("utf-8", "replace").strip()
    if not _STEP.fullmatch(name):
        raise SourceError(f"{latest}: holds {name[:100]!r}, expected the number of a step")
    if not (path / name).is_dir():
        raise SourceError(
            f"{latest}: names step {name}, which is missing; steps here: {shown(steps) or 'none'}"
        )
    return confined(path, path / name)


def _refuse_mup(path: Path) -> None:
    file = path / "config.yaml"
    if file.is_file() and file.stat().st_size < 10 << 20:
        text = confined(path, file).read_text(encoding="utf-8", errors="replace")
        if _MUP.search(text):
            raise SourceError(
                f"{file}: says use_mup: true; such models scale attention in another way, which "
                "is not supported"
            )


def _step(path: Path) -> int | None:
    """What checkpoint_metadata.json says, else the folder's name."""
    file, step = path / METADATA, None
    if file.is_file():
        metas = read_object(confined(path, file)).get("metas")
        step = metas.get("last_train_step") if isinstance(metas, dict) else None
    if type(step) is int:
        return step
    return int(path.name) if _STEP.fullmatch(path.name) else None


# ---------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    """One file: its path below the step folder, its tensor, and what part of the parameter it is.
    `cuts` are along the parameter's cut dimension, or its first one."""

    file: str
    stored: Stored
    cuts: list[Cut]


def _shards(path: Path, parameter: Parameter) -> list[_Shard]:
    """The files of one parameter. Raises SourceError unless they make it up exactly."""
    folder = path / parameter.folder
    ranks: dict[int, tuple[str, int]] = {}  # tp rank -> file name, tp size
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        match = _FILE.fullmatch(name)
        if not match or match[1] != parameter.stem:
            continue
        if match[6]:
            raise SourceError(f"{folder / name}: a part of an expert; such models are unsupported")
        if (match[2] is None) != (parameter.split is None):
            kind = "is never cut" if parameter.split is None else "is always cut by tensor rank"
            raise SourceError(f"{folder / name}: unexpected name: {parameter.name} {kind}")
        rank = int(match[4] or 0)
        if rank in ranks:
            raise SourceError(
                f"{folder}: {ranks[rank][0]} and {name} are both tensor rank {rank} of "
                f"{parameter.name}; remove the one that is not meant"
            )
        ranks[rank] = (name, int(match[5] or 1))
    if not ranks:
        name = parameter.stem + ("" if parameter.split is None else "_pp-rank-*_tp-rank-*")
        raise SourceError(
            f"{path}: {parameter.name} is missing (no {name}.safetensors in {parameter.folder}); "
            f"the copy is incomplete, or {CONFIG} describes another model"
        )
    sizes = {size for _, size in ranks.values()}
    if len(sizes) > 1 or set(ranks) != set(range(next(iter(sizes)))):
        raise SourceError(
            f"{path}: {parameter.name} has tensor ranks {sorted(ranks)} of "
            f"{' and '.join(map(str, sorted(sizes)))}, expected each of one size once; the copy is "
            "incomplete, or mixes two checkpoints"
        )
    shards = [_shard(path, parameter, ranks[rank][0]) for rank in sorted(ranks)]
    _check_cover(path, parameter, shards)
    return shards


def _shard(path: Path, parameter: Parameter, name: str) -> _Shard:
    file = f"{parameter.folder}/{name}"
    header = read_header(confined(path, path / file))
    if set(header.tensors) != {KEY}:
        raise SourceError(
            f"{path / file}: holds the tensors {shown(list(header.tensors)) or 'none'}, expected "
            f"{KEY} alone"
        )
    stored, shape = header.tensors[KEY], parameter.shape
    try:
        if parameter.split is None:
            _expect_shape(stored.shape, shape, parameter)
            return _Shard(file, stored, [Cut(0, 0, shape[0])])
        for key in (SHAPE, SLICES):
            if key not in header.metadata:
                raise FormatError(f"has no {key} in its metadata")
        _expect_shape(parse_shape(header.metadata[SHAPE]), shape, parameter)
        fits = len(stored.shape) == len(shape) and all(
            n == m or (d == parameter.split and 0 < n < m)
            for d, (n, m) in enumerate(zip(stored.shape, shape, strict=True))
        )
        if not fits:
            raise FormatError(
                f"a shard of shape {list(stored.shape)} does not fit into {list(shape)}"
            )
        cuts = parse_slices(header.metadata[SLICES], stored.shape, shape, parameter.split)
        if parameter.split == 1 and len(cuts) != 1:
            raise FormatError(f"{SLICES} cut columns in {len(cuts)} pieces, expected one")
    except FormatError as error:
        raise SourceError(f"{path / file}: {error}") from error
    return _Shard(file, stored, cuts)


def _expect_shape(found: Shape, wanted: Shape, parameter: Parameter) -> None:
    if found != wanted:
        raise FormatError(
            f"{parameter.name} has shape {list(found)}, expected {list(wanted)}; {CONFIG} "
            "disagrees with the weights"
        )


def _check_cover(path: Path, parameter: Parameter, shards: list[_Shard]) -> None:
    """The shards' cuts must be disjoint and cover the whole parameter."""
    position = 0
    for start, stop, file in sorted((c.start, c.stop, s.file) for s in shards for c in s.cuts):
        if start != position:
            what = "overlap" if start < position else "leave a gap"
            raise SourceError(
                f"{path}: the shards of {parameter.name} {what} at index {min(start, position)} of "
                f"dimension {parameter.split or 0} (at {file})"
            )
        position = stop
    size = parameter.shape[parameter.split or 0]
    if position != size:
        raise SourceError(
            f"{path}: the shards of {parameter.name} end at index {position} of dimension "
            f"{parameter.split or 0}, expected {size}"
        )


def _one_dtype(path: Path, parameter: Parameter, shards: list[_Shard]) -> str:
    dtypes = sorted({s.stored.dtype for s in shards})
    if len(dtypes) > 1 or dtypes[0] not in FLOATS:
        raise SourceError(
            f"{path}: {parameter.name} has dtype {' and '.join(dtypes)}, expected one of "
            f"{', '.join(FLOATS)}"
        )
    return dtypes[0]


# ---------------------------------------------------------------------------------------------
# Chunks of native tensors
# ---------------------------------------------------------------------------------------------


def _chunks(
    parameter: Parameter, shards: list[_Shard], itemsize: int, head_dim: int | None
) -> Iterator[Chunk]:
    """The boxes of the native tensor that lie contiguously in the shards.

    Args:
        head_dim: of heads whose rows are interleaved, if they are."""
    native, width = parameter.entry.native.shape, row_elements(parameter.entry)
    if parameter.split == 1:
        for shard in shards:
            cut = shard.cuts[0]
            box = (native[0], cut.stop - cut.start)
            yield Chunk((0, cut.start), box, shard.file, shard.stored.begin, "")
        return
    cuts = sorted((cut.start, cut.stop, cut.local, s) for s in shards for cut in s.cuts)
    starts = [start for start, *_ in cuts]
    for row, at, count in _segments(parameter, head_dim):
        done = 0
        while done < count:
            start, stop, local, shard = cuts[bisect_right(starts, at + done) - 1]
            some = min(count - done, stop - at - done)
            begin = shard.stored.begin + (local + at + done - start) * width * itemsize
            offset, shape = box_of_run((row + done) * width, some * width, native)
            yield Chunk(offset, shape, shard.file, begin, "")
            done += some


def _segments(parameter: Parameter, head_dim: int | None) -> Iterator[tuple[int, int, int]]:
    """Runs of rows: where in the native tensor, where in Nanotron's whole one, and how many."""
    base, at = [], 0
    for source in parameter.entry.sources:
        base.append(at)
        at += source.shape[0]
    for rows in parameter.entry.rows:
        if head_dim is None or rows.source == 2:  # values are never rotated
            yield rows.native_start, base[rows.source] + rows.source_start, rows.count
            continue
        for i in range(rows.count):
            head, j = divmod(rows.source_start + i, head_dim)
            half = head_dim // 2
            pair = 2 * j if j < half else 2 * (j - half) + 1
            yield rows.native_start + i, base[rows.source] + head * head_dim + pair, 1


def _interleaved_head_dim(spec: ModelSpec, parameter: Parameter) -> int | None:
    """The head_dim of a parameter that holds queries and keys; None for others."""
    attention = next(a for _, a in spec.each(Attention))
    return attention.head_dim if parameter.entry.transform == "fuse_qkv" else None


# ---------------------------------------------------------------------------------------------
# Everything else in the folder
# ---------------------------------------------------------------------------------------------


def _account(path: Path, stored: dict[str, Stored]) -> dict[str, str]:
    """Refuse weights that nothing uses; what else is left out, with why."""
    unknown: list[str] = []
    skipped: dict[str, str] = {}
    for root, folders, files in os.walk(path / "model"):
        here = Path(root).relative_to(path).as_posix()
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        unknown += [f"{here}/{x}" for x in links if not any(f"{here}/{x}/" in f for f in stored)]
        for name in sorted(files):
            file = f"{here}/{name}"
            if name.startswith("."):
                skipped[file] = "a hidden file"
            elif file not in stored:
                unknown.append(file)
    if unknown:
        raise SourceError(
            f"{path}: {len(unknown)} files belong to no parameter of this model: {shown(unknown)}; "
            f"{CONFIG} describes another model, or this one has parts that are not supported"
        )
    for item in sorted(path.iterdir()):
        name = item.name + "/" * item.is_dir()
        if item.name not in ("model", CONFIG, METADATA, TOKENIZER):
            skipped[name] = _SKIPPED.get(item.name, "no part of a Nanotron checkpoint's model")
    return skipped


def _tokenizer(path: Path) -> dict[str, str]:
    """The files that Bevatron lays beside the weights when it writes a Nanotron checkpoint."""
    folder = path / TOKENIZER
    names = [n for n in TOKENIZER_FILES if confined(path, folder / n).is_file()]
    return {f"{TOKENIZER}/{name}": name for name in names}
