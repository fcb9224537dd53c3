"""Does a commit compute the same as another one, bit for bit? Convert, train, prune, generate.

    python -m benchmarks.same_numbers [BASE=HEAD~1] [--keep FOLDER]

The same verbs run on the same inputs with the sources of BASE and with those of this checkout, one
after the other: import, export and greedy answers of every family; training at several layouts,
precisions and objectives; pruning. Compared are losses and gradient norms as printed in
metrics.jsonl, hashes of every exported file, and the words of every answer. Prints what differs
and ends with 1 if anything does. No number is stored, as another processor gives others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.generate.engine_models import KINDS, make

ROOT = Path(__file__).parent.parent

RUN = """\
model: {{init: {start}}}
data: {{train: [{{path: ../tokens}}], seq_len: 32}}
train: {{steps: 4, global_batch: 4, micro_batch: 1, precision: {precision}}}
optimizer: {{lr: 1.0e-3{optimizer}}}
schedule: {{name: cosine, warmup_steps: 1}}
checkpoint: {{every: 4}}
run: {{dir: {name}}}
parallel: {{{layout}}}
{more}
"""

DISTIL = "objective: {name: distill, teacher: ../llama-nemotron}"
MUON = ", name: muon"

# name: (start, precision, layout, processes, more, optimizer)
RUNS = {
    "llama": ("../llama", "fp32", "", 1, "", ""),
    "llama-bf16": ("../llama", "bf16", "", 1, "", ""),
    "nanochat-muon": ("../nanochat", "fp32", "", 1, "", MUON),
    "nemotron-tp2": ("../nemotron", "fp32", "tp: 2", 2, "", ""),
    "llama-nemotron-pp2": ("../llama-nemotron", "bf16", "pp: 2", 2, "", ""),
    "tied-shards": ("../three-kv-heads", "fp32", "dp_shard: 2", 2, "", ""),
    "distil": ("../llama", "fp32", "", 1, DISTIL, ""),
    "distil-tp2": ("../llama", "bf16", "tp: 2", 2, DISTIL, ""),
}


def bevatron(source: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bevatron", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{source}: bevatron {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def hashes(folder: Path) -> dict[str, str]:
    """Of all files but what names the time or the place."""
    named = ("bevatron.json", "README.md", "provenance.json")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in named]
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files
    }


def losses(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [f"{d['step']}: {d['loss']!r} {d['grad_norm']!r}" for d in lines if "grad_norm" in d]


def found(source: Path, inputs: Path, work: Path) -> dict[str, object]:
    """Everything that is compared, by name."""
    out: dict[str, object] = {}
    work.mkdir()
    for name in KINDS:
        (work / name).symlink_to(inputs / name)
        native, exported = f"native-{name}", f"exported-{name}"
        bevatron(source, work, "import", name, native)
        bevatron(source, work, "export", native, exported, "--dtype", "bf16")
        out[f"export {name}"] = hashes(work / exported)
        asked = (
            "generate",
            name,
            "--prompt",
            "the quick",
            "--max-new-tokens",
            "24",
            "--temperature",
            "0",
        )
        out[f"answer {name}"] = bevatron(source, work, *asked)
    bevatron(source, work, "tokenize", str(inputs / "text.txt"), "tokens", "--tokenizer", "llama")
    (work / "runs").mkdir()
    for name, (start, precision, layout, processes, more, optimizer) in RUNS.items():
        text = RUN.format(
            name=name,
            start=start,
            precision=precision,
            layout=layout,
            more=more,
            optimizer=optimizer,
        )
        (work / "runs" / f"{name}.yaml").write_text(text)
        many = ("--nproc", str(processes)) if processes > 1 else ()
        bevatron(source, work / "runs", "train", f"{name}.yaml", *many)
        out[f"losses {name}"] = losses(work / "runs" / name)
        bevatron(source, work, "export", f"runs/{name}", f"trained-{name}")
        out[f"trained {name}"] = hashes(work / f"trained-{name}")
    scores = ("importance", "native-llama", "scores.safetensors", "--data", "tokens")
    bevatron(source, work, *scores, "--samples", "8", "--seq-len", "32")
    sizes = ("--scores", "scores.safetensors", "--intermediate-size", "32", "--num-layers", "1")
    bevatron(source, work, "prune", "native-llama", "pruned", *sizes)
    bevatron(source, work, "export", "pruned", "exported-pruned")
    out["pruned"] = hashes(work / "exported-pruned")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("base", nargs="?", default="HEAD~1")
    parser.add_argument("--keep", type=Path, help="a folder, absent as yet, for all that is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = options.keep or Path(made)
        work.mkdir(exist_ok=True)
        base = work / "base"
        git = ("git", "-C", str(ROOT))
        subprocess.run([*git, "worktree", "add", "-q", "--detach", base, options.base], check=True)
        try:
            inputs = work / "inputs"
            inputs.mkdir()
            for name in KINDS:
                make(inputs / name, name)
            (inputs / "text.txt").write_text(Path(json.__file__).read_text())
            before = found(base, inputs, work / "before")
            after = found(ROOT, inputs, work / "after")
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", base], check=True)
    different = [name for name in before if before[name] != after[name]]
    for name in different:
        print(f"{name}:\n  before {before[name]}\n  after  {after[name]}")
    print(f"{len(before) - len(different)} of {len(before)} are the same, bit for bit")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
