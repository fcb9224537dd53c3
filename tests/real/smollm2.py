"""The real model for tests, or the reason why they are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bevatron.demo.smollm2 import Unavailable, model_folder


def folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, kept below $BEVATRON_TEST_MODELS if that is
    set, else in the user's cache. Skips what asks where it cannot be had."""
    root = os.environ.get("BEVATRON_TEST_MODELS")
    try:
        return model_folder(Path(root) if root else None)
    except Unavailable as why:
        pytest.skip(f"SmolLM2 cannot be had here: {why}")
