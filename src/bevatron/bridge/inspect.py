"""What a checkpoint is, read from config.json or manifest.json alone, without weights or torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bevatron.bridge.adapter_base import read_base
from bevatron.bridge.foreign_checkpoint import Foreign
from bevatron.bridge.hf_config import understand
from bevatron.bridge.hf_folder import INDEX, SINGLE, SourceError, check_kind, fetch_config, open_hf
from bevatron.bridge.nanotron_read import is_nanotron, open_nanotron
from bevatron.bridge.open_native import open_native
from bevatron.checkpoint.dtypes import FLOATS, ITEMSIZE, dtype_named, main_dtype, stated_dtype
from bevatron.checkpoint.run_folder import is_native, resolve
from bevatron.checkpoint.storage import located
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError
from bevatron.families.config_fields import check_accepted
from bevatron.spec import ModelSpec
from bevatron.spec.count import describe_adapter, parameter_count


def inspect(path: str | Path, accept: Collection[str] = ()) -> dict[str, Any]:
    """Describe an HF folder (config.json alone is enough), a Hub id, a native checkpoint, a run or
    a Nanotron checkpoint. `accept`: fields of config.json that are said to do nothing.

    Returns:
        family, parameters, layers, bytes (of the weights), dtype, step (None for an HF folder),
        kind (hf, native or nanotron), and the model's sizes.
    Raises BevatronError if it is none of these.
    """
    folder = located(path)
    if folder.is_dir() and is_native(folder):
        return _native(resolve(folder))
    if is_nanotron(folder):
        return _foreign(open_nanotron(path))
    return _hf(path, accept)


def _foreign(source: Foreign) -> dict[str, Any]:
    weights = source.manifest.tensors.values()
    return {
        "family": source.manifest.family,
        "parameters": sum(p.numel for p in source.spec.parameters()),
        "layers": len(source.spec.layers),
        "bytes": source.nbytes,
        "dtype": main_dtype((t.dtype, t.nbytes) for t in weights),
        "step": source.step,
        "kind": source.kind,
        "path": str(source.path),
        "files": len(source.stored),
        **sizes(source.spec),
    }


def _native(folder: Path) -> dict[str, Any]:
    native = open_native(folder)
    manifest, spec, record = native.manifest, native.spec, native.provenance
    weights = manifest.weights().values()
    optimizer = [t for n, t in manifest.tensors.items() if n.startswith("optimizer/")]
    return {
        "family": manifest.family,
        "parameters": parameter_count(spec.base),
        "layers": len(spec.layers),
        "bytes": sum(t.nbytes for t in weights),
        "dtype": main_dtype((t.dtype, t.nbytes // ITEMSIZE[t.dtype]) for t in weights),
        "step": manifest.step,
        "kind": "native",
        "path": str(folder),
        "optimizer_bytes": sum(t.nbytes for t in optimizer),
        "source": record.source if record else None,
        "revision": record.revision if record else None,
        **_adapter(folder, spec),
        **sizes(spec),
    }


def _adapter(folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """Of a step that holds an adapter alone: what it is, and the base that it belongs to. (Bytes
    and dtype are the adapter's then, the other numbers the whole model's.)"""
    if spec.adapter is None:
        return {}
    return {"adapter": describe_adapter(spec), "base": read_base(folder).path}


def _hf(path: str | Path, accept: Collection[str]) -> dict[str, Any]:
    if os.path.lexists(path):
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            check_kind(Path(path))
            raise SourceError(
                f"{path}: holds no config.json, manifest.json or latest; expected a Hugging Face "
                "folder, a native checkpoint or a run"
            )
    else:
        file = fetch_config(str(path))
    config = read_object(file)
    try:
        check_accepted(config, accept)
        family, spec, _ = understand(config, accept)
    except BevatronError as error:
        raise type(error)(f"{file.parent}: {error}") from error
    parameters = sum(p.numel for p in spec.parameters())
    dtype = _dtype(config, file.parent)
    spelled = dtype_named(dtype)
    return {
        "family": family.name,
        "parameters": parameters,
        "layers": len(spec.layers),
        "bytes": parameters * ITEMSIZE[spelled] if spelled else None,
        "dtype": dtype,
        "step": None,
        "kind": "hf",
        "path": str(path),
        **sizes(spec),
    }


def _dtype(config: dict[str, Any], folder: Path) -> str:
    """What config.json says; else what the weights are; else float32, as transformers has it."""
    if named := stated_dtype(config):
        return named
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        stored = [t for _, t in open_hf(folder).tensors().values() if t.dtype in FLOATS]
        if not stored:
            raise SourceError(f"{folder}: none of its tensors is one of {', '.join(FLOATS)}")
        return main_dtype((t.dtype, t.nbytes) for t in stored)
    return "float32"


def sizes(spec: ModelSpec) -> dict[str, Any]:
    """The model's sizes, and how many layers have which kind of sublayer."""
    attention = Counter(s.describe() if (s := x.attention) else "no-op" for x in spec.layers)
    mlp = Counter(s.describe() if (s := x.mlp) else "no-op" for x in spec.layers)
    return {
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "head": spec.head.kind,
        **({"labels": list(spec.head.labels)} if spec.head.labels else {}),
        "attention": dict(attention),
        "mlp": dict(mlp),
    }
