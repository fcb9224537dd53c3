from __future__ import annotations

import os
from collections.abc import Iterator

# Tests start up to eight processes at a time on machines with two cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.processes import Pool

settings.register_profile("short", max_examples=12, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=120, deadline=None)
settings.load_profile("short")  # --hypothesis-profile=long overrides it


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Warm gloo processes, shared by all tests of a session."""
    pool = Pool()
    yield pool
    pool.close()
