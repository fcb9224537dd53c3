"""What a command costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A small process in between: a child's peak begins at what its parent holds.
WRAPPER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
if done.returncode:
    sys.exit(done.returncode)
spent = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.stdout, spent.ru_utime + spent.ru_stime, spent.ru_maxrss * 1.024e-3]))
"""


@dataclass(frozen=True)
class Measured:
    """`cpu_s` is of the command and its children, `peak_mb` the most that one of them held."""

    stdout: str
    wall_s: float
    cpu_s: float
    peak_mb: float


def measured(command: Sequence[str], cwd: Path | None = None) -> Measured:
    """Run it; a failure ends the benchmark."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, *command], cwd=cwd, stdout=subprocess.PIPE, check=False
    )
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with status {done.returncode}")
    stdout, cpu, peak = json.loads(done.stdout)
    return Measured(stdout, wall, cpu, peak)
