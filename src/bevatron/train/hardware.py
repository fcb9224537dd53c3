"""What a device can do, and how much of it a run uses: peak FLOPs, MFU and memory."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from bevatron.errors import BevatronError
from bevatron.parallel.process_groups import choose_device

# Dense bf16 peak in TFLOP/s with fp32 accumulation, by words of the device's name. From the makers'
# data sheets; NVIDIA's print the double, which needs 2:4 sparsity, for everything since the A100.
PEAK_BF16 = {
    # Blackwell: HGX B200/B300 36 PFLOP/s sparse per 8, GB200/GB300 10 per 2
    "B200": 2250, "B300": 2250, "GB200": 2500, "GB300": 2500,
    # Hopper: SXM, then the boards with less power
    "H100": 989, "H200": 989, "GH200": 989, "H800": 989, "H100 NVL": 835, "H200 NVL": 835,
    "H100 PCIe": 756, "H20": 148,
    # Ada
    "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "RTX 4090": 165,
    # Ampere
    "A100": 312, "A800": 312, "A30": 165, "A40": 150, "A10": 125, "A10G": 70, "RTX A6000": 155,
    "RTX 3090": 71,
    # AMD CDNA 2 (one of two dies is a device), 3 and 4
    "MI250X": 191, "MI300X": 1307, "MI325X": 1307, "MI355X": 2516,
}  # fmt: skip


# Accelerators of one process alone.
NO_TRAINING = {"mps": "Apple's mps has no collectives, without which FSDP cannot train"}


def training_device(name: str | None) -> torch.device:
    """Where this process of a run computes.

    Args:
        name: a kind, as `train.device` says it; which of them is this process's own affair.
    Raises BevatronError for what is not here, or cannot train."""
    if name is not None and ":" in name:
        raise BevatronError(
            f"train.device: {name} is one of several, and every process takes its own; say "
            f"{name.partition(':')[0]}, and leave others out by its variable (CUDA_VISIBLE_DEVICES)"
        )
    if name == "mps":
        raise BevatronError(
            f"train.device: {NO_TRAINING['mps']}; leave it out or say cpu (generate, chat and "
            "serve take --device mps)"
        )
    try:
        return choose_device(name)
    except BevatronError as error:
        raise BevatronError(f"train.device: {error}") from None


def why_on_cpu() -> str | None:
    """Why a run is not on the accelerator that this machine has; None where it has none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else NO_TRAINING.get(accelerator.type)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known (all CPUs)."""
    if device.type == "cpu":
        return None
    return peak_by_name(torch.get_device_module(device).get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """The same by the name that the driver reports, such as `NVIDIA H100 80GB HBM3`."""
    for part in sorted(PEAK_BF16, key=len, reverse=True):
        if re.search(rf"\b{part}\b", name):
            return PEAK_BF16[part] * 1e12
    return None


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: the device's allocator, or the process on a CPU."""
    if device.type != "cpu":
        return float(torch.get_device_module(device).max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that a process can still have: the device's, or on a CPU the machine's within the
    limits of the control groups and of `ulimit -v`; 8 GiB where the system does not say (macOS).

    Args:
        root: where /proc and /sys lie.
    """
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    left = [*_meminfo(root / "proc/meminfo"), *_control_groups(root)]
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY and (statm := _text(root / "proc/self/statm")):
        left.append(most - int(statm.split()[0]) * resource.getpagesize())
    return max(0, min(left, default=8 << 30))


def _text(path: Path) -> str:
    """Empty for what is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _meminfo(path: Path) -> list[int]:
    """What the machine can give without swapping: more than is free, as caches can go."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(path), re.MULTILINE)
    return [int(found[1]) << 10] if found else []


def _control_groups(root: Path) -> list[int]:
    """What is left of each limit that holds for this process (containers, Slurm, systemd), of both
    versions: limit - used + what the kernel would drop from its file cache."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, kinds, place = line.split(":", 2)
        if number == "0":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = base / place.strip("/")
        for folder in [inner, *inner.parents]:
            limit, used = (_text(folder / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                cached = re.search(
                    rf"^{names[2]} (\d+)", _text(folder / "memory.stat"), re.MULTILINE
                )
                left.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
            if folder == base:
                break
    return left


def tune_allocator() -> None:
    """Let this process keep the memory that it has once used, where the C library is glibc.

    It would hand large blocks back to the system at every `free`, only to take them anew, page by
    page, at the next step."""
    import ctypes

    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
