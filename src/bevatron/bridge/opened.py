"""One way to open weights, wherever they lie: native checkpoint, run, HF folder or Hub id.

An HF folder is a native checkpoint whose chunks lie in HF's shards: the weight map's moved rows are
chunks, so every reader of boxes (training, generating) reads HF folders as they are, each rank
only the bytes that it owns.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from bevatron.bridge.hf_folder import SourceError, open_hf, shown
from bevatron.checkpoint.locate import is_native, resolve
from bevatron.checkpoint.manifest import ITEMSIZE, Chunk, Manifest, TensorEntry, read_manifest
from bevatron.checkpoint.safetensors_file import Stored
from bevatron.families import for_config
from bevatron.families.weight_map import Entry
from bevatron.spec import ModelSpec
from bevatron.spec.json import from_json


@dataclass(frozen=True)
class Opened:
    """Weights to read boxes of.

    Attributes:
        folder: that the manifest's chunks are relative to.
        source: the folder with the source's other files (config.json, tokenizer, ...), if any.
        native: whether `folder` is a native checkpoint rather than an HF folder.
    """

    folder: Path
    spec: ModelSpec
    manifest: Manifest
    source: Path | None
    native: bool

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


def open_weights(path: str | Path) -> Opened:
    """Open what `path` means. Raises BevatronError if it is none of these or is damaged."""
    if os.path.lexists(path) and is_native(Path(path)):
        folder = resolve(path)
        manifest = read_manifest(folder)
        spec = from_json((folder / "spec.json").read_text(encoding="utf-8"))
        source = folder / "source"
        return Opened(folder, spec, manifest, source if source.is_dir() else None, True)
    return _open_hf(path)


def _open_hf(path: str | Path) -> Opened:
    hf = open_hf(path)
    family = for_config(hf.config)
    spec = family.spec(hf.config)
    stored = hf.tensors()
    tensors, used = {}, set()
    for entry in family.weight_map(spec):
        for source in entry.sources:
            if source.name not in stored:
                raise SourceError(f"{hf.path}: tensor {source.name} is missing")
            found = stored[source.name][1].shape
            if tuple(found) != source.shape:
                raise SourceError(
                    f"{hf.path}: {source.name} has shape {list(found)}, config.json makes it "
                    f"{list(source.shape)}"
                )
            used.add(source.name)
        tensors[f"model/{entry.native.name}"] = _chunks(entry, stored, hf.path)
    extra = [n for n in stored if n not in used and not family.skip(n)]
    if spec.tie_word_embeddings:
        extra = [n for n in extra if n != "lm_head.weight"]
    if extra:
        raise SourceError(f"{hf.path}: holds tensors that no part of the model is: {shown(extra)}")
    return Opened(hf.path, spec, Manifest(family.name, 0, tensors), hf.path, False)


def _chunks(entry: Entry, stored: dict[str, tuple[str, Stored]], where: Path) -> TensorEntry:
    dtypes = {stored[s.name][1].dtype for s in entry.sources}
    if len(dtypes) > 1:
        raise SourceError(
            f"{where}: {', '.join(s.name for s in entry.sources)} have different dtypes "
            f"({', '.join(sorted(dtypes))}) but are one matrix here; convert them to one dtype"
        )
    dtype, shape = dtypes.pop(), entry.native.shape
    chunks = []
    for rows in entry.rows:
        source = entry.sources[rows.source]
        width = source.shape[-1] if len(source.shape) > 1 else 1
        file, tensor = stored[source.name]
        at = tensor.begin + rows.source_start * width * ITEMSIZE[dtype]
        offset, size = _box(rows.native_start * width, rows.count * width, shape)
        chunks.append(Chunk(offset, size, file, at, ""))
    return TensorEntry(dtype, shape, tuple(chunks))


def _box(start: int, count: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A run of whole slices along the first dimension, as offset and shape of a box."""
    slice_size = math.prod(shape[1:])
    tail = shape[1:]
    assert start % slice_size == 0 and count % slice_size == 0
    return (start // slice_size, *[0] * len(tail)), (count // slice_size, *tail)
