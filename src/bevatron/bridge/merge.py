"""Checkpoints of one shape averaged into one: `bevatron merge CKPT... DST`.

Each value is the weighted mean of the checkpoints' values ("model soups", Wortsman et al., arXiv
2203.05482), added up in fp32, or in fp64 for tensors that are fp32, and rounded once. The writing
is `assemble`'s; memory holds a few megabytes of each checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bevatron.bridge.assemble import Cut, Share, assemble
from bevatron.bridge.hf_folder import shown
from bevatron.bridge.merge_adapter import merge_adapter
from bevatron.bridge.merged_weights import merge_notes
from bevatron.bridge.open_weights import Opened, open_step, open_weights
from bevatron.bridge.source_changes import stamps
from bevatron.checkpoint.dtypes import FLOATS
from bevatron.checkpoint.run_folder import is_native
from bevatron.checkpoint.storage import located
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec
from bevatron.spec.count import parameter_count

# What of a tokenizer.json decides which ids a text becomes.
DECIDING = ("added_tokens", "normalizer", "pre_tokenizer", "model")


class MergeError(BevatronError):
    """Checkpoints that have no average."""


@dataclass(frozen=True)
class MergeReport:
    """Attributes:
    merged: checkpoint -> its share; they add up to 1.
    verified: what reading everything back showed.
    notes: what the user should know, one sentence each.
    """

    target: str
    merged: dict[str, float]
    family: str
    parameters: int
    tensors: int
    dtype: str
    verified: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def merge(
    checkpoints: Sequence[str | Path],
    dst: str | Path,
    *,
    weights: Sequence[float] = (),
    overwrite: bool = False,
    show_progress: bool = True,
) -> MergeReport:
    """Write the weighted average of checkpoints as a native checkpoint at `dst`; of one run that
    trains an adapter, its base with the adapter merged in (see `merge_adapter.py`).

    Args:
        checkpoints: native checkpoints, runs or Hugging Face folders, at least two but for that of
            an adapter. Tokenizer, other files, dtypes and provenance are the first one's.
        weights: one for each, whose sum each is divided by; if none are given all are equal.
    Raises BevatronError, and leaves nothing at `dst`, for models of different sizes, settings or
    tokenizers, for weights that do not fit, and as `assemble` does.
    """
    started = time.perf_counter()
    if len(checkpoints) == 1 and not weights and (step := _adapter_step(checkpoints[0])):
        whole, verified = merge_adapter(step, dst, overwrite=overwrite, show_progress=show_progress)
        return MergeReport(
            target=str(dst),
            merged={str(checkpoints[0]): 1.0},
            family=whole.manifest.family,
            parameters=parameter_count(whole.spec),
            tensors=verified["tensors"],
            dtype=FLOATS[whole.dtype],
            verified=verified,
            seconds=round(time.perf_counter() - started, 3),
            notes=merge_notes(whole.folder),
        )
    shares = _shares(checkpoints, weights)
    opened = [open_weights(path) for path in checkpoints]
    _check_apart(opened, checkpoints)
    first = opened[0]
    for other, path in zip(opened[1:], checkpoints[1:], strict=True):
        _check_same_model(first, other, str(checkpoints[0]), str(path))
        _check_same_tokenizer(first, other, str(checkpoints[0]), str(path))
    before = {one.folder: stamps(one.folder) for one in opened}
    merged = {str(path): share for path, share in zip(checkpoints, shares, strict=True)}
    origin = first
    if first.provenance is not None:
        origin = replace(first, provenance=replace(first.provenance, merged=merged))
    verified = assemble(
        first.spec,
        lambda parameter: [
            Share(one, Cut(parameter.name), share)
            for one, share in zip(opened, shares, strict=True)
        ],
        dst,
        origin=origin,
        family=first.manifest.family,
        before=before,
        title="merging",
        overwrite=overwrite,
        show_progress=show_progress,
    )
    return MergeReport(
        target=str(dst),
        merged=merged,
        family=first.manifest.family,
        parameters=parameter_count(first.spec),
        tensors=verified["tensors"],
        dtype=FLOATS[first.dtype],
        verified=verified,
        seconds=round(time.perf_counter() - started, 3),
        notes=_notes(opened, checkpoints),
    )


def _adapter_step(path: str | Path) -> Opened | None:
    """The step that holds an adapter alone, if `path` means one."""
    if not is_native(located(path)):
        return None
    step = open_step(path)
    return None if step.spec.adapter is None else step


def _shares(checkpoints: Sequence[str | Path], weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum. Raises MergeError if they do not fit."""
    if len(checkpoints) < 2:
        raise MergeError(
            f"{', '.join(map(str, checkpoints)) or 'nothing'}: one checkpoint has no average, and "
            "holds no adapter to merge; name at least two, then the target: CKPT... DST"
        )
    given = list(weights) or [1.0] * len(checkpoints)
    if len(given) != len(checkpoints):
        raise MergeError(
            f"--weights has {len(given)} numbers for {len(checkpoints)} checkpoints; give one for "
            "each, in their order"
        )
    total = math.fsum(given)
    if not all(map(math.isfinite, given)) or total <= 0 or min(given) < 0:
        raise MergeError(
            f"--weights {' '.join(f'{w:g}' for w in given)}: expected numbers from 0 of which at "
            "least one is above; each is divided by their sum"
        )
    return [weight / total for weight in given]


def _check_apart(opened: Sequence[Opened], paths: Sequence[str | Path]) -> None:
    seen: dict[Path, str | Path] = {}
    for one, path in zip(opened, paths, strict=True):
        if one.folder in seen:
            raise MergeError(
                f"{path}: is the same checkpoint as {seen[one.folder]}; name it once, with a "
                "greater weight (--weights)"
            )
        seen[one.folder] = path


def _check_same_model(a: Opened, b: Opened, a_path: str, b_path: str) -> None:
    """Raises MergeError that names what is different. How random weights would be drawn is not."""
    found = list(_differences(a.spec, b.spec))
    if a.manifest.family != b.manifest.family:
        found.insert(0, f"family: {a.manifest.family}, {b.manifest.family}")
    if found:
        raise MergeError(
            f"{b_path} is another model than {a_path}, so they have no average; {a_path} has the "
            f"first of each pair: {shown(found)}"
        )


def _differences(a: ModelSpec, b: ModelSpec) -> Iterator[str]:
    for name in (f.name for f in fields(ModelSpec) if f.name not in ("init", "layers")):
        if getattr(a, name) != getattr(b, name):
            yield f"{name}: {getattr(a, name)}, {getattr(b, name)}"
    if len(a.layers) != len(b.layers):
        yield f"layers: {len(a.layers)}, {len(b.layers)}"
        return
    for i, (ours, theirs) in enumerate(zip(a.layers, b.layers, strict=True)):
        for place in (f.name for f in fields(ours)):
            if getattr(ours, place) != getattr(theirs, place):
                yield f"layers.{i}.{place}: {getattr(ours, place)}, {getattr(theirs, place)}"


def _check_same_tokenizer(a: Opened, b: Opened, a_path: str, b_path: str) -> None:
    """Weights that learned other meanings of the ids have no average. Where one of the two has no
    tokenizer there is nothing to compare."""
    if a.tokenizer is None or b.tokenizer is None:
        return
    if a.tokenizer.read_bytes() == b.tokenizer.read_bytes():
        return
    ours, theirs = read_object(a.tokenizer), read_object(b.tokenizer)
    other = [key for key in DECIDING if ours.get(key) != theirs.get(key)]
    if other or not any(key in ours for key in DECIDING):
        raise MergeError(
            f"{b.tokenizer} is another tokenizer than {a.tokenizer} (they differ in "
            f"{', '.join(other) or 'what they hold'}), so the same id means other text in {b_path} "
            f"and in {a_path}; merge models of one tokenizer"
        )


def _notes(opened: Sequence[Opened], paths: Sequence[str | Path]) -> list[str]:
    first, notes = opened[0], []
    for one, path in zip(opened[1:], paths[1:], strict=True):
        if one.dtype != first.dtype:
            notes.append(
                f"{path} is {FLOATS[one.dtype]}; the average is {FLOATS[first.dtype]}, as "
                f"{paths[0]} is"
            )
    notes += [note for one in opened for note in merge_notes(one.folder)]
    carried = sum(name.startswith("carried/") for name in first.manifest.tensors)
    if carried:
        notes.append(
            f"{carried} rotary buffers of the source were left out; readers make their own"
        )
    return notes
