"""The processes of a run: device, backend and process group, decided once at the edge."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bevatron.parallel.layout import Layout, LayoutError

MESH_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def default_device() -> torch.device:
    """This process's accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def world(device: torch.device, timeout_s: float = 1800.0) -> Iterator[None]:
    """The process group for the duration: from torchrun's environment, or of one process."""
    if dist.is_initialized():
        yield
        return
    _start(device, timeout_s)
    try:
        yield
    finally:
        dist.destroy_process_group()


def join_world(device: torch.device, timeout_s: float = 1800.0) -> None:
    """The process group from here to the end of the process, for a script that is no one's
    callee; leaves an existing one alone."""
    if not dist.is_initialized():
        _start(device, timeout_s)
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():  # the script may have ended it itself
        dist.destroy_process_group()


def _start(device: torch.device, timeout_s: float) -> None:
    backend = "gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)


def mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The grid of ranks, `tp` innermost."""
    if layout.world_size != dist.get_world_size():
        raise LayoutError(
            f"the layout {layout} needs {layout.world_size} processes, {dist.get_world_size()} "
            "are running; start as many, or change parallel.*"
        )
    sizes = tuple(getattr(layout, name) for name in MESH_DIMS)
    return init_device_mesh(device.type, sizes, mesh_dim_names=MESH_DIMS)
