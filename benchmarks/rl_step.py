"""A step of reinforcement learning by its parts, beside TRL's GRPOTrainer on the same model.

    OMP_NUM_THREADS=1 python benchmarks/rl_step.py --dir DIR [--shapes sums,15m] [--rounds 7]

Both start from the same weights, answer as many prompts of the same data set with as many samples,
reward them with the same function, and update with the same loss, optimizer and batch. Shapes:

    sums    the model and problems of rl_sums.py, 16 prompts x 8 samples of some 4 tokens
    15m     random weights of hidden 384, 8 layers, 8,192 tokens; 4 prompts of 100 tokens x 8
            samples of 64

TRL generates with transformers' `generate`, which is what it does where vLLM cannot be had.

Each contender is a process of its own that stays warm; they take turns, one step each, so that a
slow minute of the machine hits all of them, and work is counted in CPU-seconds of its process. All
of a step is in one of its parts:

    rollout    sampling the answers; of bevatron, handing the new weights to the engine as well
    logps      log-probabilities of the answers under the policy before the update. bevatron and TRL
               need none where a rollout serves one update (`bevatron`, `trl`); TRL computes them
               where it serves several (`trl-old`: as many answers a step, but
               those of one rollout in two updates)
    update     forward, backward and the optimizer
    other      prompts, rewards, advantages, metrics

The first two rounds warm up and are left out. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

PARTS = ("rollout", "logps", "update", "other")
CONTENDERS = ("bevatron", "trl", "trl-old")
SAMPLES = 8
LR = 1.0e-6
WARM = 2
# shape -> prompts a step, most new tokens, data.seq_len, answers that a forward takes at once
SHAPES = {"sums": (16, 12, 18, 128), "15m": (4, 64, 164, 32)}


class Clock:
    """Seconds by the wall and of this process's CPUs, by part; a part inside of another one is
    taken out of it."""

    def __init__(self) -> None:
        self.open: list[tuple[str, float, float]] = []
        self.spent: dict[str, list[float]] = {}

    def lap(self) -> None:
        """What has passed since the last change of part goes to the part that is open."""
        name, *began = self.open[-1]
        total = self.spent.setdefault(name, [0.0, 0.0])
        now = (time.perf_counter(), time.process_time())
        for i in range(2):
            total[i] += now[i] - began[i]
        self.open[-1] = (name, *now)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.lap()
        self.open.append((name, time.perf_counter(), time.process_time()))
        try:
            yield
        finally:
            self.lap()
            self.open.pop()
            self.open[-1] = (self.open[-1][0], time.perf_counter(), time.process_time())

    def around(self, owner: Any, method: str, name: str) -> None:
        """Count what a method of a class, an object or a module takes as this part."""
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **options: Any) -> Any:
            if not self.open or self.open[-1][0] == name:  # before the first turn, or inside
                return original(*args, **options)
            with self.part(name):
                return original(*args, **options)

        setattr(owner, method, timed)

    def turn(self) -> None:
        """Between two steps: say what the last one took, and wait for the next turn."""
        if self.open:
            self.lap()
        print(json.dumps(self.spent), flush=True)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self.spent = {}
        self.open = [("other", time.perf_counter(), time.process_time())]


def right(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the right sum, 0 otherwise."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def bevatron(folder: Path, shape: str, old: bool) -> None:
    """`bevatron train` in this process."""
    import bevatron.align.rollout_feed as feeds
    from bevatron.generate.live_engine import LiveEngine
    from bevatron.train.config_file import load_config
    from bevatron.train.launch import layout_of, work
    from bevatron.train.trainer import Trainer

    prompts, new, seq_len, micro_batch = SHAPES[shape]
    config = {
        "model": {"init": "model"},
        "objective": {
            "name": "grpo",
            "rewards": [{"name": "python", "path": __file__, "function": "right"}],
            "num_generations": SAMPLES,
            "max_completion_length": new,
            "engine": {"max_batch": prompts * SAMPLES},
        },
        "data": {"train": [{"path": "problems.jsonl"}], "seq_len": seq_len},
        "train": {
            "steps": 10_000,
            "global_batch": prompts * SAMPLES,
            "micro_batch": micro_batch,
            "precision": "fp32",
        },
        "optimizer": {"lr": LR, "betas": [0.9, 0.999], "weight_decay": 0.0},
        "schedule": {"name": "constant"},
        "checkpoint": {"every": 100_000},
        "run": {"dir": "timed"},
    }
    (folder / "timed.yaml").write_text(json.dumps(config))
    clock = Clock()
    clock.around(LiveEngine, "refresh", "rollout")
    clock.around(LiveEngine, "complete", "rollout")
    clock.around(feeds, "log_probabilities_of", "logps")
    clock.around(Trainer, "step", "update")
    batch = feeds.RolloutFeed.batch

    def turned(self: Any, step: int) -> Any:
        clock.turn()
        return batch(self, step)

    feeds.RolloutFeed.batch = turned  # type: ignore[method-assign]
    os.chdir(folder)
    loaded = load_config(Path("timed.yaml"), [])
    work(loaded, layout_of(loaded, 1), allow_changed=False)


def trl(folder: Path, shape: str, old: bool) -> None:
    """TRL's GRPOTrainer, as its documentation has it."""
    import datasets
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    prompts, new, _, micro_batch = SHAPES[shape]
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    answers = prompts * SAMPLES
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=answers // micro_batch,
        steps_per_generation=(2 if old else 1) * answers // micro_batch,
        num_generations=SAMPLES,
        max_completion_length=new,
        max_steps=10_000,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=right,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    clock = Clock()

    class Turns(transformers.TrainerCallback):  # type: ignore[misc]
        """A turn is a rollout and all of its updates."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % (2 if old else 1) == 0:
                clock.turn()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.lap()
            clock.open.append(("update", time.perf_counter(), time.process_time()))

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.lap()
            clock.open.pop()
            clock.open[-1] = (clock.open[-1][0], time.perf_counter(), time.process_time())

    trainer.add_callback(Turns())
    trainer.log = lambda *_, **__: None
    clock.around(trainer, "_generate_single_turn", "rollout")
    clock.around(trainer, "training_step", "update")
    score, per_token = (
        trainer._generate_and_score_completions,
        trainer._get_per_token_logps_and_entropies,
    )

    def scored(*args: Any) -> Any:
        """All but the sampling; log-probabilities apart."""

        def apart(*inner: Any, **options: Any) -> Any:
            with clock.part("logps"):
                return per_token(*inner, **options)

        trainer._get_per_token_logps_and_entropies = apart
        try:
            with clock.part("other"):
                return score(*args)
        finally:
            trainer._get_per_token_logps_and_entropies = per_token

    trainer._generate_and_score_completions = scored
    trainer.train()


def make(folder: Path, shape: str) -> None:
    """A model and problems, unless they are there."""
    if (folder / "model").exists():
        return
    if shape == "sums":
        sys.exit(f"run benchmarks/rl_sums.py --dir {folder} --only-pretrain first")
    import random

    import torch
    import transformers
    from rl_sums import CHARACTERS, write_tokenizer

    write_tokenizer(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = [{"prompt": "".join(rng.choices(CHARACTERS, k=100)), "answer": ""} for _ in range(512)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "problems.jsonl").write_text(text)


class Contender:
    """A warm process."""

    def __init__(self, name: str, folder: Path, shape: str) -> None:
        self.name = name
        command = [sys.executable, __file__, "--dir", str(folder), "--contender", name]
        self.process = subprocess.Popen(
            [*command, "--shapes", shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._line()

    def _line(self) -> dict[str, list[float]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, list[float]] = json.loads(line)
                return found
        sys.exit(f"{self.name} ended with status {self.process.wait()}")

    def step(self) -> dict[str, list[float]]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._line()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def race(folder: Path, shape: str, rounds: int, names: list[str]) -> None:
    runners = [Contender(name, folder, shape) for name in names]
    took: dict[str, list[dict[str, list[float]]]] = {name: [] for name in names}
    try:
        for number in range(WARM + rounds):
            for runner in runners:
                found = runner.step()
                spent = ", ".join(f"{part} {cpu:.2f}" for part, (_, cpu) in sorted(found.items()))
                print(f"{shape} {number} {runner.name}: {spent}", file=sys.stderr, flush=True)
                if number >= WARM:
                    took[runner.name].append(found)
    finally:
        for runner in runners:
            runner.close()

    def median(name: str, part: str, clock: int) -> float:
        """Of a step, or of one of its parts. `trl-old` has two updates a turn."""
        parts = PARTS if part == "step" else (part,)
        turns = [sum(one.get(p, [0.0, 0.0])[clock] for p in parts) for one in took[name]]
        return statistics.median(turns) / (2 if name == "trl-old" else 1)

    print(f"\n{shape}: {SHAPES[shape][0]} prompts x {SAMPLES} samples, {rounds} rounds")
    print("| contender | " + " | ".join((*PARTS, "step")) + " | wall of a step |")
    print("|---|" + "---|" * (len(PARTS) + 2))
    for name in names:
        cells = [f"{median(name, part, 1):.3f}" for part in (*PARTS, "step")]
        print(f"| {name} | " + " | ".join(cells) + f" | {median(name, 'step', 0):.3f} |")
    for other in names[1:]:
        ratios = [f"{part} {ratio:.2f}" for part in ("rollout", "update", "step")
                  if (ratio := median(other, part, 1) / median(names[0], part, 1))]  # fmt: skip
        wall = median(other, "step", 0) / median(names[0], "step", 0)
        print(f"{other} / {names[0]}, CPU-seconds: {', '.join(ratios)}; wall {wall:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--shapes", default="sums,15m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        run: Callable[[Path, str, bool], None] = bevatron if args.contender == "bevatron" else trl
        run(args.dir, args.shapes, args.contender == "trl-old")
        return
    for shape in args.shapes.split(","):
        folder = args.dir.resolve() / shape
        make(folder, shape)
        race(folder, shape, args.rounds, args.only.split(","))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
