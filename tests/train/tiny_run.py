"""A run that takes milliseconds a step, in a folder of its own, and what to ask of its steps."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers

from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.run_folder import RunFolder, check_whole
from bevatron.checkpoint.save_and_load import verify_share
from bevatron.data.tokenize import tokenize
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.spec.json import to_json
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.launch import layout_of, work

SPEC = ModelSpec(300, 32, (LayerSpec(Attention(4, 2, 8), MLP(48)),) * 2)
CONFIG = """\
model: {spec: spec.json}
data: {train: [{path: tokens}], seq_len: 16}
train: {steps: 6, global_batch: 4, micro_batch: 2, precision: fp32}
optimizer: {lr: 1.0e-3}
schedule: {name: constant}
checkpoint: {every: 2, keep: 2}
run: {dir: run}
tokenizer: tokenizer
"""


def prepare(folder: Path) -> Path:
    """Spec, tokenizer, tokens and configuration (`run.yaml`)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: i + 3 for i, c in enumerate(alphabet)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "text.txt").write_text(Path(json.__file__).read_text())
    tokenize([folder / "text.txt"], folder / "tokens", tokenizer=folder / "tokenizer")
    (folder / "spec.json").write_text(to_json(SPEC))
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def configuration(**sections: Any) -> RunConfig:
    """A whole configuration, for what asks for one and reads no files: one's own sections, and the
    least of the others."""
    least: dict[str, Any] = {"model": {"spec": "spec.json"}}
    least["data"] = {"train": [{"path": "none"}], "seq_len": 16}
    least |= {"train": {"steps": 1, "global_batch": 4}, "optimizer": {"lr": 1e-3}}
    return RunConfig.model_validate(least | {"run": {"dir": "run"}} | sections)


def train(folder: Path, *overrides: str) -> None:
    """`bevatron train run.yaml`, as one of the ranks of a process group that exists already."""
    with contextlib.chdir(folder):
        config = load_config(Path("run.yaml"), list(overrides))
        work(config, layout_of(config, dist.get_world_size()), allow_changed=False)


def metrics(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every whole line."""
    path, out = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
            out.append((found["step"], found["loss"], found["grad_norm"]))
        except (ValueError, KeyError):
            continue
    return out


def check_steps(run: Path) -> list[int]:
    """The steps of a run, of which each must be whole: no folder under a step's name may be
    anything else."""
    found = []
    folder = RunFolder(run)
    for path in [*folder.folders(), *folder.folders("weights")]:
        manifest = read_manifest(path)
        verify_share(path, manifest, 0, 1)
        if path.name.startswith("step-"):
            check_whole(path, manifest)
            found.append(manifest.step)
    return found
