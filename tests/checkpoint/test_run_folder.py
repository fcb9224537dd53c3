"""What a run's folder keeps, what it clears, and whom it lets in."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from bevatron.checkpoint import run_folder
from bevatron.checkpoint.manifest import Manifest, read_manifest
from bevatron.checkpoint.read_boxes import hash_file
from bevatron.checkpoint.run_folder import RunFolder, resolve
from bevatron.errors import BevatronError, CheckpointError


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def save(run: RunFolder, step: int, kind: str = "step", **texts: str) -> Path:
    folder = run.begin(step, kind, "abc")
    return run.commit(folder, step, Manifest("llama", step, {}), {"spec.json": "{}", **texts}, kind)


def names(run: RunFolder) -> list[str]:
    return sorted(p.name for p in run.path.iterdir())


def test_a_manifest_holds_the_hash_of_every_other_file(run: RunFolder) -> None:
    folder = run.begin(1)
    (folder / "source" / "deep").mkdir(parents=True)
    (folder / "source" / "deep" / "file").write_text("x")
    (folder / "model").mkdir()
    (folder / "model" / "rank-00000.safetensors").write_text("tensors have hashes of their own")
    step = run.commit(folder, 1, Manifest("llama", 1, {}), {"spec.json": "{}"})
    files = read_manifest(step).extra["files"]
    assert set(files) == {"spec.json", "source/deep/file"}
    assert all(hash_file(step / name) == found for name, found in files.items())


def test_fault_57_retention_keeps_the_newest_and_the_multiples(run: RunFolder) -> None:
    for step in range(100, 1100, 100):
        save(run, step)
        run.retain(keep=2, keep_every=500)
    assert [p.name for p in run.step_folders()] == [
        "step-00000500", "step-00000900", "step-00001000"
    ]  # fmt: skip
    run.retain(keep=0)
    assert [p.name for p in run.step_folders()] == ["step-00001000"], "never the only one"


def test_fault_57_weights_and_full_steps_are_kept_apart(run: RunFolder) -> None:
    """Weights alone are no step: not the newest, not counted, not pointed to."""
    for step in (1, 2, 3):
        save(run, step)
        save(run, step + 10, "weights")
    run.retain(keep=1)
    assert names(run) == ["latest", "step-00000003", *(f"weights-000000{n}" for n in (11, 12, 13))]
    run.retain(keep=2, kind="weights")
    assert names(run) == ["latest", "step-00000003", "weights-00000012", "weights-00000013"]
    newest = run.newest()
    assert newest is not None and newest.name == "step-00000003" == resolve(run.path).name


def test_fault_56_a_clock_that_goes_back_changes_nothing(run: RunFolder) -> None:
    for step, time in ((1, 3e9), (2, 2e9), (3, 1e9)):
        folder = save(run, step)
        for path in [folder, *folder.iterdir()]:
            os.utime(path, (time, time))
    assert run.newest() == run.path / "step-00000003"
    run.retain(keep=1)
    assert run.step_folders() == [run.path / "step-00000003"]


def test_steps_are_ordered_by_number(run: RunFolder) -> None:
    save(run, 99_999_999)
    save(run, 100_000_000)
    run.retain(keep=1)
    assert [p.name for p in run.step_folders()] == ["step-100000000"]


def test_faults_43_44_what_killed_runs_left_is_cleared(run: RunFolder) -> None:
    """Unfinished saves, of the next step too; deletions; a step moved aside for a new one."""
    save(run, 1)
    unfinished = (
        ".step-00000002.partial",
        ".step-00000001.abc.partial",
        ".weights-00000002.partial",
    )
    for left in (*unfinished, ".step-00000000.deleted"):
        (run.path / left / "model").mkdir(parents=True)
        (run.path / left / "manifest.json").write_text("{}")
    save(run, 3).rename(run.path / ".step-00000003.old")
    (run.path / ".mine").mkdir()
    (run.path / "step-00000007-copy").mkdir()
    with run.occupied():
        assert names(run) == [
            ".lock", ".mine", "latest", "step-00000001", "step-00000003", "step-00000007-copy"
        ]  # fmt: skip
    save(run, 2)
    assert [p.name[-1] for p in run.step_folders()] == ["1", "2", "3"]


def test_fault_44_a_partial_folder_under_the_same_name_is_not_mixed_in(run: RunFolder) -> None:
    stale = run.begin(1, token="abc")
    (stale / "stale").write_text("x")
    assert not (save(run, 1) / "stale").exists()


def test_fault_45_a_pointer_to_a_missing_step(run: RunFolder) -> None:
    """Readers are told; a run looks at the steps and not at the pointer."""
    save(run, 1)
    (run.path / "latest").write_text("step-00000009\n")
    with pytest.raises(CheckpointError, match=r"step-00000009.*missing.*step-00000001"):
        resolve(run.path)
    assert run.newest() == run.path / "step-00000001"


def test_a_damaged_step_is_renamed_never_over_another(run: RunFolder) -> None:
    for _ in range(3):
        run.set_aside(save(run, 5))
    assert names(run) == ["damaged-step-00000005", "damaged-step-00000005-2",
                          "damaged-step-00000005-3", "latest"]  # fmt: skip
    assert run.folders() == []


def hold(path: Path, pipe: Connection) -> None:
    with RunFolder(path).occupied():
        pipe.send(os.getpid())
        pipe.recv()


def test_two_runs_in_one_folder_the_second_is_refused_by_name(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.2)
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(run.path, theirs))
    process.start()
    number = ours.recv()
    (run.path / ".step-00000001.partial").mkdir()
    with pytest.raises(BevatronError, match=f"in use by process {number} on .*run.dir"):
        run.occupied().__enter__()
    assert (run.path / ".step-00000001.partial").exists(), "it may be written just now"
    process.kill()
    process.join()
    with run.occupied():
        assert names(run) == [".lock"]


def test_files_of_something_else_are_told_from_a_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "some")
    assert folder.foreign() == []
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    assert folder.foreign() == []
    for name in ("b.txt", "a.txt"):
        (folder.path / name).touch()
    assert folder.foreign() == ["a.txt", "b.txt"]
    (folder.path / "starts.jsonl").touch()
    assert folder.foreign() == []


def test_a_folder_that_was_made_for_nothing_is_gone(run: RunFolder) -> None:
    with run.occupied():
        assert run.path.is_dir()
    assert not run.path.exists()
