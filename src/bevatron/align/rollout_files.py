"""Rollouts to read: a file of JSON lines for each batch of them, in the run's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from bevatron.align.answering import Group
from bevatron.checkpoint.new_folder import replace_text


def rollout_file(folder: Path, step: int) -> Path:
    """That of the rollouts that update number `step` (from 1) was the first to use."""
    return folder / f"step-{step:08d}.jsonl"


def write_rollouts(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    names: Sequence[str],
    totals: Sequence[float],
    advantages: Sequence[float],
) -> None:
    """A line for each answer: what was asked, what was said, and what that was worth."""
    lines = []
    values = iter(zip(totals, advantages, strict=True))
    for group in groups:
        assert group.problem is not None
        for one, scores in zip(group.rollouts, group.scores.tolist(), strict=True):
            total, advantage = next(values)
            line = {
                "step": step,
                "problem": group.position,
                "prompt": group.problem.prompt,
                "answer": one.text,
                **({"messages": one.messages} if one.messages is not None else {}),
                "tokens": len(one.said),
                "finished": one.finished,
                "rewards": {n: _number(s) for n, s in zip(names, scores, strict=True)},
                "reward": _number(total),
                "advantage": _number(advantage),
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    folder.mkdir(exist_ok=True)
    replace_text(rollout_file(folder, step), "".join(f"{line}\n" for line in lines))


def _number(value: float) -> float | None:
    """NaN is no JSON."""
    return None if math.isnan(value) else value
