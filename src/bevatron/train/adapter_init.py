"""An adapter that begins as another one: that of another run, or a folder of peft."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bevatron.bridge.adapter_base import model_fingerprint, read_base
from bevatron.bridge.open_native import family_of
from bevatron.bridge.open_weights import Opened, open_step
from bevatron.bridge.peft_adapter import PeftAdapter, is_peft
from bevatron.checkpoint.rank_boxes import local
from bevatron.checkpoint.run_folder import is_native
from bevatron.checkpoint.save_and_load import ReadBox, box_reader, load
from bevatron.errors import BevatronError
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placement import Placed
from bevatron.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def adapter_source(
    path: str, spec: ModelSpec, family: str, base: Opened | None
) -> tuple[Shapes, ReadBox]:
    """The parameters that an adapter has, and how to read boxes of them.

    Args:
        path: a run, or a folder of peft.
        spec: what they are for, with the adapter.
        base: the weights that it will be beside.
    Raises BevatronError if it is neither, of other settings, or of another base."""
    folder = Path(path)
    try:
        if is_peft(folder):
            return _of_peft(PeftAdapter.open(folder, spec, family_of(family, spec.base)[0]))
        if not is_native(folder):
            raise BevatronError(
                f"{path} is neither a run nor a folder with peft's adapter_config.json"
            )
        step = open_step(folder)
        if step.spec.adapter is None:
            raise BevatronError(f"{path} holds no adapter; name it as model.init")
        if step.spec.adapter != spec.adapter:
            raise BevatronError(f"{path} is of other settings: {step.spec.adapter}")
        if base is not None:
            found = model_fingerprint(base.spec, base.folder, base.manifest)
            if found != read_base(step.folder).fingerprint:
                raise BevatronError(f"{path} belongs to another base than model.init")
        return dict(step.shapes), box_reader(step.folder, step.manifest, "model/")
    except BevatronError as error:
        raise BevatronError(f"adapter.init: {error}") from error


def _of_peft(adapter: PeftAdapter) -> tuple[Shapes, ReadBox]:
    known = {p.name: p for p in adapter.parameters}

    def read(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        return torch.from_numpy(adapter.read(known[name])[box].copy())

    return {name: p.shape for name, p in known.items()}, read


def begin_with(placed: Placed, path: str, family: str, base: Opened | None) -> None:
    """Fill the adapter of a placed model, and what is trained whole with it, from another one.
    Collective."""

    def act() -> None:
        shapes, read = adapter_source(path, placed.spec, family, base)
        own = {n: (p, local(p.detach())) for n, p in placed.parameters.items() if n in shapes}
        load(own, shapes, read)

    on_all(act)
