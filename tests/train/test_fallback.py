"""Fault 46 and its kin: a run whose newest step is damaged continues from the one before, says so,
and sets the damaged one aside. All ranks agree."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from bevatron.bridge.convert import export_checkpoint
from bevatron.errors import BevatronError
from bevatron.train.config_file import load_config
from bevatron.train.run_start import opened_run
from tests.faults.refusal import contents
from tests.processes import Pool
from tests.train.tiny_run import check_steps, metrics, prepare, train

NEWEST = "step-00000006"
Outcome = tuple[str | None, str | None, list[str]]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without(path: Path, key: str) -> None:
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


# Name -> what happens to the newest step, and a word of what must be said.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit of a weight": (lambda p: flip(p / "model/rank-00001.safetensors"), "model/rank-00001"),
    "bit of a moment": (lambda p: flip(p / "optimizer/rank-00000.safetensors"), "hash"),
    "truncated": (lambda p: cut(p / "optimizer/rank-00001.safetensors"), "optimizer/rank-00001"),
    "longer": (lambda p: (p / "model/rank-00000.safetensors").open("ab").write(b"x"), "bytes"),
    "file of a rank": (lambda p: (p / "model/rank-00001.safetensors").unlink(), "missing"),
    "optimizer": (lambda p: shutil.rmtree(p / "optimizer"), "missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (lambda p: cut(p / "manifest.json"), "manifest.json"),
    "bit of the manifest": (lambda p: flip(p / "manifest.json"), "step-00000006"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json"),
    "no train state": (lambda p: (p / "train_state.json").unlink(), "train_state.json"),
    "empty train state": (lambda p: (p / "train_state.json").write_text(""), "train_state.json"),
    "no data cursor": (lambda p: without(p / "train_state.json", "samples"), "train_state.json"),
    "no configuration": (lambda p: (p / "config.yaml").unlink(), "config.yaml"),
    "a bit of the configuration": (lambda p: flip(p / "config.yaml"), "config.yaml"),
    "no spec": (lambda p: (p / "spec.json").unlink(), "spec.json"),
    "half a spec": (lambda p: cut(p / "spec.json"), "spec.json"),
    "no tokenizer": (lambda p: (p / "source/tokenizer.json").unlink(), "tokenizer.json"),
    "everything": (lambda p: [x.unlink() for x in p.rglob("*") if x.is_file()], "manifest.json"),
    "the step before too": (
        lambda p: [flip(q / "model/rank-00000.safetensors") for q in (p, p.parent / BEFORE)],
        "model/rank-00000",
    ),
    "nothing": (lambda p: None, ""),
}
BEFORE = "step-00000004"


def newer(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))


# Name -> what is done to the run, and what is said; nothing may be renamed.
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "all damaged": (
        lambda run: [flip(p) for p in run.glob("step-*/model/rank-00000.safetensors")],
        "none of its steps can be continued from",
    ),
    "fault 51: newer format": (lambda run: newer(run / NEWEST), "install the version that wrote"),
    "all of a newer format": (lambda run: [newer(p) for p in run.glob("step-*")], "install"),
}


def starts(work: Path, runs: list[str]) -> list[Outcome]:
    """Where each run would be continued from on this rank, or why not, and what was said."""
    outcomes: list[Outcome] = []
    for run in runs:
        said: list[str] = []
        with contextlib.chdir(work):
            config = load_config(Path("run.yaml"), [f"run.dir='{run}'"])
            try:
                with opened_run(config, said.append) as start:
                    assert start.resumed is not None
                    outcomes.append((start.resumed.name, None, said))
            except BevatronError as error:
                outcomes.append((None, str(error), said))
    dist.barrier()
    return outcomes


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    """A run of steps 2, 4 and 6 by two ranks, and a copy of it for every damage."""
    folder = prepare(tmp_path_factory.mktemp("fallback"))
    pool.run(2, train, folder, "checkpoint.keep=3")
    assert check_steps(folder / "run") == [2, 4, 6]
    for name, (damage, _) in DAMAGES.items():
        damage(shutil.copytree(folder / "run", folder / name) / NEWEST)
    for name, (damage, _) in REFUSALS.items():
        damage(shutil.copytree(folder / "run", folder / name))
    return folder


@pytest.fixture(scope="module")
def outcomes(work: Path, pool: Pool) -> dict[str, Outcome]:
    names = [*DAMAGES, *REFUSALS]
    ranks = pool.run(2, starts, work, names)
    assert ranks[0] == ranks[1], "the ranks disagree"
    return dict(zip(names, ranks[0], strict=True))


@pytest.mark.parametrize("name", [n for n in DAMAGES if n != "nothing"])
def test_faults_46_48_the_step_before_is_continued_from(
    work: Path, outcomes: dict[str, Outcome], name: str
) -> None:
    good = "step-00000002" if name == "the step before too" else BEFORE
    resumed, failure, said = outcomes[name]
    assert (resumed, failure) == (good, None)
    assert f"{NEWEST} is damaged" in said[0] and DAMAGES[name][1] in said[0]
    assert f"continuing from {good} instead of {NEWEST}, now damaged-{NEWEST}" in "\n".join(said)
    assert all(line.startswith("warning: ") for line in said)
    run = work / name
    damaged = [p.name for p in sorted(run.glob("damaged-*"))]
    assert damaged == [f"damaged-step-0000000{n}" for n in ((4, 6) if good[-1] == "2" else (6,))]
    assert (run / "latest").read_text() == f"{good}\n"
    assert contents(run / good) == contents(work / "run" / good)
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_an_undamaged_run_is_left_alone(work: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["nothing"] == (NEWEST, None, [])
    assert contents(work / "nothing") == contents(work / "run")


@pytest.mark.parametrize("name", REFUSALS)
def test_fault_51_what_cannot_be_continued_is_refused_and_left_as_it_is(
    work: Path, outcomes: dict[str, Outcome], name: str
) -> None:
    resumed, failure, _ = outcomes[name]
    assert resumed is None
    assert failure is not None and REFUSALS[name][1] in failure
    assert sorted(p.name for p in (work / name).iterdir()) == sorted(
        p.name for p in (work / "run").iterdir()
    )


def test_the_run_goes_on_bit_equal_from_the_step_before(
    work: Path, pool: Pool, outcomes: dict[str, Outcome]
) -> None:
    run = shutil.copytree(work / "run", work / "go-on")
    flip(run / NEWEST / "model/rank-00001.safetensors")
    pool.run(2, train, work, "checkpoint.keep=3", "run.dir=go-on")
    assert metrics(run) == metrics(work / "run")
    assert check_steps(run) == [2, 4, 6]
    assert contents(run / NEWEST / "model") == contents(work / "run" / NEWEST / "model")
    assert (run / f"damaged-{NEWEST}").is_dir()
    last = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and NEWEST in last["damaged"][0]


def test_readers_refuse_a_damaged_step_and_change_nothing(work: Path, tmp_path: Path) -> None:
    run = shutil.copytree(work / "run", tmp_path / "run")
    flip(run / NEWEST / "model/rank-00001.safetensors")
    before = contents(run)
    with pytest.raises(BevatronError, match="damaged"):
        export_checkpoint(run, tmp_path / "out", show_progress=False)
    assert contents(run) == before
