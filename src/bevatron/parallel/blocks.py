"""Layers as blocks: compiled one by one."""

from __future__ import annotations

from typing import Literal

import torch

from bevatron.nn.decoder import Decoder

Recompute = Literal["none", "selective", "full"]

BACKEND = "inductor"


def compile_each(decoder: Decoder) -> None:
    """Compile every layer on its own."""
    for layer in decoder.layers.values():
        layer.run = torch.compile(layer.run, dynamic=False, backend=BACKEND)  # type: ignore[assignment, arg-type]
