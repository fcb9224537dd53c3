"""Pruning: a smaller model is cut from a trained one, tensor by tensor, into a new checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bevatron.bridge.assemble import Index, assemble
from bevatron.bridge.open_native import CONFIG
from bevatron.bridge.open_weights import Opened, open_on_paper, open_weights
from bevatron.bridge.remote_code import readers
from bevatron.bridge.source_changes import stamps
from bevatron.checkpoint.dtypes import FLOATS, ITEMSIZE
from bevatron.checkpoint.new_folder import check_looked_at, check_space, check_target
from bevatron.checkpoint.storage import located
from bevatron.compress.importance_scores import Scores, weights_hash
from bevatron.compress.kept_indices import MERGES, Kept, cut, keep, source_of
from bevatron.compress.prune_report import PruneReport, class_of, family_of, sizes_of
from bevatron.compress.prune_targets import DEPTH_BY, PruneError, Targets
from bevatron.compress.pruned_spec import Shape, shape
from bevatron.families.registry import by_name
from bevatron.spec.count import parameter_count

RECORD = "pruning.json"


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before the first byte is read."""

    opened: Opened
    shape: Shape
    config: dict[str, Any] | None
    report: PruneReport


def prune(
    ckpt: str | Path,
    dst: str | Path,
    targets: Targets,
    *,
    data: str | Path | None = None,
    scores: str | Path | Scores | None = None,
    samples: int = 1024,
    merge_heads: str = "none",
    dry_run: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> PruneReport:
    """Write the pruned model as a native checkpoint at `dst`.

    Args:
        ckpt: whatever holds weights: a native checkpoint, a run, an HF folder or Hub id.
        data: a token store on which importance is measured, with so many `samples`; or
        scores: what was measured before. Neither is needed where `targets` names all that goes.
        merge_heads: what becomes of dropped heads; see `kept_indices.MERGES`.
        dry_run: only say what would be done; `ckpt` may be a preset's name or a folder with a
            config.json alone then.
    Raises BevatronError; nothing is left at `dst` then, and an old one stays as it was.
    """
    started = time.perf_counter()
    dst = located(dst)
    _check_options(targets, data, scores, merge_heads)
    check = check_looked_at if dry_run else check_target
    check(dst, overwrite=overwrite)
    if dry_run and data is None and scores is None and (paper := open_on_paper(ckpt)) is not None:
        return replace(_on_paper(paper, targets, str(ckpt), str(dst), merge_heads), dry_run=True)
    opened = open_weights(ckpt)
    before = stamps(opened.folder)
    notes = check(dst, overwrite=overwrite, apart_from=opened.folder) or ()
    by_layer = targets.num_layers is not None and not targets.drop_layers
    if scores is None and data is not None and (by_layer or not dry_run):
        scores = _measured(opened, ckpt, data, samples, targets)
    if isinstance(scores, str | Path):
        scores, name = Scores.read(scores), str(scores)
    else:
        name = str(data)
    if scores is not None:
        scores.check(opened.spec, name)
    plan = plan_pruning(opened, targets, scores, str(ckpt), str(dst), merge_heads)
    check_space(dst, plan.report.bytes)
    if dry_run and scores is None:
        return replace(plan.report, dry_run=True, notes=[*plan.report.notes, *notes])
    kept = keep(opened.spec, plan.shape, scores)
    parts = {p.name: cut(opened.spec, kept, merge_heads, p) for p in plan.shape.spec.parameters()}
    if dry_run:
        return replace(plan.report, dry_run=True, notes=[*plan.report.notes, *notes])
    origin = opened
    if opened.provenance is not None:
        pruned = {"from": plan.report.before, "to": plan.report.parameters}
        origin = replace(opened, provenance=replace(opened.provenance, pruned=pruned))
    verified = assemble(
        plan.shape.spec,
        lambda parameter: (opened, parts[parameter.name]),
        dst,
        origin=origin,
        family=plan.report.family,
        config=plan.config,
        records={RECORD: _record(plan, kept, scores) + "\n"},
        before={opened.folder: before},
        title="pruning",
        overwrite=overwrite,
        show_progress=show_progress,
    )
    seconds = round(time.perf_counter() - started, 3)
    return replace(plan.report, verified=verified, seconds=seconds)


def _on_paper(
    paper: Opened, targets: Targets, source: str, target: str, merge_heads: str
) -> PruneReport:
    """What pruning a model would give whose weights are not there."""
    report = plan_pruning(paper, targets, None, source, target, merge_heads).report
    note = f"{source} has no weights on this disk; planned from its sizes"
    return replace(report, notes=[*report.notes, note])


def _check_options(targets: Targets, data: object, scores: object, merge_heads: str) -> None:
    if data is not None and scores is not None:
        raise PruneError("--data measures what --scores holds already; give one of the two")
    for option, value, known in (
        ("--merge-heads", merge_heads, MERGES),
        ("--depth-by", targets.depth_by, DEPTH_BY),
    ):
        if value not in known:
            raise PruneError(f"{option} is {value}, expected one of {', '.join(known)}")


def _measured(
    opened: Opened, ckpt: str | Path, data: str | Path, samples: int, targets: Targets
) -> Scores:
    from bevatron.compress.importance import measure  # it brings torch

    count = len(opened.spec.layers)
    number = count - (count if targets.num_layers is None else targets.num_layers)
    _check_first(opened, targets, number)
    layers = {"influence": "bi", "loss": "loss", "span": "spans"}[targets.depth_by]
    by_layer = number > 0 and not targets.drop_layers
    spans = (number,) if by_layer and layers == "spans" else ()
    return measure(ckpt, [data], samples=samples, layers=layers if by_layer else "bi", spans=spans)


def _check_first(opened: Opened, targets: Targets, number: int) -> None:
    """Refuse impossible sizes before anything is measured, whichever layers will go."""
    if number > 0 and not targets.drop_layers:
        first = tuple(range(number))
        targets = replace(targets, drop_layers=first, num_layers=None, per_layer={})
    shape(opened.spec, targets, None, by_name(opened.manifest.family))


def plan_pruning(
    opened: Opened,
    targets: Targets,
    scores: Scores | None,
    source: str,
    target: str,
    merge_heads: str = "none",
) -> _Plan:
    """Sizes, counts and the class of the result: exact, and without reading a weight."""
    origin = by_name(opened.manifest.family)
    made = shape(opened.spec, targets, scores, origin)
    text = opened.source_text(CONFIG)
    base = json.loads(text) if text is not None else None
    family, notes = family_of(made.spec, origin)
    config = None
    if family is not None and base is not None:
        config = family.config(made.spec, FLOATS[opened.dtype], base)
    carried = [n for n in opened.manifest.tensors if n.startswith("carried/")]
    if carried:
        notes.append(
            f"{len(carried)} rotary buffers of the source were left out; readers make their own"
        )
    if scores is not None:
        notes += _other_weights(opened, scores)
    weights = opened.manifest.weights()
    sources = {p.name: weights[source_of(made.layers, p.name)] for p in made.spec.parameters()}
    before, count = parameter_count(opened.spec), parameter_count(made.spec)
    report = PruneReport(
        source=source,
        target=target,
        family=(family or origin).name,
        exports_as=class_of(family, made.spec),
        before=before,
        parameters=count,
        share=round(count / before, 4),
        sizes=sizes_of(made.spec),
        dropped_layers=[i for i in range(len(opened.spec.layers)) if i not in made.layers],
        dtype=FLOATS[opened.dtype],
        bytes_read=sum(e.nbytes for e in sources.values()),
        bytes=sum(p.numel * ITEMSIZE[sources[p.name].dtype] for p in made.spec.parameters()),
        merge_heads=merge_heads,
        readers=readers(made.spec, family.name) if family is not None else {},
        notes=[*made.notes, *notes],
    )
    return _Plan(opened, made, config, report)


def _other_weights(opened: Opened, scores: Scores) -> list[str]:
    """A note if the scores are of a model of the same shape that is not this one. It may be meant:
    of a model that was trained on, say."""
    found = scores.metadata.get("weights")
    if found is None or found == weights_hash(opened.folder, opened.manifest):
        return []
    name = scores.metadata.get("model", "another model")
    return [f"the scores were measured on other weights of the same shape, {name}"]


def _record(plan: _Plan, kept: Kept, scores: Scores | None) -> str:
    """pruning.json: what went, so that it can be done again or compared: indices into the old
    model, per new layer; -1 where zeros are."""

    def listed(index: Index | None) -> list[int] | None:
        return None if index is None else [int(i) for i in index]

    report = plan.report
    return json.dumps(
        {
            "source": report.source,
            "source_step": plan.opened.manifest.step,
            "parameters": {"before": report.before, "after": report.parameters},
            "merge_heads": report.merge_heads,
            "scores": dict(scores.metadata) if scores else None,
            "layers": list(kept.layers),
            "hidden": listed(kept.hidden),
            "heads": [listed(units.get("attention")) for units in kept.units],
            "neurons": [listed(units.get("mlp")) for units in kept.units],
        }
    )
