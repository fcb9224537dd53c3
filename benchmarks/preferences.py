"""RPO stops where the rewards say, DPO does not: a small model on pairs whose rewards are known.

    OMP_NUM_THREADS=1 python benchmarks/preferences.py --dir DIR [--steps 600] [--losses rpo_sq,...]

Sixteen prompts with two answers each: of half of them the chosen answer is worth 0.1 more than the
rejected one, of the others 5 more. A small model learns them by each loss. Measured is the implicit
gap of every pair, beta * (log p - log p_reference) of the chosen answer less that of the rejected
one, at a third, two thirds and the end of the run: RPO's is to be the reward gap (times eta, 1
here), DPO's grows.

Everything is done with the commands that a user has. The log-probabilities are those that
`precompute_reference` writes, of the trained model as a reference. Runs that are done are not
repeated; the table of docs/preferences.md is printed, and written to DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from real_text import bevatron
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.spec.json import to_json

CHARACTERS = "abcdefghijklmnopqrstuvwxyz=+0123456789"
SPECIAL = ("<pad>", "<end>")
GAPS = (0.1, 5.0)
PROMPTS = 16
SPEC = ModelSpec(
    len(CHARACTERS) + len(SPECIAL), 64, (LayerSpec(Attention(4, 4, 16), MLP(128)),) * 2
)
LOSSES: dict[str, dict[str, Any]] = {
    "rpo_sq": {"name": "rpo", "loss": "rpo_sq"},
    "rpo_sqloo": {"name": "rpo", "loss": "rpo_sqloo"},
    "rpo_bwd_kl": {"name": "rpo", "loss": "rpo_bwd_kl"},
    "rpo_fwd_kl": {"name": "rpo", "loss": "rpo_fwd_kl"},
    "dpo": {"name": "dpo"},
}
BETA, RATE = 0.2, 2e-3


def prepare(folder: Path) -> None:
    """Spec, tokenizer of characters, and pairs."""
    words = {c: i + len(SPECIAL) for i, c in enumerate(CHARACTERS)}
    words |= {name: i for i, name in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[1], "pad_token": SPECIAL[0]}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "spec.json").write_text(to_json(SPEC))
    rows = [
        {
            "prompt": f"{CHARACTERS[i]}{CHARACTERS[(3 * i + 1) % 26]}=",
            "chosen": str(10 + i),
            "rejected": str(307 + 7 * i),
            "chosen_reward": GAPS[i % 2],
            "rejected_reward": 0.0,
        }
        for i in range(PROMPTS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(objective: dict[str, Any], steps: int, run: str, **more: Any) -> dict[str, Any]:
    return {
        "model": {"spec": "spec.json"},
        "tokenizer": "tokenizer",
        "objective": {"beta": BETA, **objective},
        "data": {"train": [{"path": "pairs.jsonl"}], "seq_len": 8},
        "train": {"steps": steps, "global_batch": PROMPTS, "micro_batch": PROMPTS,
                  "precision": "fp32"},
        "optimizer": {"lr": RATE, "weight_decay": 0.0, "betas": [0.9, 0.99]},
        "schedule": {"name": "cosine", "warmup_steps": 10},
        "log": {"every": 50},
        "run": {"dir": run},
    } | more  # fmt: skip


def run(folder: Path, name: str, config: dict[str, Any]) -> None:
    if (folder / config["run"]["dir"] / "latest").is_file():
        return
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    bevatron(folder, "train", path.name)


def log_probabilities(folder: Path, name: str, reference: str | None) -> NDArray[np.float64]:
    """[pairs, 2], of chosen and rejected answers, under a run's step, or the random model."""
    keys: dict[str, Any] = {"name": "dpo", "precompute_reference": True}
    if reference is not None:
        keys["reference"] = reference
    run(folder, name, configuration(keys, 1, name))
    found = load_file(folder / name / "reference" / "train.safetensors")["log_probabilities"]
    return np.asarray(found, dtype=np.float64)


def measure(folder: Path, steps: int, losses: list[str]) -> dict[str, Any]:
    """Of every loss and gap, after each third: the mean implicit gap, and the worst pair's."""
    prepare(folder)
    begin = log_probabilities(folder, "begin", None)
    gaps = np.array([GAPS[i % 2] for i in range(PROMPTS)])
    thirds = [steps // 3, 2 * steps // 3, steps]
    results: dict[str, Any] = {}
    for loss in losses:
        checkpoint = {"every": steps // 3, "keep": 9}
        run(folder, loss, configuration(LOSSES[loss], steps, loss, checkpoint=checkpoint))
        results[loss] = {}
        for step in thirds:
            place = f"{loss}/step-{step:08d}"
            now = log_probabilities(folder, f"of-{loss}-{step}", place)
            implicit = BETA * (now - begin)
            margins = implicit[:, 0] - implicit[:, 1]
            for gap in GAPS:
                own = margins[gaps == gap]
                worst = own[np.abs(own - gap).argmax()]
                results[loss].setdefault(str(gap), []).append([float(own.mean()), float(worst)])
    return {"steps": thirds, "losses": results}


def table(found: dict[str, Any]) -> str:
    """Of Markdown: the mean, and the pair furthest from the reward gap."""
    steps = [f"{step:,} steps" for step in found["steps"]]
    lines = [f"| loss | reward gap | {' | '.join(steps)} |", "|---|---|" + "---|" * len(steps)]
    for loss, gaps in found["losses"].items():
        for gap, values in gaps.items():
            cells = [f"{mean:.3f} (furthest {worst:.3f})" for mean, worst in values]
            lines.append(f"| `{loss}` | {gap} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--losses", default=",".join(LOSSES))
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    found = measure(given.dir, given.steps, given.losses.split(","))
    (given.dir / "results.json").write_text(json.dumps(found, indent=2))
    print(table(found))


if __name__ == "__main__":
    main()
