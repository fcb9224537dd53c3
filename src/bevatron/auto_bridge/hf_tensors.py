"""The tensors of a placed model as Hugging Face has them, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.auto_bridge.placed_module import DistributedModel, whole_tensors
from bevatron.bridge.conversion_plan import head_name, row_elements
from bevatron.bridge.conversion_report import shown_progress
from bevatron.bridge.open_native import family_of
from bevatron.families import Family, for_config, for_spec
from bevatron.families.weight_map import Entry
from bevatron.parallel.placed_weights import carried

PARTS = {"fuse_qkv": ("q", "k", "v"), "fuse_gate_up": ("gate", "up")}


class HFWeight(NamedTuple):
    """One tensor of a Hugging Face folder."""

    param_name: str
    weight: Tensor


@dataclass(frozen=True)
class ParamMapping:
    """What a native parameter consists of: `hf_param` is a tensor's name, or part -> name."""

    hf_param: str | dict[str, str]
    transform: str


@dataclass(frozen=True)
class ConversionTask:
    """One line of the weight map, and the pipeline stage that holds the parameter."""

    param_name: str
    mapping: ParamMapping
    pp_rank: int
    vp_stage: int = 0


def origin_family(model: DistributedModel) -> str:
    """The family that the model came as."""
    origin = model.origin
    if origin.weights is not None:
        return origin.weights.manifest.family
    return (for_config(origin.config) if origin.config else for_spec(model.spec)).name


def _family(model: DistributedModel) -> tuple[Family, bool]:
    """The family that the model leaves as, and whether it is another one."""
    family, moved_from = family_of(origin_family(model), model.spec)
    return family, moved_from is not None


def conversion_tasks(model: DistributedModel) -> list[ConversionTask]:
    """The whole weight map of the model, in native order."""
    stages, tasks = model.placed.stages, []
    for entry in _family(model)[0].weight_map(model.spec):
        name = entry.native.name
        names = [source.name for source in entry.sources]
        parts = dict(zip(PARTS[entry.transform], names, strict=True)) if len(names) > 1 else None
        stage = 0 if name.startswith("embed.") else len(stages) - 1
        if name.startswith("layers."):
            index = int(name.split(".")[1])
            stage = next(i for i, layers in enumerate(stages) if index in layers)
        tasks.append(ConversionTask(name, ParamMapping(parts or names[0], entry.transform), stage))
    return tasks


def hf_weights(
    model: DistributedModel,
    *,
    dtype: torch.dtype | None,
    cpu: bool,
    tasks: Sequence[ConversionTask] | None,
    show_progress: bool,
) -> Iterator[HFWeight]:
    """See `AutoBridge.export_hf_weights`."""
    only = None if tasks is None else {task.param_name for task in tasks}
    family, moved = _family(model)
    entries = {entry.native.name: entry for entry in family.weight_map(model.spec)}
    copies = {} if moved else _copies(model, family)
    total = sum(p.numel for p in model.spec.parameters() if only is None or p.name in only)
    show = show_progress and dist.get_rank() == 0
    with shown_progress("exporting elements", total, show) as advance:
        for name, tensor in whole_tensors(model, dtype, only):
            for source, part in taken_apart(entries[name], tensor.cpu() if cpu else tensor):
                for each in (source, *copies.get(source, ())):
                    yield HFWeight(each, part)
            advance(tensor.numel())
    if only is None and model.origin.weights is not None:
        for saved in carried(model.origin.weights):
            yield HFWeight(saved.name.removeprefix("carried/"), saved.values)


def taken_apart(entry: Entry, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that a native one consists of."""
    rows = tensor.reshape(-1, row_elements(entry))
    for number, source in enumerate(entry.sources):
        mine = [r for r in entry.rows if r.source == number]
        parts = [rows[r.native_start : r.native_start + r.count] for r in mine]
        yield source.name, (parts[0] if len(parts) == 1 else torch.cat(parts)).view(source.shape)


def _copies(model: DistributedModel, family: Family) -> dict[str, list[str]]:
    """Tensors that the source stores a second time under another name, as an export does."""
    weights, head = model.origin.weights, head_name(family, model.spec)
    if weights is None or weights.provenance is None:
        return {}
    known = weights.provenance.duplicates.items()
    return {other: [name] for name, other in known if name == head}
