"""What a parallel layout costs on one machine over gloo: CPU and wall seconds of a training step.

    python benchmarks/layouts.py [--steps 8] [--rounds 2]

`bevatron train` on random tokens, in fp32, one thread per process; on a machine with as many cores
as processes a layout without any cost would take the CPU-seconds of one process, and wall seconds
divided by the number of processes. A layout is run twice, with few and with more steps, and a step
is their difference, so that starting costs nothing; layouts take turns. There is no limit to be
measured here but that one process: what is above it is communication, waiting (gloo's threads
poll) and work done twice.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bevatron.data.token_store_writer import StoreWriter

LAYOUTS = {
    "one process": (1, []),
    "tp 2, sequence parallel": (2, ["parallel.tp=2"]),
    "pp 2, 1f1b": (2, ["parallel.pp=2"]),
    "pp 2, zbv": (2, ["parallel.pp=2", "parallel.schedule=zbv"]),
    "dp_shard 2": (2, ["parallel.dp_shard=2"]),
    "dp_replicate 2": (2, ["parallel.dp_replicate=2", "parallel.dp_shard=1"]),
    "cp 2": (2, ["parallel.cp=2"]),
    "tp 2 x pp 2 x dp_shard 2": (8, ["parallel.tp=2", "parallel.pp=2", "parallel.dp_shard=2"]),
}
VOCAB, HIDDEN, SEQ_LEN, BATCH = 8192, 256, 256, 8


def prepare(folder: Path) -> None:
    """A token store and the model's description."""
    from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
    from bevatron.spec.json import to_json

    store = folder / "tokens"
    store.mkdir()
    writer = StoreWriter(store, VOCAB, None)
    ids = np.random.default_rng(0).integers(0, VOCAB, 400_000)
    writer.add(ids.tolist(), ends=True)
    writer.finish(tokenizer="random", fingerprint="xxh3:0")
    layer = LayerSpec(Attention(4, 2, 64), MLP(704))
    spec = ModelSpec(vocab_size=VOCAB, hidden_size=HIDDEN, layers=(layer,) * 8)
    (folder / "spec.json").write_text(to_json(spec))
    data = {"train": [{"path": str(store)}], "seq_len": SEQ_LEN}
    config = {
        "model": {"spec": str(folder / "spec.json")},
        "data": data,
        "train": {"steps": 1, "global_batch": BATCH, "micro_batch": 1, "precision": "fp32"},
        "optimizer": {"lr": 1e-4},
        "run": {"dir": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML


def run(folder: Path, name: str, steps: int) -> tuple[float, float]:
    """CPU and wall seconds of a whole run."""
    count, parts = LAYOUTS[name]
    with tempfile.TemporaryDirectory(dir=folder) as target:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "bevatron", "train", str(folder / "run.yaml")]
        command += ["--nproc", str(count), f"train.steps={steps}", f"run.dir={target}/run", *parts]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        for _ in range(options.rounds):
            for name, pairs in taken.items():
                few, many = run(folder, name, 2), run(folder, name, 2 + options.steps)
                pairs.append(
                    ((many[0] - few[0]) / options.steps, (many[1] - few[1]) / options.steps)
                )
    print(
        f"8 layers of {HIDDEN}, vocabulary {VOCAB}, {BATCH} sequences of {SEQ_LEN}, fp32; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':<26} CPU-s/step  of one process  wall-s/step")
    base = statistics.median(cpu for cpu, _ in taken["one process"])
    for name, pairs in taken.items():
        cpu, wall = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:<26} {cpu:>10.2f}  {cpu / base:>13.2f}x  {wall:>11.2f}")


if __name__ == "__main__":
    main()
