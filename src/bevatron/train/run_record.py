"""The record of what produced a run: versions, code, machine, layout, configuration, data."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bevatron
from bevatron.parallel.layout import Layout
from bevatron.train.config import RunConfig
from bevatron.train.run_start import Start


def made_with(layout: Layout, device: torch.device) -> dict[str, Any]:
    """What may change between the starts of a run without changing more than rounding."""
    made: dict[str, Any] = {"bevatron": bevatron.__version__, "torch": torch.__version__}
    made |= {"python": platform.python_version(), "device": _device_name(device)}
    if device.type == "cpu":  # how its sums are cut
        made["threads"] = torch.get_num_threads()
        made["vectors"] = torch.backends.cpu.get_cpu_capability()
    return {**made, "layout": str(layout), "ranks": layout.world_size}


def differences(before: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """What of `made_with` is another than when the step was saved, as far as that recorded it."""
    return [
        f"{key} {before[key]} -> {made[key]}"
        for key in ("layout", "device", "threads", "vectors", "torch", "bevatron")
        if key in before and before[key] != made.get(key)
    ]


def start_line(
    config: RunConfig, start: Start, made: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """A line of starts.jsonl. `extra`: such as the data's fingerprints."""
    origin = config.model.init or str(config.model.spec)
    if start.resumed is not None:
        origin = str(start.resumed) if start.branched else start.resumed.name
    line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    line |= {"from": origin, "step": start.state["step"] if start.state else 0}
    line |= {**made, "commit": _commit(), "platform": platform.platform()}
    line |= {"host": socket.gethostname(), "process": os.getpid()}
    if start.damaged:
        line["damaged"] = list(start.damaged)
    return {**line, **extra, "config": config.model_dump(mode="json", by_alias=True)}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def _commit() -> str | None:
    """The commit of the code, with `+` if it was changed since; None if it is no checkout."""
    package = Path(bevatron.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent.parent:
            return None  # installed into someone else's checkout
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
