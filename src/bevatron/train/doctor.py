"""`bevatron doctor`: what this machine is, and whether processes on it can train together."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bevatron

PACKAGES: tuple[str, ...] = ("torch", "transformers", "datasets", "safetensors", "tokenizers")
PACKAGES += ("tensorboard", "wandb", "trackio", "triton", "tiktoken")
LOW_SHM, LOW_FILES, LOW_DISK = 2**30, 4096, 20 * 2**30
# A failed exchange's message -> what to do. `{interfaces}` are this machine's.
HINTS = {
    "unable to find interface": "GLOO_SOCKET_IFNAME names no interface of this machine, which has "
    "{interfaces}; set it to one of them, or unset it",
    "no such device": "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names no interface of this "
    "machine, which has {interfaces}; set it to one of them, or unset it",
    "unable to find address": "GLOO_SOCKET_IFNAME names no interface of this machine that has an "
    "address; set it to another one of {interfaces}, or unset it",
    "resolve": "this machine's name does not resolve; add it to /etc/hosts, or set "
    "GLOO_SOCKET_IFNAME to one of {interfaces} (lo for one machine alone)",
    "nccl": "set NCCL_DEBUG=INFO and look at the first warning; NCCL_SOCKET_IFNAME (of "
    "{interfaces}) and NCCL_IB_DISABLE=1 are the usual switches",
    "address already in use": "another process has the port; try again",
}
OTHERWISE = (
    "the processes start but do not reach each other: a firewall, or the wrong interface; set "
    "GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs) to one of {interfaces}"
)


def doctor(nproc: int | None, timeout_s: float) -> dict[str, Any]:
    """Look at everything. Under torchrun, the exchange is that of the given processes.

    Returns `ok`, `machine` (section -> name -> value), `warnings` (one sentence each), and
    `exchange`: `ok`, then `ranks`, `backend`, `exchanges`; or `said` and `hint`."""
    machine = {
        "software": _software(),
        "devices": _devices(),
        "machine": _machine(),
        "network": _network(),
    }
    if "RANK" in os.environ:
        exchange = _exchange_as_rank(timeout_s)
    else:
        count = nproc or len(machine["devices"]) or 2
        exchange = _exchange(count, timeout_s)
        if not exchange["ok"] and "GLOO_SOCKET_IFNAME" not in os.environ:
            again = _exchange(count, timeout_s, {"GLOO_SOCKET_IFNAME": "lo"})
            if again["ok"]:
                exchange["hint"] = "it works with GLOO_SOCKET_IFNAME=lo (one machine alone): set it"
    return {
        "ok": exchange["ok"],
        "machine": machine,
        "warnings": _warnings(machine["machine"]),
        "exchange": exchange,
    }


def _software() -> dict[str, Any]:
    import torch

    out: dict[str, Any] = {"bevatron": bevatron.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    out["torch"] = torch.__version__  # with the build, which the package's version may lack
    out["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        out["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c), None)
    found = next((p for c in (compiler, "g++", "clang++") if c and (p := shutil.which(c))), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    out["compiler"] = found
    out["torch.compile"] = _can_compile(found, headers, out["triton"])
    return out


def _can_compile(compiler: str | None, headers: Path, triton: str | None) -> str:
    import torch

    if compiler is None:
        return "no: there is no C++ compiler; install g++ or set CXX"
    if not headers.is_file():
        return f"no: {headers} is missing; install Python's headers (python3-dev)"
    if torch.cuda.is_available() and triton is None:
        return "on CPUs alone: triton is not installed"
    return "yes"


def _devices() -> dict[str, Any]:
    import torch

    from bevatron.train.hardware import peak_flops

    out: dict[str, Any] = {}
    if not torch.cuda.is_available():
        return out
    count = torch.cuda.device_count()
    for i in range(count):
        seen = torch.cuda.get_device_properties(i)
        peak = peak_flops(torch.device("cuda", i))
        reached = [j for j in range(count) if j != i and torch.cuda.can_device_access_peer(i, j)]
        out[f"cuda:{i}"] = {
            "name": seen.name,
            "memory_gib": round(seen.total_memory / 2**30, 1),
            "peak_bf16_tflops": peak and peak / 1e12,
            "reaches_directly": reached,
        }
    return out


def _machine() -> dict[str, Any]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm = Path("/dev/shm")
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads_of_torch": torch.get_num_threads(),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(".").free,
        "shm_bytes": shutil.disk_usage(shm).total if shm.is_dir() else None,
        "open_files": soft,
        "open_files_limit": hard,
    }


def _network() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for _, name in socket.if_nameindex():
        out[name] = _said(Path("/sys/class/net") / name / "operstate")
    infiniband = Path("/sys/class/infiniband")
    for port in sorted(infiniband.glob("*/ports/*")) if infiniband.is_dir() else []:
        out[f"{port.parts[-3]} port {port.name}"] = (
            f"{_said(port / 'state')}, {_said(port / 'rate')}"
        )
    try:
        out["this machine's name"] = socket.gethostbyname(socket.gethostname())
    except OSError:
        out["this machine's name"] = "does not resolve"
    return out


def _said(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _warnings(machine: dict[str, Any]) -> list[str]:
    from bevatron.train.hardware import why_on_cpu

    out = [] if (why := why_on_cpu()) is None else [f"{why}; training runs on the CPU"]
    if machine["shm_bytes"] is not None and machine["shm_bytes"] < LOW_SHM:
        size = machine["shm_bytes"] / 2**20
        out.append(f"/dev/shm holds {size:.0f} MiB; NCCL and data workers want 1 GiB or more")
    if machine["open_files"] < LOW_FILES:
        out.append(f"{machine['open_files']} open files are allowed; raise it: ulimit -n 65536")
    if machine["disk_free_bytes"] < LOW_DISK:
        free = machine["disk_free_bytes"] / 2**30
        out.append(f"{free:.1f} GiB are free in this folder; checkpoints need 14 bytes/parameter")
    return out


def _exchange_as_rank(timeout_s: float) -> dict[str, Any]:
    from bevatron.train.doctor_exchange import measured

    try:
        return {"ok": True, **measured(timeout_s)}
    except Exception as error:
        return _failure(str(error))


def _exchange(count: int, timeout_s: float, more: dict[str, str] | None = None) -> dict[str, Any]:
    """Start `count` processes that exchange; end them after `timeout_s`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(more or {})}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bevatron.train.doctor_exchange", str(timeout_s)]
    command.append(str(os.getpid()))
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        while any(r.poll() is None for r in ranks) and time.monotonic() < deadline:
            if any(r.poll() for r in ranks):  # one failed: the others will not end by themselves
                time.sleep(1)
                break
            time.sleep(0.05)
        late = [i for i, r in enumerate(ranks) if r.poll() is None]
    finally:
        for rank in ranks:
            rank.kill()
    said = [rank.communicate() for rank in ranks]
    if not any(rank.returncode for rank in ranks):
        return {"ok": True, **json.loads(said[0][0])}
    errors = [err.strip().splitlines()[-1] for _, err in said if err.strip()]
    if not errors:
        errors = [f"rank {late[0]} had not finished after {timeout_s:g} s"]
    return _failure(errors[0])


def _failure(said: str) -> dict[str, Any]:
    interfaces = ", ".join(name for _, name in socket.if_nameindex())
    hint = next((h for sign, h in HINTS.items() if sign in said.lower()), OTHERWISE)
    return {"ok": False, "said": said, "hint": hint.format(interfaces=interfaces)}


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for section, facts in report["machine"].items():
        lines.append(section)
        lines += [_fact(name, value) for name, value in facts.items()]
        if not facts:
            lines.append("  none; training runs on the CPU")
    exchange = report["exchange"]
    if exchange["ok"]:
        lines.append(f"exchange of {exchange['ranks']} processes ({exchange['backend']})")
        for name, sizes in exchange["exchanges"].items():
            shown = "   ".join(
                f"{size}: {took['us']:,.0f} us, {took['gb_per_s']:.2f} GB/s"
                for size, took in sizes.items()
            )
            lines.append(f"  {name:<20} {shown}")
    else:
        lines += ["exchange FAILED", f"  {exchange['said']}", f"  {exchange['hint']}"]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    lines.append("ok" if report["ok"] else "not ok")
    return "\n".join(lines)


def _fact(name: str, value: Any) -> str:
    shown = "-" if value is None else str(value)
    if isinstance(value, dict):
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if v not in (None, []))
    elif name.endswith("_bytes") and value is not None:
        shown = f"{value / 2**30:.1f} GiB"
    return f"  {name.removesuffix('_bytes').replace('_', ' '):<20} {shown}"
