"""Adapters in the format of Hugging Face's peft: adapter_config.json, adapter_model.safetensors.

peft has an adapter at each Linear of transformers' model, so what is beside a fused map here is
there beside the matrices that it is fused of. Rows move and nothing is computed: an A that q, k and
v share is written three times, B and DoRA's magnitude are cut into rows as the weight is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bevatron.bridge.adapter_base import read_base
from bevatron.bridge.conversion_report import ConversionReport, shown_progress
from bevatron.bridge.hf_folder import TOKENIZER_FILES, shown
from bevatron.bridge.merged_weights import row_places
from bevatron.bridge.open_native import Native, open_native
from bevatron.checkpoint.dtypes import FLOATS, ITEMSIZE, Converter, parse_dtype
from bevatron.checkpoint.new_folder import check_space, check_target, new_folder
from bevatron.checkpoint.read_boxes import hash_bytes, read_box, verify_chunk
from bevatron.checkpoint.safetensors_file import Header, Stored, read_header, write_header
from bevatron.checkpoint.storage import open_file
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError
from bevatron.families.registry import Family
from bevatron.families.weight_map import Entry
from bevatron.spec import ModelSpec, ParameterSpec
from bevatron.spec.adapter import MAPS, Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
TASKS = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "none": "FEATURE_EXTRACTION",
}

Bits = NDArray[Any]


class PeftError(BevatronError):
    """An adapter that peft's format, or ours, cannot say."""


@dataclass(frozen=True)
class Piece:
    """A tensor of adapter_model.safetensors: which rows of which native parameter it is. Rows are
    those of the parameter with all but its last dimension in one; of a vector, its entries."""

    name: str
    native: ParameterSpec
    rows: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.width)

    @cached_property
    def width(self) -> tuple[int, ...]:
        vector = self.native.role == "magnitude" or len(self.native.shape) == 1
        return () if vector else self.native.shape[-1:]


def pieces(spec: ModelSpec, family: Family) -> list[Piece]:
    """All tensors that the adapter of a model has in peft's format.

    Raises PeftError if the family's class has one Linear where the adapter has several A."""
    adapter = spec.adapter
    assert adapter is not None
    known = {p.name: p for p in spec.parameters()}
    found: list[Piece] = []
    for entry in family.weight_map(spec.base):
        name = entry.native.name
        if name in adapter.whole:
            for number, source in enumerate(entry.sources):
                found.append(Piece(PREFIX + source.name, entry.native, _rows(entry, number)))
        parts = adapter.parts(entry.native, _layer(name))
        if not parts:
            continue
        part, row = row_places(entry.native, parts)
        beside = {last: known.get(f"{name.removesuffix('weight')}{last}") for last in SUFFIX}
        for number, source in enumerate(entry.sources):
            rows = _rows(entry, number)
            own = sorted(set(part[rows].tolist()))
            if not set(own) & set(parts):
                continue
            if len(own) > 1 and (not adapter.fused or not set(own) <= set(parts)):
                raise PeftError(
                    f"{name}: {source.name} is one matrix in transformers' {family.name}, and the "
                    "adapter has parts of it apart; peft cannot say that: train with "
                    "adapter.fused: true, or merge the adapter"
                )
            block = 0 if adapter.fused else parts.index(own[0])
            first = block * adapter.rank
            chosen = {"lora_a": np.arange(first, first + adapter.rank)}
            chosen |= {"lora_b": row[rows], "magnitude": row[rows]}
            stem = PREFIX + source.name.removesuffix("weight")
            found += [
                Piece(stem + SUFFIX[last], native, chosen[last])
                for last, native in beside.items()
                if native is not None
            ]
    return found


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else -1


def _rows(entry: Entry, source: int) -> NDArray[np.int64]:
    """The native rows of one of an entry's sources, in its own order."""
    return np.concatenate(
        [
            np.arange(r.native_start, r.native_start + r.count)
            for r in entry.rows
            if r.source == source
        ]
    )


def config_of(spec: ModelSpec, family: Family, base: str) -> dict[str, Any]:
    """What adapter_config.json says. `base`: a path or Hub id."""
    adapter = spec.adapter
    assert adapter is not None
    found = pieces(spec, family)
    adapted = _modules(found, SUFFIX["lora_a"])
    everywhere = [
        source.name.removesuffix(".weight")
        for entry in family.weight_map(spec.base)
        if entry.native.role in MAPS
        for source in entry.sources
    ]
    targets: dict[str, None] = {}
    for module in adapted:
        last = module.rpartition(".")[2]
        alike = [other for other in everywhere if other.rpartition(".")[2] == last]
        targets[last if set(alike) <= set(adapted) else module] = None
    whole = [p.name.removeprefix(PREFIX) for p in found if p.native.name in adapter.whole]
    return {
        "peft_type": "LORA",
        "task_type": TASKS[spec.head.kind],
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(targets),
        "modules_to_save": list(dict.fromkeys(n.rpartition(".")[0] for n in whole)) or None,
    }


def _modules(found: list[Piece], suffix: str) -> list[str]:
    """The modules of transformers' model that have a tensor with this suffix."""
    names = [p.name.removeprefix(PREFIX) for p in found if p.name.endswith(f".{suffix}")]
    return [name.removesuffix(f".{suffix}") for name in names]


def export_adapter(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> ConversionReport:
    """Write the adapter of a run's latest step as a folder that `PeftModel.from_pretrained` takes.

    Raises BevatronError, and leaves nothing at `dst`, if there is no adapter, or none that peft
    could have."""
    started = time.perf_counter()
    dst = Path(dst)
    check_target(dst, overwrite=overwrite)
    native = open_native(src)
    spec = native.spec
    if spec.adapter is None:
        raise PeftError(f"{src}: holds no adapter, but a whole model; --to hf exports that")
    check_target(dst, overwrite=overwrite, apart_from=native.folder)
    tensors, base = pieces(spec, native.family), read_base(native.folder).path
    stored = {p.native.name: native.manifest.tensors[f"model/{p.native.name}"] for p in tensors}
    to = parse_dtype(dtype) if dtype else None
    table = [(p.name, to or stored[p.native.name].dtype, p.shape) for p in tensors]
    nbytes = sum(int(np.prod(shape)) * ITEMSIZE[kind] for _, kind, shape in table)
    check_space(dst, nbytes)
    hashes: dict[str, str] = {}
    with new_folder(dst, overwrite=overwrite, apart_from=native.folder) as folder:
        text = json.dumps(config_of(spec, native.family, base), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        with (
            (folder / WEIGHTS).open("wb") as out,
            shown_progress("exporting", nbytes, show_progress) as advance,
        ):
            out.write(write_header(table, {"format": "pt"}))
            for piece in tensors:
                entry = stored[piece.native.name]
                for chunk in entry.chunks:
                    verify_chunk(native.folder, chunk, ITEMSIZE[entry.dtype], piece.native.name)
                whole = read_box(native.folder, entry, (0,) * len(entry.shape), entry.shape)
                part = np.ascontiguousarray(whole.reshape(-1, *piece.width)[piece.rows])
                data = part.reshape(-1).view("u1").data
                data = Converter(entry.dtype, to)(data) if to and to != entry.dtype else data
                hashes[piece.name] = hash_bytes(data)
                out.write(data)
                advance(len(data))
        verified = _read_back(folder, hashes)
        files = [name for name in TOKENIZER_FILES if _copied(native, folder, name)]
    return ConversionReport(
        source=str(src),
        target=str(dst),
        family=native.family.name,
        parameters=sum(int(np.prod(shape)) for _, _, shape in table),
        tensors=len(tensors),
        nbytes=nbytes,
        dtype=FLOATS[table[0][1]],
        step=native.manifest.step,
        files=len(files),
        seconds=round(time.perf_counter() - started, 3),
        verified=verified,
        notes=[f"the adapter alone; its base is {base}"],
    )


def _copied(native: Native, folder: Path, name: str) -> bool:
    """Take along one of the source's files, if it is there."""
    path = native.folder / "source" / name
    if path.is_file():
        (folder / name).write_bytes(path.read_bytes())
    return path.is_file()


def _read_back(folder: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    header = read_header(folder / WEIGHTS)
    found = {name: hash_bytes(_data(folder, stored)) for name, stored in header.tensors.items()}
    if found != hashes:
        raise BevatronError(
            f"{folder / WEIGHTS}: does not read back as it was written; the disk or the memory is "
            "at fault: check them, then run again"
        )
    return {"tensors": len(found), "equal": True, "by": "xxh3-128 of each, read back"}


def _data(folder: Path, stored: Stored) -> memoryview:
    data = memoryview(bytearray(stored.nbytes))
    file = open_file(folder / WEIGHTS)
    try:
        file.read(data, stored.begin)
    finally:
        file.close()
    return data


# --- reading ------------------------------------------------------------------------------------


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


@dataclass(frozen=True)
class PeftAdapter:
    """A folder of peft, checked to be the adapter of a spec."""

    folder: Path
    header: Header
    pieces: tuple[Piece, ...]

    @staticmethod
    def open(folder: Path, spec: ModelSpec, family: Family) -> PeftAdapter:
        """Raises PeftError for an adapter of other settings or other modules than the spec's."""
        assert spec.adapter is not None
        _check_alike(folder, spec.adapter)
        if not (folder / WEIGHTS).is_file():
            raise PeftError(f"{folder}: has no {WEIGHTS}; peft's other formats are not read")
        expected, header = pieces(spec, family), read_header(folder / WEIGHTS)
        wanted = {p.name: p.shape for p in expected}
        missing = [name for name in wanted if name not in header.tensors]
        extra = [name for name in header.tensors if name not in wanted]
        if missing or extra:
            raise PeftError(
                f"{folder} has other modules than adapter.targets, layers and whole say; not "
                f"there: {shown(missing) or 'none'}; beyond them: {shown(extra) or 'none'}"
            )
        for name, shape in wanted.items():
            stored = header.tensors[name]
            if stored.shape != shape or stored.dtype not in FLOATS:
                raise PeftError(
                    f"{folder / WEIGHTS}: {name} is {stored.dtype} {list(stored.shape)}, "
                    f"expected a floating dtype and {list(shape)}"
                )
        return PeftAdapter(folder, header, tuple(expected))

    @property
    def parameters(self) -> list[ParameterSpec]:
        """Those of the spec that it holds."""
        return list(dict.fromkeys(piece.native for piece in self.pieces))

    def read(self, parameter: ParameterSpec) -> NDArray[np.float32]:
        """One of them, in fp32. Raises PeftError if it has several A where the spec has one."""
        members = [piece for piece in self.pieces if piece.native == parameter]
        width = members[0].width
        rows = int(np.prod(parameter.shape)) // (width or (1,))[0]
        whole = np.full((rows, *width), np.nan, "<f4")
        for piece in members:
            stored = self.header.tensors[piece.name]
            raw = Converter(stored.dtype, "F32")(_data(self.folder, stored))
            found = np.frombuffer(raw, "<f4").reshape(piece.shape)
            before = whole[piece.rows]
            if not (np.isnan(before).all() or np.array_equal(before, found)):
                raise PeftError(
                    f"{self.folder}: {piece.name} differs from that of its neighbours, which "
                    "adapter.fused says are one; set adapter.fused=false"
                )
            whole[piece.rows] = found
        return whole.reshape(parameter.shape)


def _check_alike(folder: Path, adapter: Adapter) -> None:
    """Raises PeftError that names every setting of a peft adapter that is another one here."""
    raw = read_object(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise PeftError(
            f"{folder / CONFIG}: peft_type is {raw.get('peft_type')!r}, but only LORA is known here"
        )
    theirs = {
        "rank": raw.get("r"),
        "alpha": raw.get("lora_alpha"),
        "rslora": bool(raw.get("use_rslora")),
        "kind": "dora" if raw.get("use_dora") else "lora",
    }
    other = [f"adapter.{k}={v}" for k, v in theirs.items() if getattr(adapter, k) != v]
    if other:
        said = " ".join(other).replace("True", "true").replace("False", "false")
        raise PeftError(f"{folder} is of other settings; set {said}")
    unknown = [k for k in ("rank_pattern", "alpha_pattern", "fan_in_fan_out") if raw.get(k)]
    unknown += ["bias"] if raw.get("bias", "none") != "none" else []
    if unknown:
        raise PeftError(f"{folder / CONFIG}: has {shown(unknown)}, which is not known here")
