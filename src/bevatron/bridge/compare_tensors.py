"""Do two checkpoints hold the same tensors? They are compared by hash, in Hugging Face names.

The verb `verify` also compares the logits that the two compute: see `evaluate/verify.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bevatron.bridge.conversion_plan import head_name
from bevatron.bridge.conversion_report import shown_progress
from bevatron.bridge.hf_config import read_spec
from bevatron.bridge.hf_folder import HFFolder, open_hf, shown
from bevatron.bridge.merged_weights import merge_notes
from bevatron.bridge.nanotron_read import is_nanotron, open_nanotron
from bevatron.bridge.open_native import Native
from bevatron.bridge.open_weights import open_model
from bevatron.bridge.provenance import read_provenance
from bevatron.bridge.tensor_hashes import Advance, Hashes, hashes_of_files, hashes_of_native
from bevatron.checkpoint.run_folder import is_native, resolve
from bevatron.checkpoint.storage import located
from bevatron.errors import BevatronError
from bevatron.families.registry import Family
from bevatron.spec.model import ModelSpec


@dataclass
class VerifyReport:
    """The outcome of `verify`.

    Attributes:
        tensors: how many were compared; `differences`: one sentence each, naming tensors.
        logits: {max_abs_difference, max_relative_difference, tolerance, a, b}, or {reason} why they
            were not compared; None if not asked for.
    """

    a: str
    b: str
    tensors: int = 0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logits: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Tensors are equal, and so are the logits if they were compared."""
        return not self.differences and (self.logits is None or self.logits.get("ok") is not False)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def text(self) -> str:
        """For people: what was compared, and what differs, alike differences in one line."""
        grouped: dict[str, list[str]] = {}
        for difference in self.differences:
            name, _, what = difference.partition(": ")
            grouped.setdefault(what or name, []).append(name)
        lines = [f"{self.tensors} tensors of {self.a} and {self.b} compared by their hashes"]
        lines += [f"  {_counted(names)}: {what}" for what, names in grouped.items()]
        lines += [f"  {note}" for note in self.notes]
        if self.logits is not None:
            lines.append(_logits_text(self.logits, self.notes))
        return "\n".join([*lines, "they agree" if self.ok else "they differ"])


def compare_tensors(
    a: str | Path, b: str | Path, accept: Collection[str]
) -> tuple[VerifyReport, Side, Side]:
    """Compare every byte of every tensor of two checkpoints. Returns the report, without logits,
    and both as they were opened. Raises BevatronError if one of them cannot be opened.

    Args:
        accept: fields of a config.json that are said to do nothing.
    """
    report = VerifyReport(str(a), str(b))
    left, right = _open(a, accept), _open(b, accept)
    report.notes += [note for side in (left, right) for note in merge_notes(side.path)]
    with shown_progress("verifying", left.nbytes + right.nbytes) as advance:
        ours = left.hashes(report, advance)
        theirs = right.hashes(report, advance)
    _compare_specs(left, right, report)
    _compare_tensors(left, ours, right, theirs, report)
    return report, left, right


def accepted_fields(path: str | Path) -> Collection[str]:
    """The fields of config.json that an import recorded as accepted."""
    if not is_native(located(path)):
        return ()
    record = read_provenance(resolve(path))
    return record.accepted if record else ()


class Side:
    """One checkpoint, opened."""

    def __init__(self, label: str, path: Path, spec: ModelSpec | None, family: Family | None):
        self.label, self.path, self.spec, self.family = label, path, spec, family
        self.nbytes = 0
        self.unknown = ""  # why there is no spec

    def hashes(self, report: VerifyReport, advance: Advance) -> Hashes:
        raise NotImplementedError


class _HFSide(Side):
    def __init__(self, label: str, source: HFFolder, accept: Collection[str]):
        spec, family, unknown = None, None, ""
        try:
            family, spec, _ = read_spec(source, accept)
        except BevatronError as error:
            unknown = str(error)
        super().__init__(label, source.path, spec, family)
        self.source, self.nbytes, self.unknown = source, source.nbytes, unknown

    def hashes(self, report: VerifyReport, advance: Advance) -> Hashes:
        if self.spec is None:
            note = f"compared by names alone: {self.unknown}"
            report.notes += [note] if note not in report.notes else []
        return hashes_of_files(self.path, self.source.headers, advance)


class _NativeSide(Side):
    def __init__(self, label: str, native: Native):
        super().__init__(label, native.folder, native.spec, native.family)
        self.native = native
        self.nbytes = sum(t.nbytes for _, _, t in native.entries())

    def hashes(self, report: VerifyReport, advance: Advance) -> Hashes:
        found, damage = hashes_of_native(self.native, advance)
        report.differences += damage
        return found


def _open(path: str | Path, accept: Collection[str]) -> Side:
    if is_native(located(path)):
        return _NativeSide(str(path), open_model(path))
    if is_nanotron(Path(path)):
        return _NativeSide(str(path), open_nanotron(path).native())
    return _HFSide(str(path), open_hf(path), accept)


def _compare_specs(a: Side, b: Side, report: VerifyReport) -> None:
    if a.spec is None or b.spec is None or a.spec == b.spec:
        return
    for f in dataclasses.fields(ModelSpec):
        left, right = getattr(a.spec, f.name), getattr(b.spec, f.name)
        if f.name == "init" or left == right:  # init says nothing about trained weights
            continue
        if f.name == "layers" and len(left) == len(right):
            i = next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y)
            report.differences.append(
                f"the models differ in layer {i}: {a.label} has {left[i]}, {b.label} has {right[i]}"
            )
            continue
        if f.name == "layers":
            left, right = f"{len(left)} layers", f"{len(right)} layers"
        report.differences.append(
            f"the models differ in {f.name}: {a.label} has {left}, {b.label} has {right}"
        )


def _compare_tensors(a: Side, left: Hashes, b: Side, right: Hashes, report: VerifyReport) -> None:
    for side, found, other in ((a, left, b), (b, right, a)):
        there = right if found is left else left
        for name in [n for n in found if n not in there]:
            reason = _why_optional(side, name, found)
            if reason:
                report.notes.append(f"{name}: only in {side.label}: {reason}")
            else:
                report.differences.append(f"{name}: in {side.label} but not in {other.label}")
    for name in [n for n in left if n in right]:
        report.tensors += 1
        one, two = left[name], right[name]
        for what in ("dtype", "shape", "hash"):
            if getattr(one, what) != getattr(two, what):
                report.differences.append(
                    f"{name}: {'values differ' if what == 'hash' else what + ' differs'}: "
                    f"{_spelled(getattr(one, what))} in {a.label}, "
                    f"{_spelled(getattr(two, what))} in {b.label}"
                )
                break
    if not report.tensors:
        report.differences.append(f"{a.label} and {b.label} have no tensor in common")


def _why_optional(side: Side, name: str, found: Hashes) -> str | None:
    """Why a tensor may be on one side only."""
    if side.family is None or side.spec is None:
        return None
    if name == head_name(side.family, side.spec):
        embed = next(
            e.sources[0].name
            for e in side.family.weight_map(side.spec)
            if e.native.role == "embedding"
        )
        return f"a copy of {embed}" if found[name] == found[embed] else None
    return side.family.skip(name)


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({shown(names, 3)})"


def _logits_text(logits: dict[str, Any], notes: Collection[str]) -> str:
    if "max_abs_difference" not in logits:
        if any(note.endswith(logits["reason"]) for note in notes):
            return "logits were not compared, for the same reason"
        return f"logits were not compared: {logits['reason']}"
    note = f"; {logits['note']}" if logits.get("note") else ""
    return (
        f"logits by {logits['a']} and {logits['b']} differ by at most "
        f"{logits['max_abs_difference']:.2g} (relative {logits['max_relative_difference']:.2g}, "
        f"allowed {logits['tolerance']:g}){note}"
    )


def _spelled(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
