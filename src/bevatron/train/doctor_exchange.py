"""The part of `bevatron doctor` that runs on every rank and measures how the ranks communicate.

It makes four exchanges, checks every element of the results, and measures their time. `python -m
bevatron.train.doctor_exchange TIMEOUT_S PARENT` is one rank; torchrun's environment variables say
which.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.errors import BevatronError
from bevatron.parallel.process_groups import default_device, world
from bevatron.train.processes_and_signals import end_with_parent

SIZES = {"1 KiB": 2**10, "64 MiB": 2**26}
REPEATS = {"1 KiB": 20, "64 MiB": 3}


def measure(device: torch.device) -> dict[str, Any]:
    """Inside a process group: check and time all exchanges. The same on every rank but for noise.

    Returns exchange -> size -> `us` (median of a call) and `gb_per_s` (the size over that time).
    Raises a BevatronError if a result is wrong."""
    out: dict[str, Any] = {}
    for name, exchange in EXCHANGES.items():
        out[name] = {}
        for size, count in SIZES.items():
            ranks = dist.get_world_size()
            x = torch.zeros(count // 4 // ranks * ranks, device=device)
            seconds = []
            for _ in range(REPEATS[size] + 1):  # the first connects
                x.fill_(dist.get_rank() + 1)
                dist.barrier()
                began = time.perf_counter()
                right = exchange(x)
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                seconds.append(time.perf_counter() - began)
                if not right():
                    raise BevatronError(f"{name} of {size} gave a wrong result on this rank")
            took = median(seconds[1:])
            out[name][size] = {"us": 1e6 * took, "gb_per_s": x.numel() * 4 / took / 1e9}
    return out


# Each takes this rank's tensor, filled with rank + 1, starts the exchange and waits for it; what it
# returns looks at the result afterwards, untimed.
Check = Callable[[], bool]


def _all_reduce(x: Tensor) -> Check:
    n = dist.get_world_size()
    dist.all_reduce(x)
    return lambda: bool((x == n * (n + 1) / 2).all())


def _all_gather(x: Tensor) -> Check:
    n, part = dist.get_world_size(), x[: x.numel() // dist.get_world_size()].clone()
    dist.all_gather_into_tensor(x, part)
    return lambda: all(bool((p == i + 1).all()) for i, p in enumerate(x.chunk(n)))


def _reduce_scatter(x: Tensor) -> Check:
    n = dist.get_world_size()
    part = torch.empty(x.numel() // n, device=x.device)
    dist.reduce_scatter_tensor(part, x)
    return lambda: bool((part == n * (n + 1) / 2).all())


def _send_receive(x: Tensor) -> Check:
    n, rank = dist.get_world_size(), dist.get_rank()
    got = torch.empty_like(x)
    after, before = (rank + 1) % n, (rank - 1) % n
    if n == 1:
        return lambda: True
    ops = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, got, before)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return lambda: bool((got == before + 1).all())


EXCHANGES: dict[str, Callable[[Tensor], Check]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "send and receive": _send_receive,
}


def measured(timeout_s: float) -> dict[str, Any]:
    """As a rank of a job: join it, measure, leave."""
    device = default_device()
    if device.type != "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if torch.accelerator.device_count() < here:  # more processes than devices
            device = torch.device("cpu")
    with world(device, timeout_s):
        backend, ranks = dist.get_backend(), dist.get_world_size()
        return {"backend": backend, "ranks": ranks, "exchanges": measure(device)}


def main() -> None:
    """One rank; rank 0 prints a JSON object. A failure is one line on stderr."""
    end_with_parent(int(sys.argv[2]))
    try:
        result = measured(float(sys.argv[1]))
    except Exception as error:
        print(f"rank {os.environ['RANK']}: {_first_line(error)}", file=sys.stderr, flush=True)
        os._exit(1)
    if os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)
    os._exit(0)  # gloo's threads may outlive the interpreter's teardown


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
