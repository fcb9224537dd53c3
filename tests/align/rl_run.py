"""A run of reinforcement learning that takes a second, in a folder of its own: a tiny model with a
token for each byte is rewarded for tokens with even numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.spec.json import to_json
from tests.train.tiny_run import prepare

# Of two layers with other sizes, one of which has no attention.
SPEC = ModelSpec(300, 32, (LayerSpec(Attention(4, 2, 8), MLP(256)), LayerSpec(None, MLP(512))))
REWARD = """\
def even(prompts, completions, completion_ids, **columns):
    rest = columns["rest"]
    return [sum(i % 2 == r for i in ids) / len(ids) for ids, r in zip(completion_ids, rest)]
"""
CONFIG = """\
model: {spec: spec.json}
tokenizer: tokenizer
objective:
  name: grpo
  rewards: [{name: python, path: reward.py, function: even}]
  num_generations: 4
  max_completion_length: 4
data: {train: [{path: problems.jsonl}], seq_len: 16}
train: {steps: 4, global_batch: 8, micro_batch: 2, precision: fp32}
optimizer: {lr: 2.0e-2}
schedule: {name: constant}
checkpoint: {every: 2, keep: 2}
run: {dir: run}
"""


def prepare_rl(folder: Path) -> Path:
    """What `tiny_run.train` reads in this folder."""
    prepare(folder)
    (folder / "spec.json").write_text(to_json(SPEC))
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"say {c}", "rest": 0} for c in "abcdefgh"]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def lines(run: Path, *but: str) -> list[dict[str, Any]]:
    """What is compared of every line of a run: all but times."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    skip = ("tokens_per_s", "tokens_per_s_per_device", "step_s", "data_wait_s", "memory_gib", *but)
    skip += ("mfu", "mfu_causal")
    return [
        {k: v for k, v in json.loads(x).items() if k not in skip and not k.startswith("time/")}
        for x in text.splitlines()
    ]
