"""One way to open weights, wherever they lie: native checkpoint, run, HF folder, Hub id, or a
checkpoint of Nanotron.

An HF folder is treated as a native checkpoint whose chunks lie in HF's shards: the rows that the
weight map moves are the chunks. So training and generation read HF folders as they are, and each
rank reads only the bytes that it owns.

A model whose weights are missing is opened as far as a plan needs it: its sizes and its family.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from bevatron.bridge.adapter_base import (
    RECORD,
    Base,
    BaseError,
    model_fingerprint,
    read_base,
)
from bevatron.bridge.byte_mover import Mover
from bevatron.bridge.conversion_plan import Task, box_of_run, plan_import, row_elements
from bevatron.bridge.hf_config import read_spec
from bevatron.bridge.hf_folder import (
    GENERATION_CONFIG,
    INDEX,
    OTHER_WEIGHTS,
    TOKENIZER_FILES,
    looks_like_hub_id,
    open_hf,
    read_config,
)
from bevatron.bridge.import_hf import check_copies
from bevatron.bridge.merged_weights import merged
from bevatron.bridge.nanotron_read import is_nanotron, open_nanotron
from bevatron.bridge.nanotron_write import TOKENIZER
from bevatron.bridge.open_native import Native, open_native
from bevatron.bridge.provenance import FILE_NAME as PROVENANCE
from bevatron.bridge.provenance import Provenance, describe
from bevatron.checkpoint.dtypes import ITEMSIZE, dtype_named, stated_dtype
from bevatron.checkpoint.manifest import Chunk, Manifest, TensorEntry
from bevatron.checkpoint.run_folder import is_native
from bevatron.checkpoint.storage import copy_tree, is_remote, is_url, located
from bevatron.errors import BevatronError
from bevatron.families.published_models import PRESETS, family_of, preset
from bevatron.families.registry import Family, for_config
from bevatron.spec import ModelSpec

CONFIG = "config.json"


@dataclass(frozen=True)
class Opened:
    """Weights to read boxes of.

    Attributes:
        folder: that the manifest's chunks are relative to.
        source: the folder with the source's other files (config.json, tokenizer, ...), if any;
            `others`: which files those are, or None for all that lie there.
        native: whether `folder` is a native checkpoint.
        provenance: what an import recorded, or would record but for hashes; None for a model made
            from random weights.
        made: file name -> text of what `source` lacks: the config.json of another format's model.
        base: of an adapter's step, which holds no other weights, the model that it belongs to; the
            adapter is merged into it if the spec has none.
    """

    folder: Path
    spec: ModelSpec
    manifest: Manifest
    source: Path | None
    others: tuple[str, ...] | None
    native: bool
    provenance: Provenance | None
    made: Mapping[str, str] = field(default_factory=dict)
    base: Opened | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.manifest.weights().items()}

    @property
    def dtype(self) -> str:
        """The dtype of most of the weights' bytes, in safetensors' spelling."""
        sizes: dict[str, int] = {}
        for entry in self.manifest.weights().values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=lambda d: sizes[d])

    @property
    def tokenizer(self) -> Path | None:
        """The source's tokenizer.json, if it has one."""
        path = self.source / "tokenizer.json" if self.source else None
        return path if path is not None and path.is_file() else None

    @property
    def of_a_run(self) -> bool:
        """Whether this is a full step of a training run, with the state of its optimizer."""
        return any(name.startswith("optimizer/") for name in self.manifest.tensors)

    def copy_source(self, target: Path) -> None:
        """Copy the source's other files, byte for byte, into the new folder `target`."""
        if self.source is not None and self.others is None:
            copy_tree(self.source, target, _copy)
            return
        if self.source is None and not self.made:
            return
        target.mkdir()
        for name in self.provenance.folders if self.provenance else ():
            (target / name).mkdir(parents=True, exist_ok=True)
        for name in self.others or ():
            assert self.source is not None
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, target / name)
        for name, text in self.made.items():
            (target / name).write_text(text, encoding="utf-8")

    def source_text(self, name: str) -> str | None:
        """The text of one of the source's other files, if there is one of that name."""
        if name in self.made:
            return self.made[name]
        path = self.source / name if self.source else None
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None

    def copy_origin(self, folder: Path) -> None:
        """Give a new native checkpoint what it keeps of where its model came from: the source's
        other files, and the provenance, so that an export can be written as the source was."""
        self.copy_source(folder / "source")
        if self.provenance is not None:
            (folder / PROVENANCE).write_text(self.provenance.to_json(), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write)


def open_weights(
    path: str | Path,
    revision: str | None = None,
    *,
    copies: bool = True,
    accept: Collection[str] = (),
) -> Opened:
    """Open what `path` means. A run that trains an adapter means its base with the adapter merged
    in, which is computed as it is read.

    Args:
        revision: of a Hub id.
        copies: whether to read a tied head that an HF folder stores as well, and compare it. Where
            many processes open the same folder, one of them does.
        accept: fields of an HF folder's config.json that are said to do nothing.
    Raises BevatronError if it is none of these, is damaged, or is a tied model whose stored head is
    another one.
    """
    if is_native(located(path)):
        step = open_step(path)
        return step if step.spec.adapter is None else merged_step(step)
    if is_nanotron(located(path)):
        foreign = open_nanotron(path)
        return Opened(
            foreign.path,
            foreign.spec,
            foreign.manifest,
            foreign.path / TOKENIZER if foreign.others else None,
            tuple(foreign.others.values()),
            native=False,
            provenance=None,
            made={"config.json": foreign.config_text()},
        )
    hf = open_hf(path, revision)
    family, spec, accepted = read_spec(hf, accept)
    plan = plan_import(str(hf.path), family, spec, hf.tensors(), None)
    if copies:
        with Mover(lambda nbytes: None) as mover:
            check_copies(hf, plan.duplicates, mover, {})
    tensors = {task.native: _chunks(task) for task in plan.tasks}
    record = replace(describe(hf, family.name, plan, {}), accepted=accepted)
    manifest = Manifest(family.name, 0, tensors)
    return Opened(hf.path, spec, manifest, hf.path, hf.others, False, record)


def open_step(path: str | Path) -> Opened:
    """A native checkpoint as it is stored: an adapter's step is the adapter alone, of a spec that
    has it."""
    native = open_native(path)
    source = native.folder / "source"
    found = source if source.is_dir() else None
    return Opened(native.folder, native.spec, native.manifest, found, None, True, native.provenance)


def open_model(path: str | Path) -> Native:
    """A native checkpoint as a whole model: an adapter's step together with its base, merged as it
    is read."""
    native = open_native(path)
    if native.spec.adapter is None:
        return native
    whole = merged_step(open_step(path), check=True)
    return replace(native, folder=whole.folder, manifest=whole.manifest, spec=whole.spec)


def merged_step(step: Opened, *, check: bool = False) -> Opened:
    """An adapter's step and its base as one model, each weight merged as it is read. `check`: see
    `merged_weights.merged`."""
    base = base_of(step)
    folder, manifest = merged(
        (step.folder, step.manifest, step.spec), (base.folder, base.manifest), check=check
    )
    return replace(step, folder=folder, manifest=manifest, spec=step.spec.base, base=base)


def base_of(step: Opened, instead: str | None = None, *, copies: bool = True) -> Opened:
    """The model that an adapter's step belongs to.

    Args:
        instead: where else it may lie, if it is no more where it was.
        copies: as in `open_weights`.
    Raises CheckpointError if it is in neither place, or is not the model that it was."""
    record = read_base(step.folder)
    path, url = record.path, is_url(record.path)
    if not url and Path(path).is_absolute() and not os.path.lexists(path):
        path = instead if instead is not None else path
    try:
        opened = open_weights(path, copies=copies)
    except BevatronError as error:
        raise BaseError(
            f"{step.folder} holds an adapter, and its base cannot be opened: {error}; put the base "
            f"back where it was, or name where it is now in {step.folder / RECORD}"
        ) from error
    if model_fingerprint(opened.spec, opened.folder, opened.manifest) != record.fingerprint:
        raise BaseError(
            f"{step.folder} holds an adapter, and its base {path} is another model than it was "
            "trained beside (another fingerprint); put that one back"
        )
    return opened


def base_record(opened: Opened, named: str) -> Base:
    """What a step says of the base that it was trained beside. `named`: as the run names it."""
    on_hub = not os.path.lexists(named) and looks_like_hub_id(named) and not opened.native
    path = str(opened.folder if is_remote(opened.folder) else opened.folder.absolute())
    found = model_fingerprint(opened.spec, opened.folder, opened.manifest)
    return Base(named if on_hub else path, found)


def _chunks(task: Task) -> TensorEntry:
    """A native tensor as chunks of HF's files. Their hashes are empty: HF records none."""
    width = row_elements(task.entry)
    shape = task.entry.native.shape
    chunks = []
    for rows in task.entry.rows:
        file, stored = task.tensors[rows.source][0]
        at = stored.begin + rows.source_start * width * ITEMSIZE[task.dtype]
        offset, size = box_of_run(rows.native_start * width, rows.count * width, shape)
        chunks.append(Chunk(offset, size, file, at, ""))
    return TensorEntry(task.dtype, shape, tuple(chunks))


def copy_tokenizer(
    tokenizer: Path, target: Path, ids: Mapping[str, int | None] = MappingProxyType({})
) -> None:
    """Keep a random model's tokenizer with it, so that it can be exported and talked to.

    Args:
        ids: of bos, eos and padding (`bos_token_id`, ...), for a generation_config.json if the
            folder has none."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, target / name)
    known = {name: value for name, value in ids.items() if value is not None}
    if known and not (target / GENERATION_CONFIG).exists():
        (target / GENERATION_CONFIG).write_text(
            json.dumps(known, indent=2) + "\n", encoding="utf-8"
        )


def open_on_paper(path: str | Path) -> Opened | None:
    """A preset, or a folder that holds a config.json and no weights, as one whose tensors lie
    nowhere; None for anything else. A path that exists is never taken for a preset."""
    folder = Path(path)
    if not os.path.lexists(folder):
        name = str(path)
        if name not in PRESETS:
            return None
        spec, family = preset(name), family_of(name)
        return paper(folder, family, spec, json.dumps(family.config(spec, "bfloat16")), "BF16")
    if not (folder / CONFIG).is_file() or is_native(folder):
        return None
    if any(f.name == INDEX or f.suffix in OTHER_WEIGHTS for f in folder.iterdir()):
        return None
    config = read_config(folder)
    family = for_config(config)
    dtype = dtype_named(stated_dtype(config) or "") or "F32"
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return paper(folder, family, family.spec(config), text, dtype)


def paper(folder: Path, family: Family, spec: ModelSpec, config: str, dtype: str) -> Opened:
    """A model of this spec whose tensors lie nowhere. `config`: the text of its config.json."""
    tensors = {f"model/{p.name}": TensorEntry(dtype, p.shape, ()) for p in spec.parameters()}
    manifest = Manifest(family.name, 0, tensors)
    return Opened(
        folder, spec, manifest, None, None, native=False, provenance=None, made={CONFIG: config}
    )
