"""Running a function on several processes, as theirs is called."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(world_size: int) -> Callable[..., Callable[..., None]]:
    """`run_distributed(2)(function)(*arguments)`: the function, which takes its rank first, on
    two ranks of a gloo group."""

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                meeting = str(Path(folder) / "meeting")
                mp.spawn(_rank, (world_size, meeting, function, arguments), nprocs=world_size)

        return run

    return wrap


def _rank(rank: int, world: int, meeting: str, function: Callable[..., None], args: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
