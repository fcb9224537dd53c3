"""provenance.json: where an imported model came from, down to the bytes of every header.

The file lies at the top of a native checkpoint and goes with it through training. It is not in
source/, because a source may hold a file of any name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import bevatron
from bevatron.bridge.conversion_plan import ImportPlan
from bevatron.bridge.hf_folder import HFFolder
from bevatron.checkpoint.manifest import Manifest
from bevatron.checkpoint.read_boxes import new_hasher, spell
from bevatron.checkpoint.safetensors_file import Header, parse_header
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import CheckpointError

FILE_NAME = "provenance.json"


@dataclass(frozen=True)
class Provenance:
    """What an import recorded.

    Attributes:
        headers: weight file -> its header's text, verbatim.
        tensors: HF tensor -> {dtype, shape, file, xxh3} as found in the source. No xxh3 where the
            weights were streamed into a model, so that nobody read them whole.
        duplicates: HF tensor -> the one it was a byte-for-byte copy of.
        weights: fingerprint of the native tensors as imported; `dtype`: what they became if asked.
        verified: what reading everything back showed.
        non_finite: HF tensor -> how many of its values were NaN or infinite, if any.
        accepted: fields of config.json that the user said do nothing, with their values.
        pruned: from how many parameters to how many, if the model was pruned since.
        merged: checkpoint -> its share, if the weights are an average of these.
        folders: of source/, empty ones too; `skipped`: tensors and files not taken, with why.
    """

    bevatron: str
    source: str
    revision: str | None
    family: str
    dtype: str | None
    weights: str
    headers: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Any]]
    duplicates: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    non_finite: Mapping[str, int] = field(default_factory=dict)
    accepted: Mapping[str, Any] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    pruned: Mapping[str, int] = field(default_factory=dict)
    merged: Mapping[str, float] = field(default_factory=dict)
    verified: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One tensor a line."""
        tensors = ",\n".join(f"    {_dump(n)}: {_dump(t)}" for n, t in self.tensors.items())
        others = {k: v for k, v in self.__dict__.items() if k != "tensors"}
        lines = "".join(f'  "{k}": {_dump(v)},\n' for k, v in others.items())
        return "{\n" + lines + '  "tensors": {\n' + tensors + "\n  }\n}\n"

    def parsed_headers(self) -> dict[str, Header]:
        """The source's headers, checked again: this file may have been edited."""
        found = {}
        for file, text in self.headers.items():
            if file != Path(file).name or not file.endswith(".safetensors"):
                raise CheckpointError(f"{FILE_NAME}: {file!r} is not a plain safetensors file name")
            found[file] = parse_header(text.encode(), Path(FILE_NAME) / file, None)
        return found


def _dump(value: Any) -> str:
    return json.dumps(value)


def read_provenance(folder: Path) -> Provenance | None:
    """The checkpoint's provenance.json; None if it has none (a model made from random weights)."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    raw = read_object(path)
    for known in fields(Provenance):
        kinds = _KINDS[str(known.type).partition("[")[0]]
        if known.name in raw and not isinstance(raw[known.name], kinds):
            raise CheckpointError(f"{path}: damaged: {known.name} is {raw[known.name]!r:.80}")
    try:
        raw["folders"] = tuple(raw.get("folders", ()))
        return Provenance(**raw)
    except TypeError as error:
        raise CheckpointError(f"{path}: damaged or of another version ({error})") from error


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "Mapping": (dict,),
    "tuple": (list,),
}


def describe(
    source: HFFolder, family: str, plan: ImportPlan, hashes: Mapping[str, str]
) -> Provenance:
    """What can be said of an HF folder before its weights are anywhere else.

    Args:
        hashes: HF tensor -> hash of its bytes, as far as they are known.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name, (file, stored) in source.tensors().items():
        tensors[name] = {"dtype": stored.dtype, "shape": stored.shape, "file": file}
        if name in hashes:
            tensors[name]["xxh3"] = hashes[name].removeprefix("xxh3:")
    return Provenance(
        bevatron=bevatron.__version__,
        source=source.name,
        revision=source.revision,
        family=family,
        dtype=None,
        weights="",
        headers={file: header.text.decode() for file, header in source.headers.items()},
        tensors=tensors,
        duplicates=plan.duplicates,
        carried=plan.carried,
        skipped=source.skipped,
        folders=source.folders,
    )


def fingerprint(manifest: Manifest) -> str:
    """A hash over all weights' names, shapes, dtypes and chunk hashes. It changes with the chunking
    as well, so an equal one proves an unmodified import; another one proves nothing."""
    hasher = new_hasher()
    for name, tensor in sorted(manifest.tensors.items()):
        if name.startswith(("model/", "carried/")):
            hashes = " ".join(c.hash for c in tensor.chunks)
            hasher.update(
                memoryview(f"{name} {tensor.dtype} {list(tensor.shape)} {hashes}\n".encode())
            )
    return spell(hasher)
