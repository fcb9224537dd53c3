"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, name: str, steps: int, lr: float, warmup_steps: int, min_lr: float
) -> float:
    """Rate of update number `step` (from 1). Linear warmup, then constant, or a cosine to `min_lr`
    that ends at update `steps`."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    if name == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
