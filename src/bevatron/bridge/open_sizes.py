"""A model whose weights are not there, opened as far as plans need it: its sizes and its family."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bevatron.bridge.hf_folder import INDEX, OTHER_WEIGHTS, read_config
from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.dtypes import dtype_named, stated_dtype
from bevatron.checkpoint.locate import is_native
from bevatron.checkpoint.manifest import Manifest, TensorEntry
from bevatron.families.published_models import PRESETS, family_of, preset
from bevatron.families.registry import Family, for_config
from bevatron.spec import ModelSpec

CONFIG = "config.json"


def open_on_paper(path: str | Path) -> Opened | None:
    """A preset, or a folder that holds a config.json and no weights, as one whose tensors lie
    nowhere; None for anything else. A path that exists is never taken for a preset."""
    folder = Path(path)
    if not os.path.lexists(folder):
        name = str(path)
        if name not in PRESETS:
            return None
        spec, family = preset(name), family_of(name)
        return paper(folder, family, spec, json.dumps(family.config(spec, "bfloat16")), "BF16")
    if not (folder / CONFIG).is_file() or is_native(folder):
        return None
    if any(f.name == INDEX or f.suffix in OTHER_WEIGHTS for f in folder.iterdir()):
        return None
    config = read_config(folder)
    family = for_config(config)
    dtype = dtype_named(stated_dtype(config) or "") or "F32"
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return paper(folder, family, family.spec(config), text, dtype)


def paper(folder: Path, family: Family, spec: ModelSpec, config: str, dtype: str) -> Opened:
    """A model of this spec whose tensors lie nowhere. `config`: the text of its config.json."""
    tensors = {f"model/{p.name}": TensorEntry(dtype, p.shape, ()) for p in spec.parameters()}
    manifest = Manifest(family.name, 0, tensors)
    return Opened(
        folder, spec, manifest, None, None, native=False, provenance=None, made={CONFIG: config}
    )
