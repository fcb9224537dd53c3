from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Warm gloo processes, shared by all tests of a session."""
    pool = Pool()
    yield pool
    pool.close()
