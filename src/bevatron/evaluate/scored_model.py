"""A checkpoint as a model that scores and generates, from what a command line says."""

from __future__ import annotations

from bevatron.generate.engine import Engine

MAX_BATCH = 32


def open_engine(
    ckpt: str,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    int8: bool = False,
    device: str | None = None,
    max_batch: int = MAX_BATCH,
) -> Engine:
    """`Engine.open`; `dtype`: bf16, fp16 or fp32, default: as stored."""
    return Engine.open(
        ckpt,
        tp=tp,
        pp=pp,
        dtype=dtype,
        int8=int8,
        device=device,
        max_batch=max_batch,
        queue=2 * max_batch,
    )
