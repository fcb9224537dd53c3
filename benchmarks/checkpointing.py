"""How long training stands still for a checkpoint, beside torch.distributed.checkpoint (DCP).

    python benchmarks/checkpointing.py --dir DIR [--rounds 5] [--tables 0]

One process, a Llama of 58M parameters in fp32 with its moments, on the CPU. The
contenders take turns in one process, on the same state. `blocked` is the time inside the call that
saves; `steps` is the median time of the training steps that are done while the rest is written,
and `whole` the time from the call until everything is on the disk and committed. Bevatron hashes
every tensor as well, which DCP does not.

`--tables RANKS` measures instead what rank 0 does at the end of a save by so many ranks: joining
their tables and making the manifest, for Llama-3-70B at pp 16 x tp 8 x FSDP over the rest.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from bevatron.checkpoint import rank_tables
from bevatron.checkpoint.manifest import Chunk, TensorEntry, read_manifest
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.families.published_models import preset
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh, world
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import Pretrain
from bevatron.train.run_start import Start
from bevatron.train.save_steps import Saver
from bevatron.train.trainer import Trainer

SPEC = ModelSpec(32000, 512, (LayerSpec(Attention(8, 4, 64), MLP(1408)),) * 8)
SEQ_LEN = 128
CPU = torch.device("cpu")


def configured(run: Path, is_async: bool) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"spec": "s"},
            "data": {"train": [{"path": "t"}], "seq_len": SEQ_LEN},
            "train": {"steps": 1000, "global_batch": 1, "precision": "fp32"},
            "optimizer": {"lr": 1e-4},
            "checkpoint": {"async": is_async, "keep": 1},
            "run": {"dir": str(run)},
        }
    )


class Contest:
    """The contenders: each saves once and goes on training until it is written."""

    def __init__(self, folder: Path) -> None:
        config = configured(folder / "run", True)
        layout = Layout()
        self.trainer = Trainer(
            SPEC, layout, mesh(layout, CPU), Pretrain(), seq_len=SEQ_LEN, train=config.train,
            optimizer=config.optimizer, device=CPU,
        )  # fmt: skip
        self.trainer.fill_random(0)
        self.folder, self.number = folder, 0
        start = Start(SPEC, None, None, "llama")
        self.savers = {}
        for name, is_async in (("bevatron", False), ("bevatron, async", True)):
            run = RunFolder(folder / name.replace(", ", "-"))
            run.path.mkdir()
            saver = Saver(configured(run.path, is_async), start, run, self.trainer)
            self.savers[name] = saver

    def step(self) -> float:
        began = time.perf_counter()
        ids = torch.randint(SPEC.vocab_size, (1, SEQ_LEN + 1))
        self.trainer.step({"tokens": ids}, 1e-4)
        return time.perf_counter() - began

    def bevatron(self, name: str) -> tuple[float, list[float], float]:
        saver, began = self.savers[name], time.perf_counter()
        self.number += 1
        saver.save(self.number, 0)
        blocked, steps = time.perf_counter() - began, []
        while saver.in_flight is not None and not saver.in_flight.committing.done(0):
            steps.append(self.step())
        saver.wait()
        return blocked, steps, time.perf_counter() - began

    def dcp(self, name: str) -> tuple[float, list[float], float]:
        target = self.folder / "dcp"
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        state: dict[str, Any] = {t.name: t.values.to(t.dtype) for t in self.trainer.to_save()}
        steps: list[float] = []
        if name == "DCP":
            dcp.save(state, checkpoint_id=target)
            return time.perf_counter() - began, steps, time.perf_counter() - began
        future: Any = dcp.async_save(state, checkpoint_id=target)
        blocked = time.perf_counter() - began
        while not future.done():
            steps.append(self.step())
        future.result()
        return blocked, steps, time.perf_counter() - began


def contest(folder: Path, rounds: int) -> None:
    found = Contest(folder)
    todo: dict[str, Callable[[str], tuple[float, list[float], float]]] = {
        "bevatron": found.bevatron, "bevatron, async": found.bevatron,
        "DCP": found.dcp, "DCP, async": found.dcp,
    }  # fmt: skip
    results: dict[str, list[tuple[float, list[float], float]]] = {name: [] for name in todo}
    alone = [found.step() for _ in range(6)][1:]
    for number in range(rounds + 1):
        for name, act in todo.items():
            result = act(name)
            if number:  # the first fills buffers and memory
                results[name].append(result)
        alone += [found.step() for _ in range(3)]
    nbytes = sum(t.values.numel() * t.dtype.itemsize for t in found.trainer.to_save())
    print(f"{nbytes / 1e6:.0f} MB, medians of {rounds} rounds")
    print(f"a step without a save: {statistics.median(alone):.2f} s\n")
    print("| | blocked s (all rounds) | steps meanwhile: s each | whole s |\n|---|---|---|---|")
    for name, every in results.items():
        blocked = statistics.median(r[0] for r in every)
        shown = ", ".join(f"{r[0]:.2f}" for r in every)
        steps = [s for r in every for s in r[1]]
        each = f"{statistics.median(steps):.2f} ({len(steps)})" if steps else ""
        whole = statistics.median(r[2] for r in every)
        print(f"| {name} | {blocked:.2f} ({shown}) | {each} | {whole:.2f} |")


def joined(folder: Path, ranks: int) -> None:
    """Tables of many ranks, made up, and what rank 0 then does with them."""
    spec, shards = preset("llama3-70b"), ranks // 16
    stages = [
        range(i * len(spec.layers) // 16, (i + 1) * len(spec.layers) // 16) for i in range(16)
    ]
    names = [[p for i in stage for p in spec.layer_parameters(i)] for stage in stages]
    kinds = ("model", "optimizer/master", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    (folder / rank_tables.FOLDER).mkdir()
    (folder / "optimizer").mkdir()
    for rank in range(ranks):
        stage, part = divmod(rank, shards)
        file = f"optimizer/rank-{rank:05d}.safetensors"
        (folder / file).touch()
        entries = {}
        for kind in kinds:
            for p in names[stage]:
                low, high = (part + k for k in (0, 1))
                rows = (p.numel * low // shards, p.numel * high // shards)
                chunk = Chunk((rows[0],), (rows[1] - rows[0],), file, 0, f"xxh3:{rank:032x}")
                entries[f"{kind}/{p.name}"] = TensorEntry("F32", (p.numel,), (chunk,))
        rank_tables.leave_table(folder, rank, entries)
    began, cpu = time.perf_counter(), time.process_time()
    rank_tables.wait_for_tables(folder, ranks, threading.Event())
    merged = rank_tables.merge_tables(folder, ranks, "llama", 1)
    (folder / "manifest.json").write_text(merged.to_json())
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    size = (folder / "manifest.json").stat().st_size / 1e6
    chunks = sum(len(row.chunks) for row in merged.tensors.values())
    print(f"{ranks} ranks, {len(merged.tensors)} tensors, {chunks} chunks, {size:.0f} MB manifest")
    print(f"join and write: {wall:.1f} s, {spent:.1f} CPU s")
    began, cpu = time.perf_counter(), time.process_time()
    read_manifest(folder)
    wall, spent = time.perf_counter() - began, time.process_time() - cpu
    print(f"read and check: {wall:.1f} s, {spent:.1f} CPU s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tables", type=int, default=0, metavar="RANKS")
    options = parser.parse_args()
    work = options.dir / "bevatron-checkpointing"
    work.mkdir(parents=True)
    try:
        if options.tables:
            joined(work, options.tables)
            return
        with world(CPU):
            contest(work, options.rounds)
            dist.barrier()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
