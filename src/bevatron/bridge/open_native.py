"""Opening a native checkpoint for export and comparison: its spec, manifest, source and family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevatron.bridge.conversion_plan import carry, head_name
from bevatron.bridge.hf_folder import shown
from bevatron.bridge.provenance import Provenance, read_provenance
from bevatron.checkpoint.dtypes import FLOATS
from bevatron.checkpoint.manifest import FILE_NAME, Manifest, TensorEntry, read_manifest
from bevatron.checkpoint.run_folder import resolve
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError, CheckpointError
from bevatron.families.config_fields import spec_of
from bevatron.families.registry import Family, FamilyError, by_name, for_spec
from bevatron.families.weight_map import Entry
from bevatron.spec import ModelSpec, SpecError
from bevatron.spec.json import from_json

CONFIG = "config.json"


@dataclass(frozen=True)
class Native:
    """A native checkpoint, opened.

    Attributes:
        family: the one to export as; `moved_from`: the manifest's, if that cannot express the spec.
        config: of source/, or None if there is none. Of the family that the model came from.
    """

    folder: Path
    manifest: Manifest
    spec: ModelSpec
    family: Family
    moved_from: str | None
    config: Mapping[str, Any] | None
    provenance: Provenance | None

    @classmethod
    def made(cls, folder: Path, manifest: Manifest, spec: ModelSpec, family: Family) -> Native:
        """One that was just written, known without reading it."""
        return cls(folder, manifest, spec, family, None, None, None)

    def entries(self) -> list[tuple[str, Entry, TensorEntry]]:
        """Manifest name, weight map entry and stored tensor of every HF-visible tensor: the
        parameters, then what is carried."""
        tensors = self.manifest.tensors
        found = [
            (f"model/{e.native.name}", e, tensors[f"model/{e.native.name}"])
            for e in self.family.weight_map(self.spec)
        ]
        for name, tensor in tensors.items():
            if name.startswith("carried/"):
                found.append((name, carry(name.removeprefix("carried/"), tensor.shape), tensor))
        return found

    def duplicates(self) -> dict[str, str]:
        """HF tensors to store twice, as the source did, if the model is still tied."""
        head = head_name(self.family, self.spec)
        known = self.provenance.duplicates if self.provenance and not self.moved_from else {}
        return {name: other for name, other in known.items() if name == head}

    def described(self) -> ModelSpec | None:
        """What source/config.json means; None if there is none, or not one of `family`."""
        if self.config is None:
            return None
        accepted = self.provenance.accepted if self.provenance else {}
        try:
            return spec_of(self.family, self.config, accepted)[0]
        except BevatronError:
            return None

    def replaced_head(self) -> dict[str, str] | None:
        """HF tensors of the source's head, with the reason why they are gone, if the model has got
        another head since; None if it has not."""
        old = self.described()
        if old is None or self.provenance is None or self.moved_from:
            return None
        head = self.spec.head
        if (old.head.kind, old.head.labels) == (head.kind, head.labels):
            return None
        kept = {s.name for e in self.family.weight_map(self.spec) for s in e.sources}
        entries = self.family.weight_map(old)
        heads = [s.name for e in entries if e.native.name.startswith("head.") for s in e.sources]
        return {name: "its head was replaced" for name in heads if name not in kept}


def open_native(path: str | Path) -> Native:
    """Open a native checkpoint or a run's latest step, and check that it holds its whole model, or
    an adapter's step its whole adapter.

    Raises BevatronError naming the file that is damaged or says what is unknown, or parameters that
    are missing, unknown, or of another shape or no floating dtype."""
    folder = resolve(path)
    manifest = read_manifest(folder)
    spec = read_spec(folder)
    config = None
    if (folder / "source" / CONFIG).is_file():
        config = read_object(folder / "source" / CONFIG)
    try:
        family, moved = family_of(manifest.family, spec, config)
    except FamilyError as error:
        raise FamilyError(f"{folder}/{FILE_NAME}: {error}") from error
    _check_weights(folder, manifest, spec)
    return Native(folder, manifest, spec, family, moved, config, read_provenance(folder))


def read_spec(folder: Path) -> ModelSpec:
    """The checkpoint's spec.json. Raises CheckpointError or SpecError naming the file."""
    try:
        text = (folder / "spec.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}/spec.json: cannot be read ({error})") from error
    try:
        return from_json(text)
    except SpecError as error:
        told = str(error).removeprefix("spec.json: ")
        raise SpecError(f"{folder}/spec.json: {told}") from error


def family_of(
    name: str, spec: ModelSpec, base: Mapping[str, Any] | None = None
) -> tuple[Family, str | None]:
    """The family of that name if it can express the spec, else the first one that can. If none can
    it is the named one, which raises when a config is asked of it."""
    family = by_name(name)
    try:
        family.config(spec, "float32", base)
        return family, None
    except FamilyError:
        pass
    try:
        return for_spec(spec), name
    except FamilyError:
        return family, None


def _check_weights(folder: Path, manifest: Manifest, spec: ModelSpec) -> None:
    weights = manifest.weights()
    adapter = spec.adapter
    wanted = {p.name: p for p in spec.parameters() if adapter is None or adapter.owns(p.name)}
    missing = [name for name in wanted if name not in weights]
    extra = [name for name in weights if name not in wanted]
    if missing or extra:
        raise CheckpointError(
            f"{folder}: manifest.json and spec.json disagree; missing: {shown(missing) or 'none'}; "
            f"unknown: {shown(extra) or 'none'}"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensor.shape)}, spec.json expects "
                f"{list(wanted[name].shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{folder}: {name} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"
            )
