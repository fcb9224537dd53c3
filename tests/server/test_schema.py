"""What can be made from the OpenAPI schema breaks nothing: no 5xx, no hang, no undocumented answer.

BEVATRON_SCHEMA_EXAMPLES sets how many requests per route the slow test makes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.served import Served

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def run(server: Served, folder: Path, phases: str, examples: int) -> int:
    """The number of requests made."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", phases, "--max-examples", str(examples)]
    command += ["--request-timeout", "30", "--generation-deterministic", "--no-color"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=3600, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert server.idle(), "a request left something behind"
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


def test_requests_made_from_the_schema_break_nothing(server: Served, tmp_path: Path) -> None:
    assert run(server, tmp_path, "fuzzing", 20) > 80


@pytest.mark.slow
def test_thousands_of_requests_made_from_the_schema_break_nothing(
    server: Served, tmp_path: Path
) -> None:
    examples = int(os.environ.get("BEVATRON_SCHEMA_EXAMPLES", "1500"))
    assert run(server, tmp_path, "examples,coverage,fuzzing", examples) > 3000
