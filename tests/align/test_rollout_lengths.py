"""Samples of rollouts are as long as the longest answer needs, at every layout, and what was made
at one layout is used up at another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from bevatron.align.rollouts import Rollout, length_of
from bevatron.parallel.layout import Layout
from tests.align.rl_run import lines, prepare_rl
from tests.processes import Pool
from tests.train.tiny_run import train

SEVERAL = ("objective.num_iterations=4", "optimizer.lr=5.0e-3", "checkpoint={every: 1, keep: 9}")


def made(tokens: int) -> Rollout:
    ids = [0] * tokens
    return Rollout(ids, [True] * tokens, [0.0] * tokens, ids, "", True)


@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2), Layout(tp=4), Layout(cp=2, tp=3)])
def test_there_are_few_lengths_which_the_layout_divides(layout: Layout) -> None:
    unit, found = 2 * layout.cp * layout.tp, set()
    for seq_len in (unit * 3, unit * 64, unit * 100):
        lengths = {length_of([made(1), made(n)], seq_len, layout) for n in range(1, seq_len + 1)}
        assert len(lengths) <= 8 and max(lengths) == seq_len
        assert all(n % unit == 0 for n in lengths)
        found |= lengths
        for n in (1, seq_len // 2, seq_len):
            assert (
                n <= length_of([made(n)], seq_len, layout) <= n + unit * (seq_len // unit + 7) // 8
            )
    assert length_of([made(3)], 18, Layout()) == 4
    assert length_of([made(17)], 18, Layout(cp=2, tp=2)) == 18, "as it is where nothing divides it"


def test_rollouts_are_used_up_at_a_layout_with_other_lengths(tmp_path: Path, pool: Pool) -> None:
    folder = prepare_rl(tmp_path / "run")
    pool.run(1, train, folder, *SEVERAL, "train.steps=4", "run.dir=alone")
    pool.run(1, train, folder, *SEVERAL, "train.steps=2", "run.dir=moved")
    assert load_file(folder / "moved/step-00000002/feed.safetensors")["tokens"].shape == (8, 10)
    moved = ("parallel={pp: 2, cp: 2}", "run.dir=moved", "train.steps=4")
    pool.run(4, train, folder, *SEVERAL, *moved)
    assert load_file(folder / "moved/step-00000003/feed.safetensors")["tokens"].shape == (8, 16)
    for got, wanted in zip(lines(folder / "moved"), lines(folder / "alone"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)
