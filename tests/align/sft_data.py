"""Small conversations, and runs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bevatron.spec.json import to_json
from tests.align.preference_data import SPEC
from tests.labelled_data import write_rows
from tests.train.tiny_run import prepare, train

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role[0] + '\n' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a\n' }}{% endif %}"
)
OURS = ("objective={name: sft}", "data.train=[{path: chats.jsonl}]", "data.seq_len=64")
OURS += ("data.validation=[{path: held-out.jsonl}]", "train.val_every=3", "train.global_batch=8")
OURS += ("optimizer.lr=3.0e-3",)


def chats(count: int = 40) -> list[dict[str, Any]]:
    """Sums of different lengths, in one or two turns; every tenth row is a text, every fifth a
    completion."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        a, b = 2 + i % 9, 3 + i % 7
        turns = [
            {"role": "user", "content": f"{a}+{b}="},
            {"role": "assistant", "content": f"{a + b}" + " ok" * (i % 4)},
        ]
        if i % 3 == 0:
            turns += [{"role": "user", "content": "+1="}]
            turns += [{"role": "assistant", "content": f"{a + b + 1}"}]
        if i % 10 == 7:
            rows.append({"text": f"{a}+{b}={a + b}"})
        elif i % 5 == 1:
            rows.append({"prompt": f"{a}+{b}=", "completion": f"{a + b}"})
        else:
            rows.append({"messages": turns})
    return rows


def prepared(folder: Path) -> Path:
    """As `tiny_run.prepare`, with conversations and a model of layers of many kinds."""
    prepare(folder)
    (folder / "spec.json").write_text(to_json(SPEC))
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    file = folder / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(file))
    config = {"eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    write_rows(folder / "chats.jsonl", chats())
    write_rows(folder / "held-out.jsonl", chats(52)[41:])
    return folder


def run(folder: Path, *overrides: str) -> None:
    """One rank of a run, in a process of the pool."""
    train(folder, *OURS, *overrides)


def lines(run: Path) -> list[dict[str, Any]]:
    """What is compared of every line of a run."""
    keys = ("step", "loss", "grad_norm", "val_loss")
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k in keys} for line in text.splitlines()]
