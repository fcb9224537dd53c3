from __future__ import annotations

from pathlib import Path

import pytest

from bevatron.bridge.convert import import_checkpoint
from tests.server.served import make_model

CONTEXT = 64


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, as transformers saved it, and `native`."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_model(folder / "hf", context=CONTEXT)
    import_checkpoint(folder / "hf", folder / "native")
    return folder
