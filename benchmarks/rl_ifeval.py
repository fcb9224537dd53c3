"""RLOO on IFEval-style instructions with the real SmolLM2-135M-Instruct: what the strict pass rate
gains on held-out prompts, and that with shuffled rewards it gains nothing.

    python benchmarks/rl_ifeval.py --dir DIR [--steps 70] [--nproc 2] [--layout dp_shard=2]
    python benchmarks/rl_ifeval.py --dir DIR --layout tp=2 --only instructions    # at TP2 as well
    python benchmarks/rl_ifeval.py --dir DIR --only speed                         # two steps, timed

Prompts are made by `generator:instructions`: a request about a topic and one of ten instructions
whose checkers are IFEval's (if-verifiable). Held-out prompts have topics that training never has,
and are the same for every checkpoint: SIZE prompts, `--samples` answers each at temperature 1, and
one greedy one. The strict pass rate is that of the answers as they are.

Two runs with the same prompts: one by the checkers' rewards, one whose rewards are permuted within
each batch. Everything is done with the commands that a user has. Runs that are done are not
repeated, a run that was stopped goes on, and results are printed and written to DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from bevatron.demo.smollm2 import model_folder

# Short answers can follow these, and the model does so now and then before it learns.
KINDS = ["no_comma", "title", "postscript", "keyword", "forbidden", "fewer_words", "bullets"]
KINDS += ["highlights", "placeholders", "quotation"]
SIZE = 200  # held-out prompts
LONGEST, SEQ_LEN = 32, 96  # tokens of an answer, and with its prompt


def shuffled(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    instruction_id_list: list[list[str]],
    kwargs: list[list[dict[str, Any]]],
    **columns: Any,
) -> list[float]:
    """The strict rewards of the batch, given to other answers: a permutation that depends on the
    answers alone, so that a run can be repeated."""
    from bevatron.align.reward_config import Instructions
    from bevatron.align.scorers import Asked, scorer_of

    score = scorer_of(Instructions())
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    rows = zip(instruction_id_list, kwargs, strict=True)
    asked = [
        Asked({"instruction_id_list": ids, "kwargs": args}, prompt, text, [], True)
        for (ids, args), prompt, text in zip(rows, prompts, texts, strict=True)
    ]
    found = [float(score(each) or 0.0) for each in asked]
    random.Random("".join(texts)).shuffle(found)
    return found


def configuration(options: argparse.Namespace, model: Path, reward: str) -> dict[str, Any]:
    rewards: dict[str, Any] = {"name": "instructions"}
    if reward == "shuffled":
        rewards = {"name": "python", "path": str(Path(__file__).resolve()), "function": reward}
        rewards["seconds"] = 300.0  # its first call imports the checkers
    source = {"path": "generator:instructions", "parameters": {"kinds": KINDS}}
    held_out = {"path": source["path"], "parameters": {"kinds": KINDS, "size": SIZE}}
    batch = options.prompts * options.generations
    found: dict[str, Any] = {
        "model": {"init": str(model)},
        "objective": {
            "name": "grpo",
            "loss": "rloo",
            "problems": {"chat": True},
            "rewards": [rewards],
            "num_generations": options.generations,
            "max_completion_length": LONGEST,
            "engine": {"max_batch": batch},
        },
        "data": {"train": [source], "validation": [held_out], "seq_len": SEQ_LEN},
        "parallel": {
            key: int(value) for key, _, value in (o.partition("=") for o in options.layout)
        },
        "train": {
            "steps": options.steps,
            "global_batch": batch,
            "micro_batch": options.micro_batch,
            "precision": options.precision,
            "val_every": 0,
        },
        "optimizer": {"lr": options.lr, "betas": [0.9, 0.95], "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 3},
        "checkpoint": {"every": 15, "keep": 2},
        "run": {"dir": f"{reward}-{'-'.join(options.layout)}"},
    }
    if options.rank:
        found["adapter"] = {"kind": "lora", "rank": options.rank, "alpha": 2 * options.rank}
    return found


def bevatron(folder: Path, *arguments: str) -> str:
    """Run a command as a user would, and return what it prints."""
    command = [sys.executable, "-m", "bevatron", *arguments]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def measured(folder: Path, name: str, ckpt: str, options: argparse.Namespace) -> dict[str, Any]:
    """The strict pass rate of a checkpoint on the held-out prompts: of sampled and of greedy
    answers; and by kind of instruction, of sampled ones."""
    target = folder / f"{name}.json"
    if not target.exists():
        common = ["pass-rates", "measure.yaml", "--validation", "--ckpt", ckpt, "--json"]
        common += ["--dtype", "bf16" if options.precision == "bf16" else "fp32"]
        rows = folder / f"{name}.jsonl"
        drawn = json.loads(
            bevatron(folder, *common, "--samples", str(options.samples), "--out", str(rows))
        )
        greedy = json.loads(bevatron(folder, *common, "--greedy"))
        kinds: dict[str, list[float]] = defaultdict(list)
        for line in rows.read_text().splitlines():
            row = json.loads(line)
            kinds[row["kinds"][0]].append(row["pass_rate"])
        by_kind = {kind: round(sum(v) / len(v), 3) for kind, v in sorted(kinds.items())}
        found = {"sampled": drawn, "greedy": greedy["pass_rate"], "by_kind": by_kind}
        target.write_text(json.dumps(found))
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def learn(folder: Path, reward: str, options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Train by one of the rewards, and measure."""
    config = configuration(options, model, reward)
    run = config["run"]["dir"]
    (folder / f"{run}.yaml").write_text(yaml.safe_dump(config))
    began = time.perf_counter()
    bevatron(folder, "train", f"{run}.yaml", "--nproc", str(options.nproc))
    seconds = time.perf_counter() - began
    steps = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "reward" in line and "loss" in line]
    parts = ("time/rollout_s", "time/rewards_s", "time/logps_s", "time/update_s", "step_s")
    middle = sorted(steps, key=lambda line: line["step_s"])[len(steps) // 2]
    thirds = max(1, len(steps) // 3)
    return {
        "steps": len(steps),
        "seconds": seconds,
        "step": {part: round(middle[part], 2) for part in parts if part in middle},
        "reward_first": sum(line["reward"] for line in steps[:thirds]) / thirds,
        "reward_last": sum(line["reward"] for line in steps[-thirds:]) / thirds,
        "mean_length_last": steps[-1]["completions/mean_length"],
        "logp_difference": steps[-1]["sampling/sampling_logp_difference/mean"],
        **({} if options.only == "speed" else measured(folder, f"after-{run}", run, options)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--lr", type=float, default=4.0e-4)
    parser.add_argument("--rank", type=int, default=32, help="of LoRA; 0 trains all parameters")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--layout", nargs="*", default=["dp_shard=2"])
    parser.add_argument("--only", choices=["instructions", "shuffled", "speed"])
    options = parser.parse_args()
    folder = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = model_folder()
    if options.only == "speed":
        options.steps = 2
        print(json.dumps(learn(folder, "instructions", options, model), indent=1))
        return
    measure = configuration(options, model, "instructions")
    (folder / "measure.yaml").write_text(yaml.safe_dump(measure))
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["before"] = measured(folder, "before", str(model), options)
    for reward in ("instructions", "shuffled"):
        if options.only in (None, reward):
            name = f"{reward} {' '.join(options.layout)}"
            results[name] = learn(folder, reward, options, model)
            gain = results[name]["sampled"]["pass_rate"] - results["before"]["sampled"]["pass_rate"]
            results[name]["gain_points"] = round(100 * gain, 1)
        path.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
