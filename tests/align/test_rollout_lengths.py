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


@pytest.mark.parametrize("most", [8, 64])
@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2), Layout(tp=4), Layout(cp=2, tp=3)])
def test_there_are_few_lengths_which_the_layout_divides(layout: Layout, most: int) -> None:
    unit = 2 * layout.cp * layout.tp

    def length(n: int, seq_len: int) -> int:
        return length_of([made(1), made(n)], seq_len, layout, compiled=most == 8)

    for seq_len in (unit * 3, unit * 64, unit * 100):
        found = {n: length(n, seq_len) for n in range(1, seq_len + 1)}
        assert len(set(found.values())) <= most and found[seq_len] == seq_len
        for n, padded in found.items():
            assert padded % unit == 0 and n <= padded < n + unit * -(-seq_len // (most * unit))
    assert length_of([made(9)], 18, Layout(), False) == 10
    assert length_of([made(9)], 18, Layout(pp=2), False) == 12
    whole = length_of([made(17)], 18, Layout(cp=2, tp=2), False)
    assert whole == 18, "as it is where nothing divides it"


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
