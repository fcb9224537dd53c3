from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bridge.hf_folders import make


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make(root / "one", dtype="bfloat16")
    make(root / "tied", dtype="bfloat16", tie_word_embeddings=True)
    make(root / "many", dtype="bfloat16", shard="10KB")
    return root


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that gives a fresh copy of a model to damage, alone in its folder."""

    def copy(name: str = "one") -> Path:
        return Path(shutil.copytree(models / name, tmp_path / "work" / "hf"))

    return copy
