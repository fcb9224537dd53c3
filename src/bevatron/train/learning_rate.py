"""Learning rate as a pure function of the update's number.

Update 1 is the first; with a warmup its rate is lr / warmup_steps, never zero. (transformers counts
from zero, so its first update changes nothing; ours is its second.) Every shape but `constant`
reaches `min_lr` at update `steps`, the last one.
"""

from __future__ import annotations

import math

from bevatron.train.config import ScheduleConfig


def learning_rate(step: int, schedule: ScheduleConfig, *, steps: int, lr: float) -> float:
    """Rate of update number `step` (from 1) of a run of `steps`, whose highest rate is `lr`."""
    warmup, low = schedule.warmup_steps, schedule.min_lr
    if step <= warmup:
        return lr * step / warmup
    if schedule.name == "constant":
        return lr
    start, shape = warmup, schedule.name
    if schedule.name == "wsd":
        start, shape = max(warmup, steps - decay_steps(schedule, steps)), schedule.decay
    progress = (step - start) / max(1, steps - start)
    return low + (lr - low) * _remaining(shape, min(1.0, max(0.0, progress)))


def decay_steps(schedule: ScheduleConfig, steps: int) -> int:
    """How many updates at the end of a `wsd` run decay."""
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    return max(1, round(schedule.decay_fraction * steps))


def _remaining(shape: str, progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    if shape == "linear":
        return 1.0 - progress
    if shape == "one_sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
