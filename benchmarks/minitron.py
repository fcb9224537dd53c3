"""What pruning and distillation are worth, on real text: the tables of docs/minitron.md.

    OMP_NUM_THREADS=1 python benchmarks/minitron.py --dir DIR [--seeds 3] [--teacher-steps 600]

A Llama of 5.2M parameters (GQA, tied) is trained on Python's own library. Then:
1. without retraining: MLPs, heads, layers and widths pruned by importance, and at random;
2. retrained: a width-pruned and a depth-pruned student of 55% of the size distilled for so many
   tokens; the width-pruned one with the plain loss for as many; and its shape from scratch with
   four times as many. Learning rates are tuned for each on the first seed, by steps of about
   three, until the best has worse ones on both sides;
3. size, speed and memory of the two students beside the teacher.

Everything is done with the commands that a user has. Runs that are done are not repeated. Writes
results.json and minitron.svg into DIR and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from measured import Measured, measured
from real_text import bevatron, plot, prepare

from bevatron.compress.importance_scores import Scores
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec, Norm, Rope
from bevatron.spec.json import to_json

VOCAB_SIZE, SEQ_LEN, BATCH, STEPS = 2048, 256, 4, 100
WIDTH, DEPTH, MLP_WIDTH, HEADS, KV_HEADS = 256, 8, 512, 8, 4
SCORED = 65_536  # held-out tokens
TARGET = 2_885_888  # of both students: four of eight layers
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of learning rates


def model() -> ModelSpec:
    attention = Attention(HEADS, KV_HEADS, WIDTH // HEADS)
    return ModelSpec(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        layers=(LayerSpec(attention, MLP(MLP_WIDTH)),) * DEPTH,
        norm=Norm("rms", 1e-5),
        rope=Rope(),
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
    )


class Lab:
    """The folder in which all of it happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, *arguments: str) -> tuple[dict[str, Any], Measured]:
        """What a command prints with --json, and what it cost."""
        command = [sys.executable, "-m", "bevatron", *arguments, "--json"]
        cost = measured(command, self.folder)
        return json.loads(cost.stdout), cost

    def loss(self, checkpoint: str) -> float:
        """Held-out nats per token."""
        known = self.folder / f"{checkpoint}.loss"
        if not known.exists():
            arguments = ("--data", "val", "--limit", str(SCORED), "--seq-len", str(SEQ_LEN))
            answer, _ = self.ask("eval", checkpoint, *arguments)
            known.write_text(str(answer["loss"]))
        return float(known.read_text())

    def prune(self, name: str, *options: str, scores: str = "scores.safetensors") -> str:
        if not (self.folder / name).exists():
            bevatron(self.folder, "prune", "teacher", name, "--scores", scores, *options)
        return name

    def train(self, name: str, config: dict[str, Any]) -> str:
        if not (self.folder / name / "done").exists():
            shared: dict[str, Any] = {
                "data": {
                    "seq_len": SEQ_LEN,
                    "train": [{"path": "train"}],
                    "validation": [{"path": "val"}],
                },
                "checkpoint": {"keep": 1},
                "run": {"dir": name},
            }
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**shared, **config}))
            bevatron(self.folder, "train", f"{name}.yaml")
            (self.folder / name / "done").touch()
        return name

    def curve(self, run: str) -> list[tuple[int, float]]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        values = [json.loads(line) for line in lines]
        key = "val_ce" if any("val_ce" in v for v in values) else "val_loss"
        return [(v["step"] * BATCH * SEQ_LEN, v[key]) for v in values if key in v]


def teacher(lab: Lab, steps: int) -> str:
    config = {
        "model": {"spec": "spec.json"},
        "tokenizer": "tokenizer",
        "train": {
            "steps": steps,
            "global_batch": 8,
            "micro_batch": 8,
            "precision": "fp32",
            "val_every": max(1, steps // 10),
            "val_batches": 16,
        },
        "optimizer": {"name": "muon", "lr": 0.02, "weight_decay": 0.0, "lr_scale": {}},
        "schedule": {"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.4},
    }
    return lab.train("teacher", config)


def retrain(lab: Lab, name: str, start: dict[str, str], rate: float, steps: int, seed: int) -> str:
    """One run of AdamW; with distillation unless it is called so."""
    distilled = name.startswith("distilled")
    objective = {"name": "distill", "teacher": "teacher"} if distilled else {"name": "pretrain"}
    config = {
        "model": start,
        "tokenizer": "tokenizer",
        "objective": objective,
        "train": {
            "steps": steps,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "precision": "fp32",
            "val_every": max(1, steps // 10),
            "val_batches": 32,
            "seed": seed,
        },
        "optimizer": {"name": "adamw", "lr": rate, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup_steps": 10, "min_lr": rate / 100},
    }
    return lab.train(f"{name}-{rate:g}-{seed}", config)


def at_random(lab: Lab, seed: int) -> str:
    """Scores that mean nothing."""
    name = f"random-{seed}.safetensors"
    measured = Scores.read(lab.folder / "scores.safetensors")
    rng = np.random.default_rng(seed)
    tensors = {n: rng.random(t.shape, dtype=np.float32) for n, t in measured.tensors.items()}
    Scores(tensors, measured.metadata).write(lab.folder / name)
    return name


def zero_shot(lab: Lab) -> dict[str, Any]:
    """Losses right after pruning."""
    width = ("--params", str(TARGET), "--multiple", "16")
    cases: dict[str, tuple[str, ...]] = {
        "mlp": ("--intermediate-size", str(MLP_WIDTH // 2)),
        "heads": ("--num-attention-heads", str(HEADS // 2)),
        "width": width,
        "depth": ("--num-layers", str(DEPTH // 2), "--depth-by", "span"),
    }
    found: dict[str, Any] = {"teacher": lab.loss("teacher")}
    for case, options in cases.items():
        found[case] = lab.loss(lab.prune(case, *options))
        if case != "depth":
            chance = [
                lab.loss(lab.prune(f"{case}-random-{s}", *options, scores=at_random(lab, s)))
                for s in range(3)
            ]
            found[f"{case} at random"] = chance
    for way in ("residual", "sum"):
        name = lab.prune(f"heads-{way}", *cases["heads"], "--merge-heads", way)
        found[f"heads, {way} merge"] = lab.loss(name)
    by_loss = {"scores": "by-loss.safetensors"}
    for way, scores in (("influence", {}), ("loss", by_loss)):
        options = ("--num-layers", str(DEPTH // 2), "--depth-by", way)
        found[f"depth by {way}"] = lab.loss(lab.prune(f"depth-{way}", *options, **scores))
    for count in (7, 6):
        options = ("--num-layers", str(count), "--depth-by", "loss")
        found[f"{count} layers"] = lab.loss(lab.prune(f"depth-{count}", *options, **by_loss))
    return found


def retrained(lab: Lab, seeds: int) -> dict[str, Any]:
    """For each way its learning rates on the first seed, then all seeds with the best."""
    ways = {
        "distilled-width": ({"init": "width"}, STEPS),
        "plain-width": ({"init": "width"}, STEPS),
        "scratch-width": ({"spec": "width/spec.json"}, 4 * STEPS),
        "distilled-depth": ({"init": "depth"}, STEPS),
    }
    found: dict[str, Any] = {}
    for way, (start, steps) in ways.items():
        tried: dict[float, float] = {}
        ends = [2, 3]  # of the ladder's part that is tried; wider until the best is inside
        best = 0.0
        while not tried or best in (LADDER[ends[0]], LADDER[ends[1]]):
            if tried:
                ends = [ends[0] - (best == min(tried)), ends[1] + (best == max(tried))]
            for rate in LADDER[ends[0] : ends[1] + 1]:
                if rate not in tried:
                    tried[rate] = lab.loss(retrain(lab, way, start, rate, steps, 0))
            best = min(tried, key=lambda r: tried[r])
        runs = [retrain(lab, way, start, best, steps, seed) for seed in range(seeds)]
        losses = [lab.loss(run) for run in runs]
        mean = statistics.fmean(losses)
        curve = lab.curve(runs[0])
        found[way] = {"tried": tried, "lr": best, "losses": losses, "mean": mean, "curve": curve}
        print(f"{way}: lr {tried}, losses {losses}, mean {mean:.4f}", flush=True)
    return found


def costs(lab: Lab, models: dict[str, str]) -> dict[str, Any]:
    """Parameters, bytes, tokens read per CPU-second and CPU-ms per generated token, without the
    start of the program, and peak memory: medians of rounds in which the models take turns."""
    text = ("--data", "val", "--seq-len", str(SEQ_LEN))
    prompt = ("--prompt", "import os", "--temperature", "0")
    taken: dict[str, list[tuple[float, float, float]]] = {label: [] for label in models}
    for _ in range(3):
        for label, checkpoint in models.items():
            (_, few), (_, many) = (
                lab.ask("eval", checkpoint, *text, "--limit", str(n)) for n in (2_048, SCORED)
            )
            (start, short), (answer, long) = (
                lab.ask("generate", checkpoint, *prompt, "--max-new-tokens", str(n))
                for n in (8, 232)
            )
            read = (SCORED - 2_048) / (many.cpu_s - few.cpu_s)
            written = len(answer["tokens"]) - len(start["tokens"])
            taken[label].append((read, 1000 * (long.cpu_s - short.cpu_s) / written, many.peak_mb))
    found = {}
    for label, checkpoint in models.items():
        columns = zip(*taken[label], strict=True)
        read, write, peak = (statistics.median(column) for column in columns)
        found[label] = {
            "parameters": lab.ask("inspect", checkpoint)[0]["parameters"],
            "bytes": sum(p.stat().st_size for p in (lab.folder / checkpoint).rglob("model/*")),
            "read_per_cpu_s": read,
            "written_cpu_ms": write,
            "peak_mb": peak,
        }
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    options.add_argument("--dir", type=Path, required=True)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--teacher-steps", type=int, default=600)
    chosen = options.parse_args()
    folder: Path = chosen.dir.absolute()
    lab = Lab(folder)
    if not (folder / "spec.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(folder, VOCAB_SIZE)
        (folder / "spec.json").write_text(to_json(model()), encoding="utf-8")
    teacher(lab, chosen.teacher_steps)
    spans = ("--layers", "spans", "--span", str(DEPTH // 2))
    alone = ("--layers", "loss", "--samples", "16")
    for scores, layers in (("scores", spans), ("by-loss", alone)):
        if not (folder / f"{scores}.safetensors").exists():
            measure = ("importance", "teacher", f"{scores}.safetensors", "--data", "train")
            bevatron(folder, *measure, "--seq-len", str(SEQ_LEN), *layers)
    results: dict[str, Any] = {"zero_shot": zero_shot(lab)}
    print(json.dumps(results["zero_shot"], indent=1), flush=True)
    results["retrained"] = retrained(lab, chosen.seeds)
    curves = {way.replace("-", ", "): r["curve"] for way, r in results["retrained"].items()}
    (folder / "minitron.svg").write_text(plot(curves, "nats per token"), encoding="utf-8")
    results["costs"] = costs(lab, {"teacher": "teacher", "width": "width", "depth": "depth"})
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    results["cpu_seconds"] = spent.ru_utime + spent.ru_stime
    results["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["costs"], indent=1))


if __name__ == "__main__":
    main()
