"""Exports in the last transformers 4: a second environment, made by `make test-compat`.

Every export here has a config.json written anew from the spec, as after training or pruning, and is
read by a process that has transformers 4.57 and nothing of Bevatron (but for `bevatron.hf`, where
that is what is tested). NanoChat is missing because version 4 has no such class, and scaled rope in
Nemotron because version 4 ignores it there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.compress.prune import prune
from bevatron.compress.prune_targets import Targets
from bevatron.parallel.whole_decoder import load_decoder
from tests.hf.test_hf import CASES as BLOCKS
from tests.hf.test_hf import save as save_llama_nemotron

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-compat" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"{PYTHON} is missing; `make test-compat` makes it and runs this"
)

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
CONTEXT = {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "pad_token_id": 3}


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 5e5, **values}}


STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("LlamaForCausalLM", rope(rope_type="default")),
    "linear": ("LlamaForCausalLM", rope(rope_type="linear", factor=4.0)),
    "dynamic": (
        "LlamaForCausalLM",
        rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 16},
    ),
    "yarn": ("LlamaForCausalLM", rope(rope_type="yarn", factor=4.0, beta_fast=20.0, **CONTEXT)),
    "llama3": ("LlamaForCausalLM", rope(**LLAMA3, **CONTEXT)),
    "head-dim-biases": (
        "LlamaForCausalLM",
        {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    ),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "bare": ("LlamaModel", {}),
    "classes": ("LlamaForSequenceClassification", LABELS),
    "tokens": ("LlamaForTokenClassification", LABELS),
    "answers": ("LlamaForQuestionAnswering", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "nemotron": ("NemotronForCausalLM", {"head_dim": 16}),
    "nemotron-partial": ("NemotronForCausalLM", {"head_dim": 16, "partial_rotary_factor": 0.25}),
    "nemotron-classes": ("NemotronForSequenceClassification", {"head_dim": 16, **LABELS}),
}

READ = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
if "bevatron.hf" in sys.argv:
    import bevatron.hf
for line in sys.stdin:
    folder, name = json.loads(line)
    cls = getattr(transformers, name)
    trust = {} if "bevatron.hf" in sys.argv else {"trust_remote_code": True}
    model = cls.from_pretrained(folder, **trust).eval()
    ids = torch.arange(4, 88).view(2, 42)
    with torch.no_grad():
        out = model(ids)
    if "start_logits" in out:
        found = torch.stack((out.start_logits, out.end_logits), -1)
    else:
        found = out.logits if "logits" in out else out.last_hidden_state
    torch.save(found, folder + "/read.pt")
    print(json.dumps([folder, type(model).__module__]), flush=True)
"""


def read(home: Path, folders: list[tuple[Path, str]], *extra: str) -> dict[Path, str]:
    """Load each folder with the class in transformers 4; where that class came from."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(home / "modules")}
    if extra:
        environment["PYTHONPATH"] = str(ROOT / "src")
    lines = "".join(json.dumps([str(path), name]) + "\n" for path, name in folders)
    done = subprocess.run(
        [str(PYTHON), "-c", READ, *extra],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        cwd=home,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(f): m for f, m in map(json.loads, done.stdout.splitlines())}


def written_anew(source: Path, home: Path, way: str = "spec") -> Path:
    """There and back with a config.json made from the spec alone, or from the source's, which has
    the new spelling of rope only."""
    import_checkpoint(source, home / "native")
    native = home / "native"
    if way == "spec":
        (native / "source" / "config.json").unlink()
    elif way == "pruned":
        prune(native, home / "pruned", Targets(drop_layers=(0,)), show_progress=False)
        native = home / "pruned"
    export_checkpoint(native, home / "out", dtype="fp16" if way == "dtype" else None)
    return home / "out"


def expected(folder: Path) -> Tensor:
    decoder, _ = load_decoder(folder, dtype=torch.float32)
    with torch.no_grad():
        return decoder.logits(torch.arange(4, 88).view(2, 42))


@pytest.mark.parametrize("way", ["spec", "dtype", "pruned"])
def test_stock_classes_compute_the_same(way: str, tmp_path: Path) -> None:
    folders = []
    for case, (name, changes) in STOCK.items():
        stem = name.partition("For")[0].removesuffix("Model")
        config = getattr(transformers, f"{stem}Config")(**{**SIZES, **json_copy(changes)})
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
        model.save_pretrained(tmp_path / case / "hf")
        folders.append((written_anew(tmp_path / case / "hf", tmp_path / case, way), name))
    read(tmp_path, folders)
    for folder, _ in folders:
        found = torch.load(folder / "read.pt", weights_only=True)
        want = expected(folder)
        assert want.std() > 0.05
        assert (found - want).abs().max() <= 1e-5, folder.parent.name


def json_copy(value: dict[str, Any]) -> dict[str, Any]:
    """transformers writes into the dictionaries that it is given."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in value.items()}


@pytest.mark.parametrize("way", ["trust_remote_code", "bevatron.hf"])
def test_llama_nemotron_computes_the_same(way: str, tmp_path: Path) -> None:
    folders = []
    for case, blocks in BLOCKS.items():
        (tmp_path / case).mkdir()
        save_llama_nemotron(tmp_path / case / "hf", blocks)
        out = written_anew(tmp_path / case / "hf", tmp_path / case)
        assert (out / "modeling_decilm.py").is_file()
        folders.append((out.rename(tmp_path / case / f"out-{case}"), "AutoModelForCausalLM"))
    used = read(tmp_path, folders, *(["bevatron.hf"] if way == "bevatron.hf" else []))
    for folder, _ in folders:
        ours = used[folder] == "bevatron.hf"
        assert ours is (way == "bevatron.hf"), used
        found = torch.load(folder / "read.pt", weights_only=True)
        assert (found - expected(folder)).abs().max() <= 1e-5, folder.name
