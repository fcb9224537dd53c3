"""What a device can do and what is used of it."""

from __future__ import annotations

import resource
import sys

import torch

# Dense bf16 peak in FLOP/s, from the makers' data sheets, by a part of the device's name.
PEAK_BF16 = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known (all CPUs)."""
    if device.type == "cpu":
        return None
    name = torch.get_device_module(device).get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: the device's allocator, or the process on a CPU."""
    if device.type != "cpu":
        return float(torch.get_device_module(device).max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
