"""AdamW beside Muon on real text: a small NanoChat-style model, to bits per byte.

    OMP_NUM_THREADS=1 python benchmarks/convergence.py --dir DIR [--steps 400] [--tuning-steps 60]

The text is Python's own library (some 25 MB of code and documentation below the interpreter's
lib/python3.x), so nothing is downloaded; one file in twenty, chosen by the hash of its name, is
held out. A byte-level BPE tokenizer is trained on the rest. Each optimizer tries three learning
rates in short runs with a schedule of their own, then trains once with the best, on the same
samples in the same order. Everything is done with the commands that a user has.

Writes results.json and convergence.svg into DIR and prints the tables of docs/convergence.md. Runs
that are done are not repeated.

    bits per byte = nats per token * tokens / bytes / ln 2, tokens and bytes of the held-out text
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
from pathlib import Path
from typing import Any

import yaml
from real_text import bevatron, plot, prepare

from bevatron.data.token_store import TokenStore
from bevatron.spec import MLP, Attention, Init, LayerSpec, ModelSpec, Norm, Rope
from bevatron.spec.json import to_json

VOCAB_SIZE, WIDTH, DEPTH, HEAD_DIM = 4096, 192, 4, 64
SEQ_LEN, BATCH = 256, 8
VAL_BATCHES, POINTS = 16, 10  # validations of 32,768 tokens, so many over a long run
SHARED: dict[str, Any] = {
    "data": {"seq_len": SEQ_LEN, "train": [{"path": "train"}], "validation": [{"path": "val"}]},
    "schedule": {"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.4},
    "checkpoint": {"keep": 1},
}
# NanoChat scales the rates of embedding and head by (width / 768)^-0.5, having tuned them at 768.
WIDER = (WIDTH / 768) ** -0.5
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1},
    "muon": {
        "name": "muon",
        "betas": [0.8, 0.95],
        "eps": 1e-10,
        "weight_decay": 0.0,
        "lr_scale": {"embedding": 10 * WIDER, "head": 0.2 * WIDER},
    },
}
RATES = {"adamw": (1e-3, 3e-3, 1e-2), "muon": (1e-2, 2e-2, 4e-2)}


def model() -> ModelSpec:
    """NanoChat's kinds at a small size."""
    attention = Attention(WIDTH // HEAD_DIM, WIDTH // HEAD_DIM, HEAD_DIM, qk_norm=True)
    return ModelSpec(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        layers=(LayerSpec(attention, MLP(4 * WIDTH, "relu2", gated=False)),) * DEPTH,
        norm=Norm("rms", 1e-6, weight=False),
        rope=Rope(reversed=True),
        max_position_embeddings=SEQ_LEN,
        embedding_norm=True,
        logit_softcap=15.0,
        init=Init(scale_attention_output=True),
    )


def train(
    folder: Path, name: str, lr: float, steps: int, precision: str, points: int
) -> dict[str, Any]:
    """One run, validated so often; its validations as (tokens, nats per token) and what it cost."""
    run = f"{name}-{lr:g}-{steps}"
    config = {
        "model": {"spec": "spec.json"},
        "train": {
            "steps": steps,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "precision": precision,
            "val_every": max(1, steps // points),
            "val_batches": VAL_BATCHES,
        },
        "optimizer": {**OPTIMIZERS[name], "lr": lr},
        "run": {"dir": run},
        **SHARED,
    }
    (folder / f"{run}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if not (folder / run / "latest").exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        bevatron(folder, "train", f"{run}.yaml")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (folder / run / "cpu-seconds").write_text(f"{spent:.0f}")
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    curve = [(v["step"] * BATCH * SEQ_LEN, v["val_loss"]) for v in values if "val_loss" in v]
    seconds = int((folder / run / "cpu-seconds").read_text())
    return {"config": config, "curve": curve, "cpu_seconds": seconds}


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    options.add_argument("--dir", type=Path, required=True)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--tuning-steps", type=int, default=60)
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    chosen = options.parse_args()
    folder: Path = chosen.dir.absolute()
    if not (folder / "prepared.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        nbytes = prepare(folder, VOCAB_SIZE)
        (folder / "spec.json").write_text(to_json(model()), encoding="utf-8")
        (folder / "prepared.json").write_text(json.dumps(nbytes))
    nbytes = json.loads((folder / "prepared.json").read_text())
    tokens = {part: TokenStore.open(folder / part).tokens for part in nbytes}
    per_nat = tokens["val"] / nbytes["val"] / math.log(2)
    results: dict[str, Any] = {"bytes": nbytes, "tokens": tokens, "runs": {}, "tuning": {}}
    results["machine"] = f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    for name, rates in RATES.items():
        tried = {}
        for lr in rates:
            run = train(folder, name, lr, chosen.tuning_steps, chosen.precision, 1)
            tried[lr] = run["curve"][-1][1] * per_nat
            print(f"{name} lr {lr:g}, {chosen.tuning_steps} steps: {tried[lr]:.4f} bits per byte")
        results["tuning"][name] = tried
        best = min(tried, key=lambda lr: tried[lr])
        run = train(folder, name, best, chosen.steps, chosen.precision, POINTS)
        run["curve"] = [(t, loss * per_nat) for t, loss in run["curve"]]
        results["runs"][name] = run
        print(f"{name} lr {best:g}, {chosen.steps} steps: {run['curve'][-1][1]:.4f} bits per byte")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    curves = {LABELS[name]: run["curve"] for name, run in results["runs"].items()}
    picture = plot(curves, "bits per byte")
    (folder / "convergence.svg").write_text(picture, encoding="utf-8")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """What was tried and what came of it, in Markdown."""
    runs = results["runs"]
    lines = ["| optimizer | tuning: learning rate -> bits per byte | trained at | CPU seconds |"]
    lines.append("|---|---|---|---|")
    for name, run in runs.items():
        tried = ", ".join(f"{lr:g} -> {b:.3f}" for lr, b in results["tuning"][name].items())
        lr = run["config"]["optimizer"]["lr"]
        lines.append(f"| {LABELS[name]} | {tried} | {lr:g} | {run['cpu_seconds']} |")
    lines += ["", f"| tokens | {' | '.join(LABELS[name] for name in runs)} |"]
    lines.append("|--:|" + "--:|" * len(runs))
    for points in zip(*(run["curve"] for run in runs.values()), strict=True):
        values = " | ".join(f"{bits:.3f}" for _, bits in points)
        lines.append(f"| {points[0][0]:,} | {values} |")
    return "\n".join(lines)


LABELS = {"adamw": "AdamW", "muon": "Muon"}


if __name__ == "__main__":
    main()
