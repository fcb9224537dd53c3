"""Writing a placed model to disk, as a native checkpoint or as a Hugging Face folder.

Every rank writes its own boxes into a native checkpoint. For a Hugging Face folder this checkpoint
lies beside the target, and one rank streams it through the exporter in bounded memory. No rank ever
gathers the model. All functions are collective: an error on one rank is raised on all of them, and
no files are left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from bevatron.auto_bridge.hf_tensors import origin_family
from bevatron.auto_bridge.placed_module import DistributedModel
from bevatron.bridge.convert import export_checkpoint
from bevatron.bridge.hf_folder import INDEX
from bevatron.bridge.open_weights import copy_tokenizer
from bevatron.bridge.provenance import FILE_NAME as PROVENANCE
from bevatron.bridge.provenance import fingerprint
from bevatron.bridge.write_native import commit
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.new_folder import check_target, new_folder, working_folder
from bevatron.checkpoint.rank_boxes import box, is_first_copy, local
from bevatron.checkpoint.rank_tables import merge_tables
from bevatron.checkpoint.save_and_load import SPELLED, Saved, box_reader, write_rank
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placed_weights import carried

T = TypeVar("T")


def save_native(
    model: DistributedModel, path: Path, *, tokenizer: Path | None = None, overwrite: bool = False
) -> None:
    """Write a native checkpoint. `tokenizer`: a folder to take one from if the model has none."""

    def put(written: Path) -> None:
        with new_folder(path, overwrite=overwrite) as folder:
            _move(written, folder)

    with _written(model, path, overwrite, tokenizer) as written:
        on_first(lambda: put(written))


def save_hf(
    model: DistributedModel,
    path: Path,
    *,
    dtype: str | None = None,
    weights_only: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> None:
    """Write a Hugging Face folder: as the source was, if nothing changed.

    Args:
        dtype: bf16, fp16 or fp32; None keeps the model's.
        weights_only: the safetensors and their index alone.
    """

    def export(written: Path) -> None:
        options = {"dtype": dtype, "show_progress": show_progress}
        if not weights_only:
            export_checkpoint(written, path, overwrite=overwrite, **options)  # type: ignore[arg-type]
            return
        whole = written.parent / "hf"
        export_checkpoint(written, whole, **options)  # type: ignore[arg-type]
        for file in sorted(whole.rglob("*")):
            if file.is_file() and not (file.suffix == ".safetensors" or file.name == INDEX):
                file.unlink()
        for folder in sorted((f for f in whole.rglob("*") if f.is_dir()), reverse=True):
            folder.rmdir()
        with new_folder(path, overwrite=overwrite) as folder:
            _move(whole, folder)

    with _written(model, path, overwrite, None) as written:
        on_first(lambda: export(written))


def on_first(act: Callable[[], T]) -> T:
    """Run `act` on rank 0 while the others wait; its result, or its failure, on all ranks."""
    results = on_all(lambda: act() if dist.get_rank() == 0 else None)
    return results[0]  # type: ignore[return-value]


def _move(folder: Path, target: Path) -> None:
    for item in folder.iterdir():
        item.rename(target / item.name)


@contextmanager
def _written(
    model: DistributedModel, path: Path, overwrite: bool, tokenizer: Path | None
) -> Iterator[Path]:
    """The model as a native checkpoint in a hidden sibling of `path`, for as long as needed."""
    origin = model.origin.weights
    with ExitStack() as stack:

        def begin() -> Path:
            apart_from = origin.folder if origin else None
            check_target(path, overwrite=overwrite, apart_from=apart_from)
            folder = stack.enter_context(working_folder(path)) / "native"
            folder.mkdir()
            return folder

        folder = on_first(begin)
        placed = model.placed
        saved = [
            Saved(f"model/{name}", p, local(p.detach()), model.dtypes[name])
            for name, p in placed.parameters.items()
        ]

        def write() -> None:
            rank = dist.get_rank()
            more = carried(origin) if rank == 0 and origin is not None else []
            write_rank(folder, [*saved, *more], rank)

        on_all(write)
        unchanged = all(on_all(lambda: _holds_source(model)))
        on_first(lambda: _describe(model, folder, unchanged, tokenizer))
        yield folder


def _holds_source(model: DistributedModel) -> bool:
    """Whether this rank's boxes are byte for byte those of the source, in its dtypes. Reads until
    the first difference."""
    origin = model.origin.weights
    if origin is None or origin.provenance is None:
        return False
    if origin.native and fingerprint(origin.manifest) != origin.provenance.weights:
        return False  # it was trained
    read = box_reader(origin.folder, origin.manifest, "model/")
    for name, parameter in model.placed.parameters.items():
        stored, dtype = origin.manifest.tensors.get(f"model/{name}"), model.dtypes[name]
        if stored is None or (stored.shape, stored.dtype) != (parameter.shape, SPELLED[dtype]):
            return False
        values = local(parameter.detach())
        if not is_first_copy(parameter) or not values.numel():
            continue
        mine = values.to(dtype).cpu().contiguous()
        if not torch.equal(mine.view(torch.uint8), read(name, *box(parameter)).view(torch.uint8)):
            return False
    return True


def _describe(
    model: DistributedModel,
    folder: Path,
    unchanged: bool,
    tokenizer: Path | None,
) -> None:
    """All files besides the tensors."""
    origin, source = model.origin, folder / "source"
    step = origin.weights.manifest.step if origin.weights is not None else 0
    merged = merge_tables(folder, dist.get_world_size(), origin_family(model), step)
    commit(folder, model.spec, merged)
    if origin.weights is not None:
        origin.weights.copy_origin(folder)
        if origin.weights.provenance is not None and unchanged:
            record = replace(origin.weights.provenance, weights=fingerprint(read_manifest(folder)))
            (folder / PROVENANCE).write_text(record.to_json(), encoding="utf-8")
    elif origin.config is not None:
        source.mkdir()
        text = json.dumps(dict(origin.config), indent=2) + "\n"
        (source / "config.json").write_text(text, encoding="utf-8")
    tokenizer = tokenizer or origin.tokenizer
    if tokenizer is not None and tokenizer.is_dir() and not (source / "tokenizer.json").exists():
        copy_tokenizer(tokenizer, source)
