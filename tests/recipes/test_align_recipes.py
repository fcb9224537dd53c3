"""The recipes of Llama-Nemotron's alignment run as they stand, one behind the other, on toys: of
them only the sizes, the lengths and what a user brings are others."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from bevatron.recipes import recipe
from bevatron.spec.json import to_json
from tests.align.preference_data import SPEC as HETEROGENEOUS
from tests.align.preference_data import chat_tokenizer
from tests.align.test_reward_model_in_rl import judge
from tests.commands import bevatron
from tests.train.tiny_run import SPEC, prepare

ON, OFF = "detailed thinking on", "detailed thinking off"
# What is other than in the recipe.
SMALL = ("model.like=null", "parallel={tp: 1}", "data.seq_len=160", "train.precision=fp32")
SMALL += ("train.steps=2", "train.global_batch=8", "train.micro_batch=4", "optimizer.lr=1.0e-3")
SMALL += ("schedule.warmup_steps=0",)
SLOW = pytest.mark.slow
ANSWERED = ("objective.max_completion_length=6", "objective.engine={max_batch: 16}")
LINES = {
    "nano": ("nano-sft-1", "nano-sft-2", "nano-sft-3", "nano-rpo-1", "nano-rpo-2"),
    "super": ("super-sft", "super-if-rl", "super-rpo"),
    "ultra": ("ultra-sft", "ultra-reasoning-rl", "ultra-rlhf"),
}


def chats(system: str, answer: str) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"{a}+{a}?"},
                {"role": "assistant", "content": answer.format(2 * a)},
            ]
        }
        for a in range(12)
    ]


def bring(folder: Path, first: str) -> None:
    """What the recipes of a line name: a model to begin with, a reward model, and data."""
    prepare(folder)
    chat_tokenizer(folder / "tokenizer")
    judge(folder / "judge", folder / "tokenizer", ["LABEL_0"])
    spec = SPEC if "nano" in first else HETEROGENEOUS
    (folder / "spec.json").write_text(to_json(spec))
    shutil.rmtree(folder / "tokens")
    status, said = bevatron(folder, "tokenize", "text.txt", "tokens", "--tokenizer", "tokenizer")
    assert status == 0, said
    status, said = bevatron(folder, "train", "run.yaml", "train.steps=1", "run.dir=start")
    assert status == 0, said
    thought, plain = "<think>double</think>{}", "{}"
    data: dict[str, list[dict[str, Any]]] = {
        "reasoning": chats(ON, thought),
        "no-reasoning": chats(OFF, plain),
        "chat": chats(OFF, plain),
        "instructions": chats(OFF, plain),
        "tools": chats(OFF, plain),
        "sft": chats(ON, thought) + chats(OFF, plain),
        "problems": [
            {"prompt": f"{a}+{a}?", "answer": str(2 * a), "pass_rate": a / 12} for a in range(12)
        ],
        "prompts": [{"prompt": f"{a}+{a}?"} for a in range(12)],
    }
    if "super" in first:
        asked = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        data["instructions"] = [{"prompt": f"{a}+{a}?"} | asked for a in range(12)]
    for n in (1, 2):
        data[f"preferences-{n}"] = [
            {
                "prompt": row["messages"][:2],
                "chosen": row["messages"][2:],
                "rejected": [{"role": "assistant", "content": "?"}],
                "chosen_reward": 1.0,
                "rejected_reward": -1.0,
            }
            for row in data["reasoning"]
        ]
    for name, rows in data.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")


def small(name: str, first: bool) -> list[str]:
    found = list(SMALL)
    if first:
        found.append("model.init=start")
    objective = recipe(name).config.objective
    if objective.name in ("grpo", "online_rpo"):
        found += ANSWERED
    if "reward_model" in recipe(name).text:
        found.append("objective.rewards=[{name: reward_model, path: judge}]")
    return found


@pytest.mark.parametrize("line", ["nano", pytest.param("super", marks=SLOW), "ultra"])
def test_a_line_of_recipes_runs_from_a_model_to_an_aligned_one(line: str, tmp_path: Path) -> None:
    names = [f"llama-nemotron-{name}" for name in LINES[line]]
    if line == "super":
        pytest.importorskip("if_verifiable", reason="the extra align")
    if line == "ultra":
        pytest.importorskip("math_verify", reason="the extra align")
    folder = tmp_path / "line"
    bring(folder, names[0])
    for number, name in enumerate(names):
        config = recipe(name).config
        if number:
            before = recipe(names[number - 1]).config.run.dir
            assert config.model.init == before, "it begins where the last one ended"
        status, said = bevatron(folder, "train", name, *small(name, not number))
        assert status == 0, said
        text = (folder / config.run.dir / "metrics.jsonl").read_text("utf-8")
        lines = [json.loads(x) for x in text.splitlines()]
        losses = [x["loss"] for x in lines if "loss" in x]
        assert len(losses) == 2 and all(map(math.isfinite, losses)), (name, lines)
        wanted = {"sft": "loss", "rpo": "rewards/margins", "grpo": "reward", "online_rpo": "reward"}
        assert wanted[config.objective.name] in lines[0], (name, lines[0])
    last = recipe(names[-1]).config.run.dir
    status, said = bevatron(folder, "export", last, "hf")
    assert status == 0, said
    if line == "nano":
        transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
