"""The tour: each step prints the command that a user would type, and runs exactly that."""

from __future__ import annotations

import filecmp
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bevatron.demo.materials import copy_text, make_model
from bevatron.errors import BevatronError

MARK = ".bevatron-demo"
PROMPT = "def read(self, size=-1):"
RUN_YAML = """\
model: {{init: native}}
data:
  train: [{{path: tokens, weight: 1.0}}]
  seq_len: 128
parallel: {{tp: 2, pp: 2}}
train: {{steps: {steps}, global_batch: 16, micro_batch: 4, precision: fp32, seed: 0}}
optimizer: {{name: adamw, lr: 3.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip_grad: 1.0}}
schedule: {{name: constant, warmup_steps: 10}}
checkpoint: {{keep: 2}}
run: {{dir: run}}
"""


class Tour:
    """Runs commands in the demo's folder and remembers how long each took."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.times = folder, dict[str, float]()

    def title(self, number: int, text: str) -> None:
        print(f"\n\033[1m{number}. {text}\033[0m" if sys.stdout.isatty() else f"\n{number}. {text}")

    def bevatron(self, *arguments: str, quiet: bool = False) -> str:
        """Show and run `bevatron ...`; returns its stdout. A failure ends the demo."""
        print(f"   $ bevatron {shlex.join(arguments)}", flush=True)
        began = time.perf_counter()
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(
            [sys.executable, "-m", "bevatron", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        self.times[arguments[0]] = self.times.get(arguments[0], 0) + time.perf_counter() - began
        if done.stdout and not quiet:
            print("".join(f"   {line}\n" for line in done.stdout.splitlines()), end="", flush=True)
        if done.returncode:
            raise BevatronError(
                f"`bevatron {arguments[0]}` ended with {done.returncode}; see above"
            )
        return done.stdout


def demo(source: str | None, folder: Path, *, steps: int, overwrite: bool = False) -> None:
    """Convert, train in 3D, resume at another layout, export, verify and generate.

    Args:
        source: an HF folder or Hub id to start from; a small random Llama is made without one.
        steps: training steps at each of the two layouts.
    """
    began = time.perf_counter()
    folder = folder.absolute()
    if folder.exists():
        if not overwrite:
            raise BevatronError(f"{folder}: already exists; name another --dir, or --overwrite")
        if not (folder / MARK).is_file() and any(folder.iterdir()):
            raise BevatronError(f"{folder}: was not made by the demo, so it is kept; name another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("Made by `bevatron demo`, which may delete this folder again.\n")
    tour = Tour(folder)
    print(f"Everything goes into {folder}. Commands are run there.")

    tour.title(1, "Real text and a Hugging Face model")
    size = copy_text(folder / "text")
    print(f"   text/: {size / 1e6:.1f} MB of Python's own library and documentation")
    model = _source(source, folder)

    tour.title(2, "Convert, and prove that nothing was lost")
    tour.bevatron("import", model, "native")
    tour.bevatron("inspect", "native")
    tour.bevatron("export", "native", "back")
    print(f"   $ diff -r {model} back\n   {_same(folder, model)}")

    tour.title(3, "Tokenize")
    tour.bevatron("tokenize", "text", "tokens", "--tokenizer", model)

    tour.title(4, f"Train {steps} steps with 2-way tensor x 2-way pipeline parallelism")
    (folder / "run.yaml").write_text(RUN_YAML.format(steps=steps))
    print(
        "   run.yaml:\n" + "".join(f"     {x}\n" for x in RUN_YAML.format(steps=steps).splitlines())
    )
    tour.bevatron("train", "run.yaml", "--nproc", "4")

    tour.title(5, f"Resume the same run as 2-way FSDP x 2-way tensor parallel, {steps} steps more")
    tour.bevatron("train", "run.yaml", "--nproc", "4", "parallel.pp=1", f"train.steps={2 * steps}")
    vocabulary = json.loads((folder / "tokens" / "store.json").read_text())["vocab_size"]
    first, last = _show_losses(folder / "run" / "metrics.jsonl", steps, vocabulary)
    if not last < first:
        raise BevatronError(f"the loss did not fall: {first:.3f} at first, {last:.3f} at last")

    tour.title(6, "Export to Hugging Face and verify against stock transformers")
    tour.bevatron("export", "run", "trained")
    tour.bevatron("verify", "run", "trained")

    tour.title(7, "Generate, here and in transformers")
    out = json.loads(
        tour.bevatron(
            "generate", "run", "--prompt", PROMPT, "--max-new-tokens", "32", "--temperature", "0",
            "--json", quiet=True,
        )
    )  # fmt: skip
    print("".join(f"   | {line}\n" for line in (PROMPT + out["text"]).splitlines()), end="")
    theirs = _transformers_tokens(folder / "trained", 32)
    print(f"   stock transformers continues with the same tokens: {theirs == out['tokens']}")
    if theirs != out["tokens"]:
        raise BevatronError("transformers generated other tokens from the export; please report")

    seconds = ", ".join(f"{name} {t:.0f} s" for name, t in tour.times.items())
    print(f"\nDone in {time.perf_counter() - began:.0f} s ({seconds}).")
    print(f"Loss {first:.2f} -> {last:.2f}. Next: bevatron generate {folder / 'run'} --prompt ...")


def _source(source: str | None, folder: Path) -> str:
    """The HF folder to start from, as the commands will name it."""
    if source is not None:
        return str(Path(source).absolute()) if Path(source).exists() else source
    make_model(folder / "text", folder / "model")
    names = ", ".join(sorted(p.name for p in (folder / "model").iterdir()))
    print(f"   model/: a small random Llama, saved by transformers ({names})")
    return "model"


def _same(folder: Path, model: str) -> str:
    """What `diff -r` says of the source and the exported folder."""
    if not (folder / model).is_dir():
        return f"(skipped: {model} came from the Hub)"
    names = sorted(p.relative_to(folder / model) for p in (folder / model).rglob("*"))
    files = [str(n) for n in names if (folder / model / n).is_file()]
    equal, other, failed = filecmp.cmpfiles(folder / model, folder / "back", files, shallow=False)
    extra = [p for p in (folder / "back").rglob("*") if p.is_file()]
    if other or failed or len(extra) != len(files):
        raise BevatronError(f"the exported folder differs: {', '.join(other + failed)}")
    return f"(no differences: {len(equal)} files, byte for byte)"


def _show_losses(path: Path, steps: int, vocabulary: int) -> tuple[float, float]:
    """Draw the loss over all steps; returns the first and the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    top, low, rows, width = max(losses), min(losses), 8, 60
    columns = [losses[i * len(losses) // width] for i in range(width)]
    for row in range(rows):
        upper = top - (top - low) * row / rows
        lower = top - (top - low) * (row + 1) / rows
        bar = "".join("*" if lower <= x <= upper else " " for x in columns)
        print(f"   {upper:5.2f} |{bar}")
    mark = width * steps // len(losses)
    print(f"         +{'-' * mark}^{'-' * (width - mark - 1)} step {len(losses)}")
    print(f"          {' ' * mark}resumed at the other layout")
    tail = losses[-5:]
    print(f"   loss {losses[0]:.3f} -> {sum(tail) / len(tail):.3f} nats (a uniform guess: ", end="")
    print(f"{math.log(vocabulary):.2f})")
    return losses[0], sum(tail) / len(tail)


def _transformers_tokens(folder: Path, count: int) -> list[int]:
    """The same greedy completion by stock transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, do_sample=False)
    return [int(t) for t in out[0, ids.shape[1] :]]
