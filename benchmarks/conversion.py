"""Conversion beside `cp` and beside transformers, on a random Llama-3.2-1B-shaped checkpoint.

    python benchmarks/conversion.py --dir /tmp/conversion [--rounds 3] [--no-transformers]

Every measurement is a fresh process; the contenders take turns, so that a slow minute of the
machine hits all of them. Bevatron syncs what it writes to the disk, as a checkpoint must be, and
neither `cp` nor transformers does; so `cp, synced` stands beside it. Memory is the peak RSS of
the process. The page cache is warm. Needs 8 GB of disk in --dir, which is emptied afterwards.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bevatron.checkpoint.safetensors_file import write_header
from bevatron.families.family import by_name

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}

CONVERT = "from bevatron.bridge.convert import {name} as f; f({a!r}, {b!r})"
TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM as A; import torch; "
    "A.from_pretrained({a!r}, dtype=torch.bfloat16).save_pretrained({b!r})"
)


def make(folder: Path) -> int:
    """Write the checkpoint, a tensor at a time; its bytes."""
    family = by_name("llama")
    sources = [s for e in family.weight_map(family.spec(CONFIG)) for s in e.sources]
    sources.sort(key=lambda s: s.name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        table = [(s.name, "BF16", s.shape) for s in sources]
        file.write(write_header(table, {"format": "pt"}))
        for source in sources:
            values = random.standard_normal(source.shape, dtype="f4") * np.float32(0.02)
            file.write((values.view("u4") >> 16).astype("u2").tobytes())
    return (folder / "model.safetensors").stat().st_size


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in MB of one process and its children."""
    shell = "import resource, subprocess, sys, json; p = subprocess.run(sys.argv[1:], check=True); "
    shell += "r = resource.getrusage(resource.RUSAGE_CHILDREN); "
    shell += "print(json.dumps([r.ru_utime + r.ru_stime, r.ru_maxrss / 1e3]))"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", shell, *command], check=True, stdout=subprocess.PIPE
    )
    wall = time.perf_counter() - start
    cpu, memory = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu, memory


def contenders(work: Path, transformers: bool) -> dict[str, tuple[list[str], Path]]:
    """Name -> command and what it writes, in the order of a round."""
    hf, native, out = work / "hf", work / "native", work / "out"
    python = [sys.executable, "-c"]
    copy = ["cp", "-r", "--reflink=never", str(hf), str(work / "cp")]
    synced = f"cp -r --reflink=never {hf} {work}/cps && sync -f {work}/cps/model.safetensors"
    found = {
        "cp -r": (copy, work / "cp"),
        "cp -r, synced": (["sh", "-c", synced], work / "cps"),
        "bevatron import": (
            [*python, CONVERT.format(name="import_checkpoint", a=str(hf), b=str(native))],
            native,
        ),
        "bevatron export": (
            [*python, CONVERT.format(name="export_checkpoint", a=str(native), b=str(out))],
            out,
        ),
    }
    if transformers:
        saved = work / "saved"
        command = [*python, TRANSFORMERS.format(a=str(hf), b=str(saved))]
        found["transformers load + save"] = (command, saved)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    options = parser.parse_args()
    work = options.dir / "bevatron-conversion"
    if work.exists():
        sys.exit(f"{work}: already exists; remove it or name another --dir")
    try:
        nbytes = make(work / "hf")
        todo = contenders(work, not options.no_transformers)
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in todo}
        for number in range(options.rounds):
            for name, (command, target) in todo.items():
                if target.name != "out":  # export reads what import wrote
                    shutil.rmtree(work / "out", ignore_errors=True)
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
                results[name].append(measure(command))
                print(f"round {number + 1}: {name}: {results[name][-1][0]:.2f} s", file=sys.stderr)
                if target.name == "out":
                    same = filecmp.cmp(
                        work / "hf" / "model.safetensors", target / "model.safetensors", False
                    )
                    print(f"  identical to the source: {same}", file=sys.stderr)
                if target.name not in ("native", "out"):
                    shutil.rmtree(target)
        report(results, nbytes)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def report(results: dict[str, list[tuple[float, float, float]]], nbytes: int) -> None:
    """The table, in Markdown."""
    base = statistics.median(r[0] for r in results["cp -r"])
    print(f"{nbytes / 1e9:.2f} GB, bf16, {os.cpu_count()} cores; medians of rounds\n")
    print("| | wall s (all rounds) | CPU s | peak MB | wall / cp |")
    print("|---|---|---|---|---|")
    for name, rounds in results.items():
        wall, cpu, memory = (statistics.median(r[i] for r in rounds) for i in range(3))
        every = ", ".join(f"{r[0]:.2f}" for r in rounds)
        print(f"| {name} | {wall:.2f} ({every}) | {cpu:.2f} | {memory:.0f} | {wall / base:.2f} |")
    print("\nRepeat with `python benchmarks/conversion.py --dir DIR`.")


if __name__ == "__main__":
    main()
