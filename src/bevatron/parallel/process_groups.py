"""The processes of a run: device, backend and process group, decided once at the edge."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout, LayoutError

MESH_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def default_device() -> torch.device:
    """This process's accelerator if there is one that can do all of it, else the CPU. Apple's (mps)
    has neither collectives nor FSDP and is taken by name alone."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def choose_device(name: str | None) -> torch.device:
    """The device that a user names, such as cpu, cuda, cuda:1 or mps; default: `default_device`.

    Raises BevatronError for one that is not here."""
    if name is None:
        return default_device()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BevatronError(f"device {name}: there is no such kind; use {_or(here)}") from error
    if device.type not in here:
        raise BevatronError(f"device {name}: not on this machine; use {_or(here)}")
    if device.type == "cpu":
        return torch.device("cpu")
    if ":" not in name:
        usual = default_device()
        return usual if usual.type == device.type else device
    if device.index >= (count := torch.accelerator.device_count()):
        last = f"{device.type}:{count - 1}"
        raise BevatronError(f"device {name}: there are {count} here, up to {last}")
    return device


def _or(names: list[str]) -> str:
    return " or ".join(names)


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
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    elif attempt() > 0:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = job_store(timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def attempt() -> int:
    """How often one agent of torchrun has restarted all of this job's processes; 0 too where there
    are several agents, whose counts need not be equal."""
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return 0
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job_store(timeout_s: float) -> Store | None:
    """A connection of one's own to the store that this job's processes share; None for a process
    that torchrun has not started.

    The agent of torch 2.13 keeps one store over all restarts, and in it the addresses of processes
    that are dead by then: whoever reads those waits for nobody. So every attempt has its own names.
    """
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    return PrefixStore(f"attempt-{attempt()}", store)


def mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The grid of ranks, `tp` innermost."""
    if layout.world_size != dist.get_world_size():
        raise LayoutError(
            f"the layout {layout} needs {layout.world_size} processes, {dist.get_world_size()} "
            "are running; start as many, or change parallel.*"
        )
    sizes = tuple(getattr(layout, name) for name in MESH_DIMS)
    return init_device_mesh(device.type, sizes, mesh_dim_names=MESH_DIMS)
