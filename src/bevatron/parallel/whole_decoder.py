"""A whole decoder in one process, built from any source of weights."""

from __future__ import annotations

from pathlib import Path

import torch

from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.checkpoint.save_and_load import DTYPES, box_reader, load
from bevatron.nn.decoder import Decoder
from bevatron.spec import ModelSpec


def load_decoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Decoder, ModelSpec]:
    """The decoder in eval mode, in `dtype` or in that of the stored tensors.

    Args:
        path: native checkpoint, run folder (its latest step), HF folder or Hub id.
    """
    return load_opened(open_weights(path), device, dtype)


def load_opened(
    opened: Opened, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Decoder, ModelSpec]:
    """`load_decoder` for weights that are open already."""
    with torch.device("meta"):
        decoder = Decoder(opened.spec)
    decoder = decoder.to(dtype or DTYPES[opened.dtype]).to_empty(device=device)
    decoder.tie()
    into = {name: (p.data, p.data) for name, p in decoder.named_parameters()}
    read = box_reader(opened.folder, opened.manifest, "model/")
    load(into, opened.shapes, read, "loading weights")
    return decoder.eval(), opened.spec
