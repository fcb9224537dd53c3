"""Their tests' markers, which `--strict-markers` wants to know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from tests.hf_common.theirs import MissingError, find

collect_ignore = ["standins"]


def pytest_configure(config: pytest.Config) -> None:
    try:
        files = [*find().rglob("*.py"), Path(transformers.__file__).with_name("testing_utils.py")]
    except MissingError:
        return
    for file in files:
        for name in set(re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8"))):
            config.addinivalue_line("markers", f"{name}: of transformers' own tests")
