"""Supervised finetuning of a model of layers of many kinds is the same at every layout, packed or
not, in micro-batches of any size, and after a restart at another layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.save_and_load import box_reader
from tests.align.sft_data import lines, prepared, run
from tests.labelled_data import write_rows
from tests.processes import Pool

PACKED = "objective={name: sft, packing: true}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("sft") / "run")


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> list[dict[str, Any]]:
    """The packed run in one process."""
    pool.run(1, run, folder, PACKED, "run.dir=alone", "train.global_batch=4")
    return lines(folder / "alone")


def test_it_learns(alone: list[dict[str, Any]]) -> None:
    losses = [line["loss"] for line in alone if "loss" in line]
    validated = [line for line in alone if "val_loss" in line]
    assert [line["step"] for line in validated] == [0, 3, 6]
    assert losses[-1] < 0.8 * losses[0]
    assert validated[-1]["val_loss"] < 0.8 * validated[0]["val_loss"]


@pytest.mark.parametrize(
    ("ranks", "layout", "then"),
    [(2, "{tp: 2}", "{cp: 2}"), (2, "{pp: 2}", "{tp: 2}"), (4, "{tp: 2, pp: 2}", "{dp_shard: 4}")],
)
def test_every_layout_has_the_same_losses_also_after_a_restart_at_another(
    folder: Path, pool: Pool, alone: list[dict[str, Any]], ranks: int, layout: str, then: str
) -> None:
    name = "-".join(re.findall(r"\w+", layout))
    micro = "train.micro_batch=1"
    for steps, chosen in ((3, layout), (6, then)):
        more = (PACKED, f"parallel={chosen}", f"run.dir={name}", f"train.steps={steps}", micro)
        pool.run(ranks, run, folder, "train.global_batch=4", *more)
    for got, wanted in zip(lines(folder / name), alone, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def gradients(step: Path) -> dict[str, NDArray[np.float32]]:
    """The gradient of a run's first step: ten times AdamW's first moment after it."""
    tensors, prefix = read_manifest(step).tensors, "optimizer/exp_avg/"
    read = box_reader(step, read_manifest(step), "")
    return {
        name: read(name, (0,) * len(tensor.shape), tensor.shape).view(tensor.shape).numpy() * 10
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def test_packed_examples_have_the_loss_and_the_gradients_of_examples_apart(
    folder: Path, pool: Pool
) -> None:
    """All 40 examples in one step: in 12 samples, and in 40, in one process and at cp 2."""
    common = ("data.validation=[]", "train.val_every=0", "train.steps=1", "optimizer.clip_grad=0")
    found = {}
    for name, ranks, more in (
        ("apart", 1, ("objective={name: sft}", "train.global_batch=40", "train.micro_batch=8")),
        ("packed", 1, (PACKED, "train.global_batch=12", "train.micro_batch=3")),
        ("packed-cp", 2, (PACKED, "train.global_batch=12", "parallel={cp: 2}")),
    ):
        pool.run(ranks, run, folder, *common, *more, f"run.dir={name}")
        [line] = lines(folder / name)
        found[name] = line, gradients(folder / name / "step-00000001")
    (line, wanted) = found.pop("apart")
    assert len(wanted) > 10
    for other, got in found.values():
        assert other == pytest.approx(line, rel=1e-6)
        for name, gradient in wanted.items():
            np.testing.assert_allclose(got[name], gradient, atol=1e-5 * np.abs(gradient).max())


def test_the_loss_is_a_mean_over_tokens_and_not_of_means(folder: Path, pool: Pool) -> None:
    """One answer of 1 token and one of 41, apart and together."""
    rows = [
        {"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": text}]}
        for text in ("4", "x" * 40)
    ]
    for name, part in (("both", rows), ("short", rows[:1]), ("long", rows[1:])):
        write_rows(folder / f"{name}.jsonl", part)
    losses = {}
    for name, size, micro in (("both", 2, 1), ("both", 2, 2), ("short", 1, 1), ("long", 1, 1)):
        data = (f"data.train=[{{path: {name}.jsonl}}]", f"run.dir={name}-{micro}")
        size_of = (f"train.global_batch={size}", f"train.micro_batch={micro}", "train.steps=1")
        pool.run(1, run, folder, "data.validation=[]", "train.val_every=0", *data, *size_of)
        losses[name, micro] = lines(folder / f"{name}-{micro}")[0]["loss"]
    short, long = losses["short", 1], losses["long", 1]
    wanted = (2 * short + 41 * long) / 43  # their ends are learned too
    assert losses["both", 1] == pytest.approx(wanted, rel=1e-6)
    assert losses["both", 2] == pytest.approx(wanted, rel=1e-6)
    assert abs((short + long) / 2 - wanted) > 1e-3
