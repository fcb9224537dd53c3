"""Where a run may start: random weights, a Hugging Face folder, a native checkpoint, another run at
another layout; what it says when it continues, and what its folder records."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import bevatron
from bevatron.bridge.convert import import_checkpoint
from bevatron.parallel.whole_decoder import load_decoder
from tests.commands import bevatron as command
from tests.processes import Pool
from tests.train.tiny_run import check_steps, metrics, prepare, train


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    """`run`: random weights, trained at TP 2, and exported at its end."""
    folder = prepare(tmp_path_factory.mktemp("start"))
    options = ("parallel.tp=2", "checkpoint.weights_every=3", "checkpoint.export=hf")
    pool.run(2, train, folder, *options)
    return folder


def lines(run: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_the_export_at_the_end_is_what_was_trained(work: Path) -> None:
    ids = torch.arange(3, 20)[None]
    ours, _ = load_decoder(work / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "hf", dtype="auto")
    torch.testing.assert_close(ours.logits(ids), model(ids).logits, rtol=1e-5, atol=1e-5)
    assert (work / "hf" / "tokenizer.json").read_bytes() == (
        work / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_an_export_that_exists_is_refused_before_the_first_step(work: Path) -> None:
    options = ("run.dir=refused", "checkpoint.export=hf")
    status, said = command(work, "train", "run.yaml", *options)
    assert status == 2
    assert said.startswith("error: checkpoint.export: hf already exists")
    assert not (work / "refused").exists()


def test_a_run_that_is_done_exports_what_it_has_not_yet(work: Path) -> None:
    before = metrics(work / "run")
    status, said = command(work, "train", "run.yaml", "checkpoint.export=later", "parallel.tp=1")
    assert status == 0 and "nothing to do" in said
    assert metrics(work / "run") == before
    assert (work / "later" / "model.safetensors").read_bytes() == (
        work / "hf" / "model.safetensors"
    ).read_bytes()


def test_the_same_weights_from_anywhere_make_the_same_steps(work: Path) -> None:
    """A run at another layout, one of its steps, weights alone, an HF folder, and its import: two
    steps in one process, bit-equal."""
    import_checkpoint(work / "hf", work / "native", show_progress=False)
    found = {}
    for source in ("run", "run/step-00000006", "run/weights-00000006", "hf", "native"):
        name = source.replace("/", "-")
        status, said = command(work, "train", "run.yaml", f"run.dir=from-{name}", "train.steps=2",
                               "model.spec=null", f"model.init={source}")  # fmt: skip
        assert status == 0, said
        assert f"from {source}, step 0" in said
        found[source] = metrics(work / f"from-{name}")
    assert all(len(steps) == 2 for steps in found.values())
    assert all(steps == found["run"] for steps in found.values()), found
    assert found["run"][0][1] < metrics(work / "run")[0][1], "not the random weights again"


def test_a_run_says_what_changed_since_it_was_saved(work: Path) -> None:
    options = ("train", "run.yaml", "run.dir=said")
    command(work, *options, "train.steps=2")
    for steps, more, expected in (
        (3, (), "step 2: as it was saved: bit for bit the same numbers"),
        (4, ("train.micro_batch=1",), "train.micro_batch 2 -> 1: the same numbers up to rounding"),
    ):
        status, said = command(work, *options, f"train.steps={steps}", *more)
        assert status == 0 and expected in said, said


def test_a_run_at_another_layout_says_so(work: Path, pool: Pool) -> None:
    command(work, "train", "run.yaml", "run.dir=moved", "train.steps=2")
    whole = metrics(work / "run")
    pool.run(2, train, work, "run.dir=moved", "parallel.pp=2", "train.steps=4")
    status, said = command(work, "train", "run.yaml", "run.dir=moved")
    assert status == 0 and "layout pp 2 -> one process: the same numbers up to rounding" in said
    for got, want in zip(metrics(work / "moved"), whole, strict=True):
        assert got == (want[0], *(pytest.approx(x, rel=1e-5) for x in want[1:]))


def test_every_start_is_recorded(work: Path) -> None:
    """Which code, versions, machine and configuration made which steps."""
    command(work, "train", "run.yaml", "run.dir=recorded", "train.steps=2")
    command(work, "train", "run.yaml", "run.dir=recorded", "train.steps=3", "optimizer.eps=1e-7",
            "--allow-changed")  # fmt: skip
    first, second = lines(work / "recorded", "starts.jsonl")
    assert (first["from"], first["step"]) == ("spec.json", 0)
    assert (second["from"], second["step"]) == ("step-00000002", 2)
    assert first["torch"] == torch.__version__ and first["bevatron"] == bevatron.__version__
    assert first["python"] == platform.python_version() and first["layout"] == "one process"
    here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(here, check=False, capture_output=True, text=True)
    if head.returncode == 0:
        assert str(first["commit"]).rstrip("+") == head.stdout.strip()
    assert [line["config"]["optimizer"]["eps"] for line in (first, second)] == [1e-8, 1e-7]
    state = json.loads((work / "recorded" / "step-00000003" / "train_state.json").read_text())
    assert state["made_with"]["torch"] == torch.__version__


def test_fault_49_a_changed_batch_or_length_is_refused(work: Path) -> None:
    for value in ("train.global_batch=8", "data.seq_len=8"):
        more = ("run.dir=run", "train.steps=8", "parallel.tp=1", value)
        status, said = command(work, "train", "run.yaml", *more)
        assert status == 2 and value.partition("=")[0] in said
    assert check_steps(work / "run")[-1] == 6


UNSHARE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]


@pytest.mark.slow
def test_fault_55_a_full_disk_stops_the_run_and_harms_no_step(work: Path) -> None:
    """A real disk with room for two steps and a half; with more room the run goes on."""
    can = "mount -t tmpfs tmpfs /mnt"
    if subprocess.run([*UNSHARE, can], check=False, capture_output=True).returncode:
        pytest.skip("no filesystem can be mounted here")
    (work / "disk").mkdir()
    train = f"{sys.executable} -m bevatron train run.yaml run.dir=disk checkpoint.async=true"
    script = f"""
mount -t tmpfs -o size=1000k tmpfs disk
{train}; echo $? > full-status
cp -r disk full
mount -o remount,size=9m tmpfs disk
{train} || exit 1
cp -r disk roomy
"""
    done = subprocess.run(
        [*UNSHARE, script], check=False, cwd=work, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    assert (work / "full-status").read_text() == "2\n"
    assert "error: saving step 6 failed: " in done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert check_steps(work / "full") == [2, 4]
    assert not [p for p in (work / "full").iterdir() if p.name.startswith(".")]
    assert check_steps(work / "roomy") == [4, 6]
    assert [step for step, *_ in metrics(work / "roomy")] == list(range(1, 7))
