"""Reinforcement learning on sums: what a model of a million parameters gains, and what it does not.

    OMP_NUM_THREADS=1 python benchmarks/rl_sums.py --dir DIR [--steps 150] [--losses grpo,rloo,...]
                                                   [--loss-steps 40]

A model that reads and writes single characters is pretrained on sums ("37+45=82") whose answers are
often wrong: where something is carried, it is forgotten 7 times in 10; elsewhere a digit is off
3 times in 10. One pair of numbers in ten is held out, from pretraining and from what follows. The
measure is pass@1 on the held-out sums, greedy and drawn at temperature 1.

Then the same model learns by rewards alone, 16 prompts x 8 answers a step: once with the right ones
(1 for the right sum, 0 otherwise), and once with the same rewards given to other answers (each
step's are shuffled), which must gain nothing. Other losses by name take a shorter run each.

Everything is done with the commands that a user has. Runs that are done are not repeated; the
results are printed and written to DIR/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from real_text import bevatron

from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.spec.count import parameter_count
from bevatron.spec.json import to_json

CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<end>")
NUMBERS, HELD_OUT, SEED = 100, 10, 0
LENGTH = 12  # "99+99=198" and the end
WIDTH, DEPTH = 128, 5
PRETRAIN_STEPS, PRETRAIN_BATCH, WINDOW = 700, 16, 128
PROMPTS, SAMPLES = 16, 8

Pair = tuple[int, int]


def model() -> ModelSpec:
    """About a million parameters."""
    layer = LayerSpec(Attention(4, 4, 32), MLP(344))
    return ModelSpec(
        vocab_size=len(CHARACTERS) + len(SPECIAL),
        hidden_size=WIDTH,
        layers=(layer,) * DEPTH,
        max_position_embeddings=256,
    )


def pairs() -> tuple[list[Pair], list[Pair]]:
    """All pairs of numbers below 100: those to learn from, and those held out."""
    every = [(a, b) for a in range(NUMBERS) for b in range(NUMBERS)]
    random.Random(SEED).shuffle(every)
    cut = len(every) // HELD_OUT
    return every[cut:], every[:cut]


def noisy(a: int, b: int, rng: random.Random) -> int:
    """The sum as the text has it."""
    if a % 10 + b % 10 >= 10:
        return a + b - 10 if rng.random() < 0.7 else a + b
    return max(0, a + b + rng.choice((-1, 1, 10))) if rng.random() < 0.3 else a + b


def text(learned: Sequence[Pair], epochs: int) -> Iterator[str]:
    """Sums with noisy answers, each pair once an epoch."""
    rng, order = random.Random(SEED), list(learned)
    for _ in range(epochs):
        rng.shuffle(order)
        yield from (f"{a}+{b}={noisy(a, b, rng)}" for a, b in order)


def write_tokenizer(folder: Path) -> None:
    """One id for each character; nothing is merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "pad_token": "<pad>",
        "eos_token": "<end>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def prepare(folder: Path) -> None:
    """Tokenizer, spec, noisy sums as a token store, and problems (prompt, answer) to learn from and
    held out."""
    learned, held_out = pairs()
    write_tokenizer(folder / "tokenizer")
    (folder / "spec.json").write_text(to_json(model()))
    per_epoch = sum(len(line) + 1 for line in text(learned, 1))
    epochs = -(-PRETRAIN_STEPS * PRETRAIN_BATCH * WINDOW // per_epoch)
    lines = (json.dumps({"text": line}) for line in text(learned, epochs))
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    for name, part in (("problems", learned), ("held-out", held_out)):
        rows = ({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in part)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bevatron(folder, "tokenize", "sums.jsonl", "tokens", "--tokenizer", "tokenizer")


def pretrain(folder: Path) -> None:
    """Noisy sums by `bevatron train`, then an export to begin from."""
    config = {
        "model": {"spec": "spec.json"},
        "tokenizer": "tokenizer",
        "data": {"train": [{"path": "tokens"}], "seq_len": WINDOW, "document_mask": True},
        "train": {
            "steps": PRETRAIN_STEPS,
            "global_batch": PRETRAIN_BATCH,
            "micro_batch": PRETRAIN_BATCH,
            "precision": "fp32",
        },
        "optimizer": {"lr": 2.0e-3, "betas": [0.9, 0.98], "weight_decay": 0.0},
        "schedule": {"name": "cosine", "warmup_steps": 50, "min_lr": 1.0e-4},
        "checkpoint": {"every": PRETRAIN_STEPS, "keep": 1},
        "run": {"dir": "pretrained"},
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(config))
    bevatron(folder, "train", "pretrain.yaml")
    bevatron(folder, "export", "pretrained", "model")


def pass_at_1(folder: Path, checkpoint: str, draws: int = 4) -> dict[str, float]:
    """The share of held-out sums that are right: greedy, and drawn at temperature 1."""
    from bevatron.generate.engine import Engine
    from bevatron.generate.request import Request, Sampling

    rows = [json.loads(line) for line in (folder / "held-out.jsonl").read_text().splitlines()]
    found = {}
    with Engine.open(folder / checkpoint, max_batch=64) as engine:
        encode, end = engine.tokenizer.encode, engine.tokenizer.token_to_id("<end>")
        prompts = [tuple(encode(row["prompt"]).ids) for row in rows]
        for name, temperature, times in (("greedy", 0.0, 1), ("sampled", 1.0, draws)):
            requests = [
                Request(
                    prompt,
                    LENGTH,
                    sampling=Sampling(temperature=temperature, seed=i),
                    stop_tokens=frozenset((end,)),
                )
                for i, prompt in enumerate(prompts * times)
            ]
            answers = engine.complete(requests)
            right = [a.text == row["answer"] for a, row in zip(answers, rows * times, strict=True)]
            found[name] = sum(right) / len(right)
    return found


def learn(folder: Path, loss: str, steps: int, reward: str) -> dict[str, float]:
    """GRPO, or another loss, on the sums that are not held out; pass@1 afterwards."""
    name = f"{loss}-{reward}-{steps}"
    config = {
        "model": {"init": "model"},
        "objective": {
            "name": "grpo",
            "loss": loss,
            "rewards": [{"name": "python", "path": __file__, "function": reward}],
            "num_generations": SAMPLES,
            "max_completion_length": LENGTH,
            "engine": {"max_batch": PROMPTS * SAMPLES},
        },
        "data": {"train": [{"path": "problems.jsonl"}], "seq_len": 18},
        "train": {
            "steps": steps,
            "global_batch": PROMPTS * SAMPLES,
            "micro_batch": PROMPTS * SAMPLES,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1.0e-4, "betas": [0.9, 0.99], "weight_decay": 0.0},
        "schedule": {"name": "cosine", "warmup_steps": 10, "min_lr": 2.0e-5},
        "checkpoint": {"every": 10_000, "keep": 1},
        "run": {"dir": name},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    if not (folder / name / f"step-{steps:08d}").exists():
        bevatron(folder, "train", f"{name}.yaml")
    lines = [
        json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    apart = max(line["sampling/sampling_logp_difference/max"] for line in lines)
    return pass_at_1(folder, name) | {"logp_difference": apart}


def right(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the right sum, 0 otherwise."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def shuffled(
    prompts: list[str], completions: list[str], answer: list[str], **_: Any
) -> list[float]:
    """As many rewards, given to answers by chance."""
    rewards = right(prompts, completions, answer)
    random.Random("".join(completions)).shuffle(rewards)
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--losses", default="rloo,dr_grpo,cispo,gspo,reinforce")
    parser.add_argument("--loss-steps", type=int, default=60)
    parser.add_argument("--only-pretrain", action="store_true")
    args = parser.parse_args()
    folder: Path = args.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{parameter_count(model()):,} parameters", flush=True)
    if not (folder / "tokens").exists():
        prepare(folder)
    if not (folder / "model").exists():
        pretrain(folder)
    results: dict[str, Any] = {}

    def found(name: str, what: dict[str, float]) -> None:
        results[name] = what
        print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in what.items()), flush=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    found("pretrained", pass_at_1(folder, "model"))
    if args.only_pretrain:
        return
    for reward in ("right", "shuffled"):
        began = cpu_seconds()
        found(
            f"grpo, {reward} rewards, {args.steps} steps", learn(folder, "grpo", args.steps, reward)
        )
        print(f"  {cpu_seconds() - began:.0f} CPU-seconds", flush=True)
    for loss in [name for name in args.losses.split(",") if name]:
        found(f"{loss}, {args.loss_steps} steps", learn(folder, loss, args.loss_steps, "right"))


def cpu_seconds() -> float:
    """Of the commands that were run."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
