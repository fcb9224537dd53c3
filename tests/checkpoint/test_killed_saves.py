"""Faults 41 and 42: a save is killed at each of its calls to the file system. Afterwards every
folder under a step's name is whole, the previous step is there, and the next save works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("new", 90),
        pytest.param("again", 30, marks=slow),
        pytest.param("no-swap", 30, marks=slow),
        pytest.param("two", 15, marks=slow),
    ],
)
def test_faults_41_42_killed_at_every_call(kind: str, least: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.children", kind, str(tmp_path)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["cases"] >= least
