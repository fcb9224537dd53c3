"""Loading and saving the weights of a placed model: each rank moves only its own boxes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch.distributed as dist

from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.rank_boxes import local
from bevatron.checkpoint.save_and_load import (
    ReadBox,
    Saved,
    box_reader,
    load,
    verify_share,
)
from bevatron.nn.decoder import Variants
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placement import Placed, variant_parameters
from bevatron.parallel.random_weights import fill


def fill_random(placed: Placed, seed: int, only: Collection[str] | None = None) -> None:
    """Initialise the named parameters, or all; values depend on the seed and the spec alone."""
    known = {p.name: p for p in placed.spec.parameters()}
    for name, parameter in placed.parameters.items():
        if only is None or name in only:
            fill(parameter, known[name], placed.spec, seed)


def load_weights(
    placed: Placed,
    shapes: Mapping[str, tuple[int, ...]],
    read: ReadBox,
    leave: Collection[str] = (),
) -> None:
    """Fill this rank's parameters, but those to `leave`, from boxes of tensors of these shapes."""
    parameters = placed.parameters.items()
    into = {n: (p, local(p.detach())) for n, p in parameters if n not in leave}
    load(into, shapes, read, "loading weights" if dist.get_rank() == 0 else None)


def stream(
    placed: Placed, weights: Opened, leave: Collection[str] = (), *, verified: bool = False
) -> None:
    """Fill all ranks' parameters, but those to `leave`, from where they lie, after checking a
    native checkpoint's hashes, unless that was done. Collective; if it fails on one rank, all
    raise its message.

    An adapter's step gives what it holds, and its base the rest, if that was opened with it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    adapter = weights.spec.adapter
    if adapter is not None:
        names = set(placed.parameters)
        own = {name for name in names if adapter.owns(name)}
        if weights.base is not None:
            stream(placed, weights.base, leave={*leave, *own})
        leave = {*leave, *(names - own)}
    if weights.native and not verified:
        on_all(lambda: verify_share(weights.folder, weights.manifest, rank, ranks))
    read = box_reader(weights.folder, weights.manifest, "model/")
    on_all(lambda: load_weights(placed, weights.shapes, read, leave))


def stream_variants(
    placed: Placed, variants: Variants, source: Callable[[str], tuple[Opened, str]]
) -> None:
    """Fill the variants that a model was placed with. Collective; as `stream`.

    Args:
        source: name of a variant's parameter, such as `layers.3.variants.narrow.mlp.up.weight` ->
            the checkpoint that it comes from, and what it is called there.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = {name: source(name) for name in variant_parameters(placed.spec, variants)}
    checkpoints = {opened.folder: opened for opened, _ in parts.values() if opened.native}

    def fill_mine() -> None:
        for opened in checkpoints.values():
            verify_share(opened.folder, opened.manifest, rank, ranks)
        for name, parameter in placed.variants.items():
            opened, own = parts[name]
            read = box_reader(opened.folder, opened.manifest, "model/")
            load({own: (parameter, local(parameter.detach()))}, opened.shapes, read)

    on_all(fill_mine)


def carried(origin: Opened) -> list[Saved]:
    """Source tensors that are no parameters; they return on export."""
    read, out = box_reader(origin.folder, origin.manifest, ""), []
    for name, entry in origin.manifest.tensors.items():
        if name.startswith("carried/"):
            values = read(name, (0,) * len(entry.shape), entry.shape)
            out.append(Saved(name, values, values, values.dtype))
    return out
