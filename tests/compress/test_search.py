"""`bevatron search`: what its losses are, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from bevatron.bridge.convert import export_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.checkpoint.folder_lock import lock
from bevatron.cli.main import app
from bevatron.compress.search import search as searching
from bevatron.compress.search.search import Search
from bevatron.compress.search.search_request import Asked
from bevatron.compress.search.search_results import State, ranked, stages_of, standing
from bevatron.compress.verb_options import Comparison
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError
from bevatron.evaluate.perplexity import evaluate, open_engine
from bevatron.spec.count import parameter_count
from bevatron.train import launch
from bevatron.train.trainer import Trainer
from tests.charts.drawn import drawn
from tests.compress.search_case import (
    CANDIDATES,
    SEQ_LEN,
    VAL_SAMPLES,
    arguments,
    make,
    options,
    search,
)
from tests.train.small_run import lines


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def done(work: Path) -> State:
    """A search that nothing interrupted, with all its weights."""
    return search(work, work / "done", keep=True)


def stock_loss(folder: Path, held_out: Path) -> float:
    """transformers' loss, of the same windows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = TokenStore.open(held_out).read(0, VAL_SAMPLES * SEQ_LEN + 1)
    windows = [ids[i : i + SEQ_LEN + 1] for i in range(0, VAL_SAMPLES * SEQ_LEN, SEQ_LEN)]
    x = torch.tensor([w.tolist() for w in windows])
    with torch.no_grad():
        return float(model(x, labels=x).loss)


def test_every_loss_is_transformers_loss_of_the_exported_candidate(
    work: Path, done: State, tmp_path: Path
) -> None:
    names = {c["name"] for c in done.candidates}
    assert names == CANDIDATES
    assert done.found["model"]["loss"] == pytest.approx(
        stock_loss(work / "model", work / "held-out"), rel=1e-5
    )
    best = done.found["best"]
    for c in done.candidates:
        for stage, loss in c["losses"].items():
            folder = done.folder / "candidates" / c["name"] / stage
            if (c["name"], stage) == (best["name"], best["stage"]):
                folder = done.folder / "best"
            assert parameter_count(open_native(folder).spec) == c["parameters"]
            exported = tmp_path / f"{c['name']}-{stage}"
            export_checkpoint(folder, exported, show_progress=False)
            assert loss == pytest.approx(stock_loss(exported, work / "held-out"), rel=1e-5)


def test_it_is_the_loss_that_eval_says(work: Path, done: State) -> None:
    with open_engine(str(done.folder / "best")) as engine:
        limit = VAL_SAMPLES * SEQ_LEN + 1
        found = evaluate(engine, [work / "held-out"], seq_len=SEQ_LEN, limit=limit)
    assert found["loss"] == done.found["best"]["loss"]


def test_the_best_by_loss_come_on_and_the_winner_stays(done: State) -> None:
    pruned = ranked(done.candidates, "pruned")
    short = ranked(done.candidates, "short")
    assert [c["losses"]["pruned"] for c in pruned] == sorted(
        c["losses"]["pruned"] for c in done.candidates
    )
    assert {c["name"] for c in short} == {c["name"] for c in pruned[:2]}
    assert [c["ranks"] for c in short] == [
        {"pruned": pruned.index(c) + 1, "short": i} for i, c in enumerate(short, 1)
    ]
    assert done.found["best"]["name"] == short[0]["name"] == standing(done.candidates)[0]["name"]
    logged = [line["step"] for line in lines(done.folder / "best") if "lr" in line]
    assert logged == [1, 2, 3]


def test_a_repeated_command_does_nothing_and_another_is_refused(work: Path, done: State) -> None:
    def files() -> dict[str, int]:
        every = (p for p in done.folder.rglob("*") if p.is_file() and p.suffix != ".html")
        return {str(p): p.stat().st_mtime_ns for p in every}

    before = files()
    assert search(work, done.folder, keep=True).found == done.found
    assert files() == before
    with pytest.raises(BevatronError) as refused:
        search(work, done.folder, steps=4, seed=1, overrides=("optimizer.lr=1e-2",))
    said = str(refused.value)
    assert "steps is 4, was 3" in said and "seed is 1, was 0" in said
    assert "overrides is optimizer.lr=1e-2, was checkpoint.every=1 optimizer.lr=1e-3" in said
    assert files() == before


class Killed(BaseException):
    """As a kill, but for the process: nothing of ours may catch it."""


@contextmanager
def killed_after_a_result(counts: Counter[str], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count the work; end everything when `search.json` has been written once."""
    write, loss, step = State.write, Search._loss, Trainer.step

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            counts[name] += 1
            return found

        return call

    def written(self: State) -> None:
        write(self)
        raise Killed

    def stepped(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if counts["steps"] == 2 and not counts["in a step"]:
            counts["in a step"] += 1
            raise Killed
        counts["steps"] += 1
        return step(self, *args, **kwargs)

    with patch.context() as m:
        m.setattr(State, "write", written)
        m.setattr(Search, "_loss", counted("losses", loss))
        m.setattr(searching, "prune", counted("prunings", searching.prune))
        m.setattr(searching, "importance", counted("importance", searching.importance))
        m.setattr(launch, "train", counted("trainings", launch.train))
        m.setattr(Trainer, "step", stepped)
        yield


def test_killed_after_every_result_it_ends_the_same_and_does_nothing_twice(
    work: Path, done: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    target = tmp_path / "killed"
    for _ in range(40):
        try:
            with killed_after_a_result(counts, monkeypatch):
                search(work, target)
            break
        except Killed:
            counts["kills"] += 1
    assert (target / "search.json").read_bytes() == (done.folder / "search.json").read_bytes()
    # begun, candidates, the model's loss, 3 pruned, 2 distilled, the best; and within a step
    assert counts == {
        "kills": 10, "in a step": 1, "steps": 6,
        "importance": 1, "prunings": 3, "losses": 6, "trainings": 2,
    }  # fmt: skip
    for a, b in ((target, done.folder),):
        for name in ("best/step-00000003/model", "best/step-00000003/optimizer"):
            [one], [other] = ([*(x / name).iterdir()] for x in (a, b))
            assert one.read_bytes() == other.read_bytes()
    # Weights of the others are gone; what was logged stays.
    manifests = [p.parent for p in target.rglob("manifest.json")]
    assert manifests == [target / "best" / "step-00000003"]
    assert len([*target.rglob("metrics.jsonl")]) == 2
    hidden = [p.name for p in target.rglob(".*")]
    assert hidden == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        "bevatron.compress.search.search_results:State.write",
        "bevatron.train.trainer:Trainer.step",
        "bevatron.bridge.byte_mover:Mover.write",
        "bevatron.train.save_steps:Saver.save_if_due",
        "bevatron.compress.search.search:remove",
        "bevatron.compress.search.search_page:write_page",
    ],
)
def test_kill_9_anywhere(work: Path, done: State, tmp_path: Path, where: str) -> None:
    """The process ends itself by SIGKILL at the third, then the fifth call of one place."""
    module, name = where.split(":")
    first, _, last = name.rpartition(".")
    code = f"""
import importlib, os, sys
holder = importlib.import_module({module!r})
holder = getattr(holder, {first!r}) if {first!r} else holder
real, calls = getattr(holder, {last!r}), [0]
def call(*args, **kwargs):
    calls[0] += 1
    if calls[0] == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)
setattr(holder, {last!r}, call)
if {last!r} == "write_page":
    import bevatron.compress.search.search as search
    search.write_page = call
sys.argv = ["bevatron", *sys.argv[1:]]
from bevatron.cli.main import main
main()
"""
    target, codes = tmp_path / "killed", []
    for at in ("3", "5", "1000000"):
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments(work, target)],
            env={**os.environ, "KILL_AT": at, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        codes.append(ran.returncode)
    assert codes[0] == -9 and codes[2] == 0, ran.stderr
    assert (target / "search.json").read_bytes() == (done.folder / "search.json").read_bytes()
    [one], [other] = ([*(x / "best/step-00000003/model").iterdir()] for x in (target, done.folder))
    assert one.read_bytes() == other.read_bytes()


def test_the_page_shows_every_candidate_and_asks_for_nothing(done: State) -> None:
    text = (done.folder / "search.html").read_text()
    assert all(text.count(name) > 3 for name in CANDIDATES)
    for title in ("Loss after pruning", "Loss after the short distillation", "Ranks from stage"):
        assert title in text
    assert "Held-out loss, short distillation" in text and "finished" in text
    assert "default-src 'none'" in text
    asked = re.findall(r"Asked: which .*?\?", text)
    assert asked == [
        "Asked: which 15,600 parameters (within 5%) of model have the lowest loss on held-out "
        "among shapes of 24 or 32 hidden, 4 heads?"
    ]
    charts = drawn(text)
    shown, points = charts["Loss after pruning, by parameters"]
    assert (shown["axis"], shown["value"]) == ("parameters", "nats per token")
    losses = {c["name"]: c["losses"]["pruned"] for c in done.candidates}
    assert {c["label"]: c["y"] for c in points} == {
        name: [pytest.approx(loss, rel=1e-5)] for name, loss in losses.items()
    }
    ranks = {d["label"]: d["ranks"] for d in charts["Ranks from stage to stage"][1]}
    assert ranks == {c["name"]: [*c["ranks"].values()] for c in done.candidates}


def test_the_page_gives_the_command_that_prunes_to_each_candidate(
    done: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = html.unescape((done.folder / "search.html").read_text())
    commands = re.findall(r"<code>bevatron (prune .*?)</code>", text)
    sizes = {c["name"]: c["parameters"] for c in done.candidates}
    best = done.found["best"]["name"]
    assert len(commands) == len(sizes) and shlex.split(commands[0])[2] == best
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*shlex.split(commands[0]), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parameters"] == sizes[best]


def test_scores_only_and_the_table(work: Path, done: State, tmp_path: Path) -> None:
    """Without steps the best pruned model wins, and the scores may come from a file."""
    words = arguments(work, tmp_path / "out")
    words[words.index("--steps") + 1] = "0"
    words += ["--scores", str(done.folder / "scores.safetensors")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/search.json").read_text())
    losses = {c["name"]: c["losses"] for c in found["candidates"]}
    before = {c["name"]: c["losses"]["pruned"] for c in done.candidates}
    assert losses == {name: {"pruned": loss} for name, loss in before.items()}
    best = min(before, key=lambda name: before[name])
    assert found["best"]["name"] == best
    assert (tmp_path / "out/best/manifest.json").is_file()
    assert not (tmp_path / "out/candidates").exists() or not any(
        (tmp_path / "out/candidates").iterdir()
    )
    assert f"best: {best}, loss {before[best]:.4f}, is in {tmp_path}/out/best\n" in result.stdout
    assert re.search(rf"{best} .* {before[best]:.4f} \(1\)", result.stdout)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"validation": ()}, "--validation is missing"),
        ({"data": ()}, "--data is missing"),
        ({"same": True}, "held-out text must be other text"),
        ({"seq_len": 4096}, "--seq-len is 4096"),
        ({"samples": 5000}, "5000 were asked for"),
        ({"long_steps": 2}, "--long-steps is 2, expected more than the 3 of --steps"),
        ({"long_steps": 9, "long": 5}, "--long is 5, expected at most the 2 of --short"),
        ({"steps": 0, "long_steps": 9}, "--long-steps goes on where --steps has chosen"),
        ({"overrides": ("run.dir=x",)}, "run is the search's own: use DIR"),
        ({"overrides": ("train.steps=9",)}, "--steps and --long-steps"),
        ({"overrides": ("optimizer.lr=-1",)}, "the distillation's configuration: optimizer.lr"),
        ({"overrides": ("optimiser.lr=1",)}, "unknown key"),
        ({"tp": 3}, "tp=3 does not divide"),
        ({"tp": 2, "nproc": 3}, "cannot be divided by tp 2"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    work: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if changes.pop("same", False):
        changes["validation"] = (work / "train",)
    with pytest.raises(BevatronError) as refused:
        search(work, tmp_path / "out", **changes)
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(work: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BevatronError, match=r"holds notes\.txt and no search\.json"):
        search(work, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_two_searches_in_one_folder_exclude_each_other(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "LOCK_PATIENCE_S", 0.1)
    (tmp_path / "out").mkdir()
    with (
        lock(tmp_path / "out" / ".lock", "x", "y"),
        pytest.raises(BevatronError, match=r"is being searched in by process \d+"),
    ):
        search(work, tmp_path / "out")


def test_a_search_is_not_started_under_torchrun(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BevatronError, match=r"starts its processes itself.*--nproc"):
        search(work, tmp_path / "out")


def test_a_loss_that_is_not_finite_ranks_last() -> None:
    losses = {"a": 2.0, "b": None, "c": 1.0}
    found = [{"name": n, "parameters": 1, "losses": {"pruned": x}} for n, x in losses.items()]
    assert [c["name"] for c in ranked(found, "pruned")] == ["c", "a", "b"]
    stages = stages_of(Comparison(steps=4, short=3, long_steps=9, long=1))
    assert [s["name"] for s in stages] == ["pruned", "short", "long"]


@pytest.mark.slow
def test_layouts_find_the_same(work: Path, done: State, tmp_path: Path) -> None:
    """tp 2 x dp 2 in processes of its own, on the command line; JSON alone on stdout."""
    words = [*arguments(work, tmp_path / "out"), "--tp", "2", "--nproc", "4", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "bevatron", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    for one, other in zip(found["candidates"], done.candidates, strict=True):
        assert one["name"] == other["name"] and one["ranks"] == other["ranks"]
        for stage, loss in other["losses"].items():
            assert one["losses"][stage] == pytest.approx(loss, rel=1e-4)


def test_options_say_what_the_command_line_says(work: Path, tmp_path: Path) -> None:
    """The two spellings of the tests' search are one: else a kill test compares two searches."""
    here = Asked(str(work / "model"), options(work)).request()
    asked: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Search, "run", lambda self: asked.append(self.asked.request()))
        CliRunner().invoke(app, arguments(work, tmp_path / "out"))
    assert asked == [here]
