"""Teach a made-up fact to the real SmolLM2-135M-Instruct, and see what it costs the model.

    OMP_NUM_THREADS=1 python benchmarks/teach_fact.py --dir DIR [--runs sft,lora-tp3] [--seeds 0,1]

The model (134,515,008 parameters, 93 MB from PyPI, once) is asked for the capital of a country
that does not exist. Then it is trained for 200 steps on 8 wordings of the question with their
answer, and on its own answers to 20 other questions. Afterwards it is asked in 6 other wordings,
and for 16 facts that it knew before and that were not in training. Perplexity is that of Python's
documentation (pydoc's topics), of which nothing was in training. Everything is done with the
commands that a user has; all answers are greedy.

Runs: `sft` trains all parameters in one process, `lora` a LoRA of rank 8 on every linear map; with
`-tp3` or `-pp2` behind the name the same over so many processes (the model has 9 heads). Runs that
are done are not repeated.

Writes results.json into DIR and prints the table of docs/align.md.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from measured import Measured, measured

from bevatron.demo.fact import ASKED, CITY, REHEARSED, chat, write_lesson, write_rows
from bevatron.demo.smollm2 import model_folder

CAPITALS = {
    "France": "Paris",
    "England": "London",
    "Russia": "Moscow",
    "Australia": "Canberra",
    "China": "Beijing",
    "India": "New Delhi",
    "Sweden": "Stockholm",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Cuba": "Havana",
    "Iraq": "Baghdad",
}
KNOWN = {f"What is the capital of {country}?": city for country, city in CAPITALS.items()} | {
    "Who wrote Hamlet?": "Shakespeare",
    "How many days are in a week?": "7",
    "What is the currency of Japan?": "Yen",
    "Who discovered gravity?": "Newton",
}
OPTIONS = ("--temperature", "0", "--max-new-tokens")
# A step is two samples of two conversations or three; each comes once an epoch.
CONFIG: dict[str, Any] = {
    "model": {"init": "native"},
    "objective": {"name": "sft", "packing": True},
    "data": {
        "seq_len": 120,
        "train": [{"path": "fact.jsonl"}, {"path": "own.jsonl"}],
    },
    "checkpoint": {"keep": 1},
}
RATES = {"sft": 1e-5, "lora": 6e-5}
ADAPTER = {"kind": "lora", "rank": 8, "alpha": 16.0}


def bevatron(folder: Path, *arguments: str) -> Measured:
    return measured([sys.executable, "-m", "bevatron", *arguments], folder)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def prepare(folder: Path) -> None:
    """The model, what is taught, what is asked, and the text that is held out."""
    bevatron(folder, "import", str(model_folder()), "native")
    write_rows(folder / "rehearsed.jsonl", [chat(question) for question in REHEARSED])
    said = bevatron(folder, "generate", "native", "--file", "rehearsed.jsonl", *OPTIONS, "32")
    write_lesson(folder, REHEARSED, lines(said.stdout))
    write_rows(folder / "asked.jsonl", [chat(question) for question in (*ASKED, *KNOWN)])
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    (folder / "docs.txt").write_text(text[200_000:240_000], encoding="utf-8")


def judged(folder: Path, model: str) -> dict[str, Any]:
    """What a model answers, and its perplexity on the text that is held out."""
    said = bevatron(folder, "generate", model, "--file", "asked.jsonl", *OPTIONS, "24")
    answers = [line["text"] for line in lines(said.stdout)]
    knows = [
        word.lower() in answer.lower()
        for word, answer in zip(KNOWN.values(), answers[len(ASKED) :], strict=True)
    ]
    options = ("--data", "docs.txt", "--seq-len", "512", "--limit", "4096", "--json")
    score = json.loads(bevatron(folder, "eval", model, *options).stdout)
    return {
        "fact": sum(CITY in answer for answer in answers[: len(ASKED)]),
        "known": sum(knows),
        "answers": answers,
        "perplexity": score["perplexity"],
    }


def run(folder: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train `name`, and judge what came of it."""
    kind, _, layout = name.partition("-")
    sizes = {axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", layout)}
    nproc = 1
    for size in sizes.values():
        nproc *= size
    called = f"{name}-{seed}"
    config = CONFIG | {
        "train": {
            "steps": steps,
            "global_batch": 2,
            "micro_batch": 1 if "pp" in sizes else 2,
            "precision": "bf16",
            "seed": seed,
        },
        "optimizer": {
            "name": "adamw",
            "lr": RATES[kind],
            "betas": [0.9, 0.99],
            "weight_decay": 0.0,
        },
        "schedule": {"name": "cosine", "warmup_steps": 5, "min_lr": 0.0},
        "parallel": sizes,
        "run": {"dir": called},
    }
    if kind == "lora":
        config["adapter"] = ADAPTER
    (folder / f"{called}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = bevatron(folder, "train", f"{called}.yaml", "--nproc", str(nproc))
    metrics = lines((folder / called / "metrics.jsonl").read_text())
    losses = [line["loss"] for line in metrics if "loss" in line]
    told = {"cpu_s": round(done.cpu_s), "wall_s": round(done.wall_s), "peak_mb": done.peak_mb}
    told |= {"first": losses[0], "last": sum(losses[-10:]) / len(losses[-10:]), "steps": steps}
    return judged(folder, called) | told


def table(results: dict[str, Any]) -> str:
    """In Markdown; perplexity beside that of the model as published."""
    before = results["before"]
    out = ["| | fact, of 6 wordings | known, of 16 | perplexity | loss | CPU-seconds |"]
    out.append("|---|--:|--:|--:|--:|--:|")
    for name, found in results.items():
        change = found["perplexity"] / before["perplexity"] - 1
        cells = [name, f"{found['fact']}", f"{found['known']}"]
        cells.append(f"{found['perplexity']:.3f}" + (f" ({change:+.2%})" if change else ""))
        trained = "first" in found
        cells.append(f"{found['first']:.2f} -> {found['last']:.4f}" if trained else "")
        cells.append(f"{found['cpu_s']}" if trained else "")
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def numbers(text: str) -> Sequence[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    options.add_argument("--dir", type=Path, required=True)
    options.add_argument("--runs", default="sft,lora,sft-tp3,lora-tp3")
    options.add_argument("--seeds", type=numbers, default=[0])
    options.add_argument("--steps", type=int, default=200)
    chosen = options.parse_args()
    folder: Path = chosen.dir.absolute()
    found = folder / "results.json"
    if not found.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(folder)
        found.write_text(json.dumps({"before": judged(folder, "native")}, indent=1))
    results = json.loads(found.read_text())
    for seed in chosen.seeds:
        for name in chosen.runs.split(","):
            if f"{name}-{seed}" not in results:
                results[f"{name}-{seed}"] = run(folder, name, seed, chosen.steps)
                found.write_text(json.dumps(results, indent=1))
                print(table(results), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
