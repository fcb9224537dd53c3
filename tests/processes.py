"""A warm pool of gloo processes with torch loaded, so that a layout costs seconds.

`pool.run(n, function, *args)` runs a module-level function on n ranks inside a fresh process group
and returns their results by rank. A failure on a rank fails the test with that rank's traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "numpy"]
PRELOAD += ["bevatron.train.trainer", "bevatron.train.training_loop", "bevatron.cli.main"]
TIMEOUT_S = 900  # of a rank that hangs
RUNS = 10  # gloo leaves three threads per process group behind, which wake up for ever


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        store, rank, world, function, args = job
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world
            )
            try:
                outcome = (function(*args), None)
            finally:
                dist.destroy_process_group()
        except BaseException:
            outcome = (None, traceback.format_exc())
        pipe.send(outcome)


class Pool:
    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.workers: list[tuple[Any, Connection]] = []
        self.runs = 0
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def _grow(self, n: int) -> None:
        while len(self.workers) < n:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if self.runs == RUNS:
            self.close()
        self.runs += 1
        self._grow(world)
        with tempfile.TemporaryDirectory(prefix="store-") as folder:
            return self._run(Path(folder), world, function, *args)

    def _run(self, folder: Path, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        workers = self.workers[:world]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((folder / "store", rank, world, function, args))
        outcomes = []
        failures = []
        for rank, (process, pipe) in enumerate(workers):
            if not pipe.poll(TIMEOUT_S if not failures else 10):
                failures.append(f"rank {rank} did not answer within {TIMEOUT_S} s")
                continue
            try:
                value, failure = pipe.recv()
            except EOFError:
                process.join()
                failures.append(f"rank {rank} died with status {process.exitcode}")
                continue
            outcomes.append(value)
            if failure:
                failures.append(f"rank {rank}:\n{failure}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return outcomes

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers, self.runs = [], 0
