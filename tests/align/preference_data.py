"""Small preferences, and runs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bevatron.spec import MLP, Attention, Init, LayerSpec, Linear, ModelSpec
from bevatron.spec.json import to_json
from tests.specs import LLAMA3_ROPE
from tests.train.tiny_run import prepare, train

# Of Llama-Nemotron's kind: layers without attention or MLP, linear ones, other widths.
SPEC = ModelSpec(
    300,
    32,
    (
        LayerSpec(Attention(4, 1, 8), MLP(256)),
        LayerSpec(None, MLP(512)),
        LayerSpec(Attention(4, 2, 8), None),
        LayerSpec(Linear(), MLP(256)),
        LayerSpec(Attention(4, 4, 8), Linear()),
    ),
    rope=LLAMA3_ROPE,
    init=Init(std=0.08),
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SUMS = [(a, b) for a in range(2, 8) for b in range(2, 7)]


def pairs() -> list[dict[str, Any]]:
    """Prompts with a right and a wrong answer of different lengths, and rewards."""
    return [
        {
            "prompt": f"{a}+{b}=",
            "chosen": f"{a + b}",
            "rejected": f"{a * b + 1} maybe",
            "chosen_reward": 1.0 + a / 4,
            "rejected_reward": -b / 4,
        }
        for a, b in SUMS
    ]


def several(count: int) -> list[dict[str, Any]]:
    """Prompts with so many answers, not in the order of their rewards."""
    return [
        {
            "prompt": f"{a}+{b}=",
            "responses": [f"{a + b + (7 * i) % count}" for i in range(count)],
            "rewards": [-abs((7 * i) % count) / 2 for i in range(count)],
        }
        for a, b in SUMS
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def folder_of(folder: Path) -> Path:
    """A folder to train in (see tests.train.tiny_run), with pairs.jsonl and several.jsonl."""
    prepare(folder)
    (folder / "spec.json").write_text(to_json(SPEC))
    write(folder / "pairs.jsonl", pairs())
    write(folder / "several.jsonl", several(4))
    return folder


PAIRS = "data={train: [{path: pairs.jsonl}], validation: [{path: pairs.jsonl}], seq_len: 16}"
SEVERAL = "data={train: [{path: several.jsonl}], seq_len: 16}"


def objective(name: str, **keys: Any) -> str:
    """The override that trains with it."""
    return f"objective={json.dumps({'name': name} | keys)}"


def lines(run: Path, *names: str) -> list[dict[str, Any]]:
    """Of every line of a run's metrics.jsonl that has them, these values and the step."""
    found = [json.loads(x) for x in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{n: line[n] for n in ("step", *names)} for line in found if names[0] in line]


def run_all(folder: Path, name: str, objectives: dict[str, str], *overrides: str) -> None:
    """One rank of a run for each objective, one after the other, into `<name>-<its name>`."""
    for of, override in objectives.items():
        train(folder, override, *overrides, f"run.dir={name}-{of}")


def chat_tokenizer(folder: Path) -> Path:
    """The tokenizer of bytes in this folder gets ChatML's tokens and template."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    count = len(tokenizer["model"]["vocab"])
    tokenizer["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, name in enumerate(("<|im_start|>", "<|im_end|>")):
        added = {"id": count + i, "content": name, "special": True} | flags
        tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder
