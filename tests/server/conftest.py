from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.served import Served, make_model, served


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Served]:
    """One server for all tests that leave it as it was."""
    with served(model, "--timeout", "5", "--max-batch", "8") as running:
        yield running
        assert running.idle(), "an answer still holds a part of the cache"
