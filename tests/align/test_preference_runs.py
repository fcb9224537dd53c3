"""Runs on preferences are the same at every layout, after a restart at another one, and however the
reference answers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bevatron.align.preference_feed import Preferences
from bevatron.align.preference_rows import PreferenceRows
from bevatron.checkpoint.run_folder import RunFolder, step_of
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from bevatron.train.config import SourceConfig
from tests.align.preference_data import (
    PAIRS,
    SEVERAL,
    folder_of,
    lines,
    objective,
    pairs,
    run_all,
    write,
)
from tests.commands import Command
from tests.processes import Pool
from tests.train.tiny_run import train

OF_PAIRS = {
    "dpo": objective("dpo", label_smoothing=0.1, sft_loss_weight=0.2),
    "robust": objective("dpo", label_smoothing=0.1, robust=True),
    "ipo": objective("ipo"),
    "hinge": objective("hinge"),
    "simpo": objective("simpo"),
    "rpo": objective("rpo", sft_loss_weight=0.1, preference_avg_log_probs=True, eta=0.5),
}
OF_SEVERAL = {"sqloo": objective("rpo", loss="rpo_sqloo", responses=4, sft_loss_weight=0.1)}
KEYS = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies")
KEYS += ("rewards/margins", "logps/chosen", "logps/rejected", "truncated", "dropped")
VALIDATED = tuple(f"val_{key}" for key in KEYS if key != "grad_norm")
SHORT = ("train.steps=3", "optimizer.lr=3.0e-3", "checkpoint.every=3", "train.val_batches=2")


def go(folder: Path, name: str, *overrides: str) -> None:
    """One rank of runs of all objectives."""
    run_all(folder, name, OF_PAIRS, PAIRS, *SHORT, *overrides)
    run_all(folder, name, OF_SEVERAL, SEVERAL, *SHORT, *overrides)


def seen(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    runs = {of: folder / f"{name}-{of}" for of in OF_PAIRS | OF_SEVERAL}
    validated = {f"val {of}": lines(run, *VALIDATED) for of, run in runs.items() if of in OF_PAIRS}
    return {of: lines(run, *KEYS) for of, run in runs.items()} | validated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("preferences") / "runs")


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> dict[str, list[dict[str, Any]]]:
    pool.run(1, go, folder, "alone")
    return seen(folder, "alone")


def close(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        # AdamW follows the sign of gradients that are noise, so later steps part a little.
        rel = 1e-5 if ours["step"] <= 1 else 1e-4
        assert ours == pytest.approx(theirs, rel=rel, abs=2e-5)


def test_they_begin_at_the_reference_and_learn(alone: dict[str, list[dict[str, Any]]]) -> None:
    for name, found in alone.items():
        if name.startswith("val"):
            assert found[-1]["val_loss"] < found[0]["val_loss"], name
        elif name != "simpo":
            assert found[0]["rewards/margins"] == 0 and found[0]["logps/chosen"] < 0
    assert alone["val hinge"][0]["val_loss"] == 1
    assert alone["val ipo"][0]["val_loss"] == pytest.approx(25, rel=1e-6)
    assert alone["dpo"][0]["dropped"] == alone["dpo"][0]["truncated"] == 0


LAYOUTS = [(2, "{tp: 2}"), (2, "{pp: 2}"), (2, "{cp: 2}")]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_every_layout_equals_one_process(
    folder: Path, pool: Pool, alone: dict[str, list[dict[str, Any]]], ranks: int, layout: str
) -> None:
    name = "-".join(re.findall(r"\w+", layout))
    pool.run(ranks, go, folder, name, f"parallel={layout}")
    for of, found in seen(folder, name).items():
        close(found, alone[of])


def test_at_eight_processes_and_from_there_on_at_two(folder: Path, pool: Pool) -> None:
    """Tensor x pipeline x data parallel, the reference's answers computed there before; the run
    goes on at another layout from the same file."""
    ours = objective("dpo", precompute_reference=True)
    steps = (PAIRS, "optimizer.lr=3.0e-3", "checkpoint.every=2", "train.steps=4")
    pool.run(1, train, folder, objective("dpo"), *steps, "run.dir=beside")
    first = (ours, *steps[:3], "train.steps=2", "train.micro_batch=1", "run.dir=eight")
    pool.run(8, train, folder, *first, "parallel={tp: 2, pp: 2, dp_shard: 2}")
    written = (folder / "eight/reference/train.safetensors").stat().st_mtime_ns
    pool.run(2, train, folder, ours, *steps, "run.dir=eight", "parallel={cp: 2}")
    assert (folder / "eight/reference/train.safetensors").stat().st_mtime_ns == written
    close(lines(folder / "eight", *KEYS), lines(folder / "beside", *KEYS))
    close(lines(folder / "eight", *VALIDATED)[-1:], lines(folder / "beside", *VALIDATED)[-1:])


def test_a_run_that_is_killed_goes_on_at_another_layout(folder: Path, pool: Pool) -> None:
    """By SIGKILL, with a reference that was computed before."""
    own = (objective("rpo", precompute_reference=True, sft_loss_weight=0.1), PAIRS)
    own += ("optimizer.lr=3.0e-3", "checkpoint={every: 1, keep: 999}")
    pool.run(1, train, folder, *own, "train.steps=4", "run.dir=unharmed")
    run = folder / "killed"
    command = Command(folder, "train", "run.yaml", *own, "run.dir=killed", "train.steps=500")
    assert command.wait_until((run / "step-00000002/manifest.json").is_file)
    command.kill()
    assert command.wait() == -9
    for path in RunFolder(run).folders():
        if step_of(path) > 2:  # it was quick
            shutil.rmtree(path)
    pool.run(2, train, folder, *own, "train.steps=4", "run.dir=killed", "parallel={tp: 2}")
    close(lines(run, *KEYS), lines(folder / "unharmed", *KEYS))


def test_a_stale_reference_is_refused(folder: Path, pool: Pool) -> None:
    ours = (objective("dpo", precompute_reference=True), PAIRS, *SHORT)
    pool.run(1, train, folder, *ours, "run.dir=stale")
    table = folder / "stale" / "reference"
    for name, says, change in (
        ("other-model", "computed by another reference", ["train.seed=1"]),
        ("other-precision", "or in another precision", ["train.precision=bf16"]),
        ("more-data", "is of 30 examples, the data has 31", []),
        ("other-data", "is not what it was then", []),
    ):
        shutil.copytree(table, folder / name / "reference")
        rows = pairs()
        if name == "more-data":
            rows.append(rows[0])
        if name == "other-data":
            rows[7]["chosen"] += "!"
        write(folder / "pairs.jsonl", rows)
        with pytest.raises(AssertionError, match=says):
            pool.run(1, train, folder, *ours, f"run.dir={name}", *change)
    write(folder / "pairs.jsonl", pairs())


@pytest.mark.parametrize(("ranks", "layout"), [(1, "{}"), (4, "{tp: 2, pp: 2}")])
def test_a_reference_answers_alike_from_an_adapter_off_beside_or_before(
    folder: Path, pool: Pool, ranks: int, layout: str
) -> None:
    """`whole`: what an adapter run trains besides is not switched off, so the base is read."""
    base = "alone-hinge"
    if not (folder / base).is_dir():
        pool.run(1, train, folder, OF_PAIRS["hinge"], PAIRS, *SHORT, f"run.dir={base}")
    runs = {
        "off": objective("dpo"),
        "beside": objective("dpo", reference=base),
        "before": objective("dpo", precompute_reference=True),
    }
    adapter = "adapter={kind: lora, rank: 2, alpha: 8, targets: [qkv, o, gate_up, down]}"
    own = (PAIRS, *SHORT, f"model={{init: {base}}}", adapter, f"parallel={layout}")
    pool.run(ranks, run_all, folder, f"adapter{ranks}", runs, *own)
    off, *others = (lines(folder / f"adapter{ranks}-{name}", *KEYS) for name in runs)
    for other in others:
        assert off == other
    assert off[0]["rewards/margins"] == 0 < off[-1]["rewards/margins"]
    if ranks == 1:
        whole = (*own, "adapter.whole=[final_norm.*]", "run.dir=whole")
        pool.run(1, train, folder, objective("dpo"), *whole)
        state = (folder / "whole/step-00000003/train_state.json").read_text("utf-8")
        assert "switched off" not in state


def test_another_model_may_be_the_reference(folder: Path, pool: Pool) -> None:
    """A step of a run; then the policy does not begin at the reference."""
    own = objective("dpo", reference="alone-hinge")
    pool.run(1, go, folder, "alone") if not (folder / "alone-hinge").is_dir() else None
    pool.run(1, train, folder, own, PAIRS, *SHORT, "run.dir=other")
    first = lines(folder / "other", *KEYS)[0]
    assert first["rewards/margins"] < -0.1


def test_what_is_too_long_is_refused_cut_off_or_left_out(folder: Path, tmp_path: Path) -> None:
    """Known of all rows before the first step; the ranks share them out."""
    rows = pairs()
    rows[3]["prompt"] += "?" * 12  # only this prompt fills a sample of 16
    rows[4]["rejected"] += "?" * 6
    write(tmp_path / "long.jsonl", rows)

    def read(too_long: str, length: int = 16) -> Preferences:
        examples = ChatExamples.open(folder / "tokenizer")
        labelled = PreferenceRows(examples, length, too_long=too_long)
        found = Preferences([SourceConfig(path=str(tmp_path / "long.jsonl"))], labelled)
        found.join([found.count(rank, 3, lambda: None) for rank in range(3)])
        return found

    with pytest.raises(BevatronError) as caught:
        read("refuse")
    assert "2 of 30 rows have a prompt with an answer of more than data.seq_len 16" in str(
        caught.value
    )
    assert "the longest has 25" in str(caught.value) and "line 4)" in str(caught.value)
    said = "2 of 30 rows have sequences of more than 16 tokens (the longest 25) and "
    cut, dropped = read("truncate"), read("drop")
    assert cut.told() == [
        said + "lose the end of an answer, 1 of them all of one, and are left out"
    ]
    assert dropped.told() == [said + "are left out"]
    assert (len(cut), len(dropped)) == (29, 28)
    assert cut.batch([3])["cut"].tolist() == [[False, True]], "the row behind the one left out"
    assert read("refuse", 32).told() == []
    rows[7]["rejected"] = rows[7]["chosen"]
    write(tmp_path / "long.jsonl", rows)
    (told,) = read("refuse", 32).told()
    assert told.startswith("1 of 30 rows prefer an answer to itself")
    with pytest.raises(BevatronError, match=r"nothing of an answer is left within data\.seq_len 4"):
        read("truncate", 4)


def test_a_run_with_too_long_rows_ends_before_its_first_step(folder: Path, pool: Pool) -> None:
    own = (objective("dpo"), PAIRS, "data.seq_len=10", "run.dir=long", "parallel={dp_shard: 2}")
    with pytest.raises(AssertionError, match="30 of 30 rows have a prompt with an answer of more"):
        pool.run(2, train, folder, *own)
    assert not (folder / "long" / "metrics.jsonl").exists()


def test_rpo_stops_where_the_rewards_say_and_dpo_does_not(folder: Path, pool: Pool) -> None:
    """Pairs whose rewards differ by 0.1 and by 5, all in every batch; the former are the validation
    as well. `benchmarks/preferences.py` measures it in full."""
    rows = pairs()[:8]
    for i, row in enumerate(rows):
        row |= {"chosen_reward": (0.1, 5.0)[i % 2], "rejected_reward": 0.0}
    write(folder / "both.jsonl", rows)
    write(folder / "small.jsonl", rows[::2])
    own = ("data={train: [{path: both.jsonl}], validation: [{path: small.jsonl}], seq_len: 16}",)
    own += ("train={steps: 80, global_batch: 8, micro_batch: 8, precision: fp32, val_every: 80}",)
    own += ("optimizer={lr: 4.0e-3, weight_decay: 0.0}", "schedule={name: cosine}")
    runs = {"rpo": objective("rpo", loss="rpo_sq"), "dpo": objective("dpo", beta=0.2)}
    pool.run(1, run_all, folder, "toy", runs, *own, "checkpoint.every=0")
    for name in runs:
        both = lines(folder / f"toy-{name}", "loss", "rewards/margins")[-1]["rewards/margins"]
        small = lines(folder / f"toy-{name}", "val_loss", "val_rewards/margins")[-1]
        small = small["val_rewards/margins"]
        large = 2 * both - small
        if name == "rpo":
            assert small == pytest.approx(0.1, rel=0.1) and large == pytest.approx(5, rel=0.1)
        else:
            assert small > 2 and small > 20 * 0.1, "it knows of no 0.1"
