"""What a run reports: complete lines, MFU in both conventions, trackers that cannot stop it."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bevatron.checkpoint.run_folder import RunFolder
from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout
from bevatron.progress import duration
from bevatron.spec import ModelSpec
from bevatron.spec.count import flops_per_token, forward_flops_per_token
from bevatron.train import trackers
from bevatron.train.config import LogConfig, RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.hardware import PEAK_BF16, peak_by_name
from bevatron.train.step_metrics import Meter, short
from bevatron.train.trackers import Trackers, check_trackers
from tests.specs import HETEROGENEOUS, HOMOGENEOUS

CONFIG = """\
model: {spec: x}
data: {train: [{path: tokens}], seq_len: 16}
train: {steps: 7, global_batch: 8}
optimizer: {lr: 1.0e-4}
run: {dir: run}
"""
PUBLIC = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "mfu_causal"}
PUBLIC |= {"memory_gib"}


def config_of(folder: Path, *overrides: str) -> RunConfig:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(CONFIG)
    return load_config(folder / "run.yaml", list(overrides))


def metered(
    folder: Path, *overrides: str, ranks: int = 1, steps: int = 7, beside: Sequence[ModelSpec] = ()
) -> list[dict[str, Any]]:
    """The lines of a run whose every step takes half a second."""
    config, run = config_of(folder, *overrides), RunFolder(folder / "run")
    layout, device = Layout(dp_shard=ranks), torch.device("cpu")
    meter = Meter(config, HOMOGENEOUS, layout, device=device, folder=run, step=0, beside=beside)
    shown: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        meter.step(
            step,
            tokens=128 * step,
            seconds=0.5,
            values={"loss": 3.0 - step / 10, "grad_norm": 0.5, "lr": 1e-4},
            advance=lambda n=1, **fields: shown.append(fields),
            data_wait=0.1,
        )
    meter.validation(steps, {"val_loss": 2.5})
    meter.close()
    assert len(shown) == steps and shown[0]["loss"] == "2.9000" and shown[0]["tok/s"] == "256"
    assert shown[0]["data wait"] == "20%"
    return [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_every_line_has_the_public_names(tmp_path: Path) -> None:
    *lines, validation = metered(tmp_path)
    assert len(lines) == 7
    assert all(set(line) >= PUBLIC for line in lines)
    assert lines[0]["mfu"] is None, "a CPU's peak is not known"
    assert lines[3]["tokens_per_s"] == 256 and lines[3]["memory_gib"] > 0
    assert validation == {"step": 7, "val_loss": 2.5}


def test_mfu_is_flops_over_the_peak_of_all_ranks_in_both_conventions(tmp_path: Path) -> None:
    line = metered(tmp_path, "log.peak_tflops=0.25", ranks=4)[0]
    for key, causal in (("mfu", False), ("mfu_causal", True)):
        flops = flops_per_token(HOMOGENEOUS, 16, causal)
        assert line[key] == pytest.approx(256 * flops / (4 * 0.25e12))
    assert line["tokens_per_s_per_device"] == 64


def test_mfu_counts_the_forward_of_a_teacher(tmp_path: Path) -> None:
    options = ("log.peak_tflops=0.25",)
    alone = metered(tmp_path / "alone", *options)[0]
    beside = metered(tmp_path / "beside", *options, beside=[HETEROGENEOUS])[0]
    for key, causal in (("mfu", False), ("mfu_causal", True)):
        flops = forward_flops_per_token(HETEROGENEOUS, 16, causal)
        assert beside[key] - alone[key] == pytest.approx(256 * flops / 0.25e12)


def test_a_line_every_so_many_steps_and_always_the_first_and_the_last(tmp_path: Path) -> None:
    lines = metered(tmp_path, "log.every=3")
    assert [x["step"] for x in lines if "loss" in x] == [1, 3, 6, 7]


def test_tensorboard_reads_back_what_was_logged_and_a_resume_replaces_its_steps(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metered(tmp_path, "log.tensorboard=true")
    resumed = Trackers(config_of(tmp_path, "log.tensorboard=true"), tmp_path / "run", 5)
    resumed.log({"step": 6, "loss": 9.0, "event": "text is left out", "mfu": None})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"loss", "grad_norm", "lr", "val_loss"}
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [
        (1, 2.9), (2, 2.8), (3, 2.7), (4, 2.6), (5, 2.5), (6, 9.0),
    ]  # fmt: skip


def killed_and_started_again(folder: Path, option: str, step: int) -> None:
    """Steps 1 to 6 whose process is gone before anything is closed; then on from `step`, or from
    the beginning (-1), to step 8."""
    config, run = config_of(folder, option), RunFolder(folder / "run")
    run.path.mkdir()
    first = Trackers(config, run.path, -1)
    for n in range(1, 7):
        run.append_metrics({"step": n, "loss": 10.0 - n, "event": "text is left out"})
        first.log({"step": n, "loss": 10.0 - n})
    for tracker in first.open.values():
        if isinstance(tracker, trackers.Tensorboard):
            tracker.writer.flush()
        else:
            tracker.close()
    second = Trackers(config, run.path, step)
    run.drop_metrics_after(step)
    for n in range(max(step, 0) + 1, 9):
        second.log({"step": n, "loss": 20.0 - n})
    second.close()


@pytest.mark.parametrize("step", [4, -1])
def test_tensorboard_has_every_step_of_a_killed_run_once(tmp_path: Path, step: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_started_again(tmp_path / "a", "log.tensorboard=true", step)
    events = EventAccumulator(str(tmp_path / "a" / "run" / "tensorboard"))
    events.Reload()
    expected = [(n, 10.0 - n if n <= step else 20.0 - n) for n in range(1, 9)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == expected


TRACKIO = """
import sys
from pathlib import Path
from tests.train.test_meter import killed_and_started_again
killed_and_started_again(Path(sys.argv[1]), "log.trackio=true", int(sys.argv[2]))
"""


@pytest.mark.parametrize("step", [4, -1])
def test_trackio_has_every_step_of_a_killed_run_once(tmp_path: Path, step: int) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", TRACKIO, str(tmp_path / "a"), str(step)]
    root = Path(__file__).parents[2]
    subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True)
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics")
    found = sorted((name, n, json.loads(values)["loss"]) for name, n, values in rows)
    expected = [("run", n, 10.0 - n if n <= step else 20.0 - n) for n in range(1, 9)]
    assert found == expected


def test_wandb_begins_another_run_with_the_whole_past_when_steps_come_again(
    tmp_path: Path,
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    script = TRACKIO.replace("trackio", "wandb")
    command = [sys.executable, "-c", script, str(tmp_path / "a"), "4"]
    root = Path(__file__).parents[2]
    subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True)
    runs = sorted((tmp_path / "a/run/wandb").glob("offline-run-*"))
    assert len({run.name.rpartition("-")[2] for run in runs}) == len(runs) == 2
    assert (tmp_path / "a/run/wandb-id.txt").read_text() == runs[1].name.rpartition("-")[2]


class Broken:
    """A tracker whose network is gone."""

    def __init__(self, config: RunConfig, folder: Path, past: trackers.Past) -> None:
        self.logged = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        raise ConnectionError("no route to host")

    def close(self) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_named_once_and_never_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.KINDS, "wandb", Broken)
    lines = metered(tmp_path, "log.wandb=true")
    assert len(lines) == 8
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and "log.wandb" in said and "no route to host" in said


def test_a_tracker_that_is_not_installed_is_refused_before_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers(LogConfig())
    with pytest.raises(BevatronError, match="`pip install trackio`"):
        check_trackers(LogConfig(trackio=True))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("AMD Instinct MI300X", 1307),
        ("NVIDIA RTX A4000", None), ("NVIDIA H20", 148), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_by_the_names_that_drivers_report(name: str, tflops: float | None) -> None:
    assert peak_by_name(name) == (None if tflops is None else tflops * 1e12)
    assert all(100 <= peak <= 3000 or part in ("A10G", "RTX 3090")
               for part, peak in PEAK_BF16.items())  # fmt: skip


def test_bits_per_byte_needs_stores_that_know_their_bytes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = RunFolder(tmp_path / "run")
    meter = Meter(config, HOMOGENEOUS, Layout(), device=torch.device("cpu"), folder=run, step=0)
    assert meter.bytes_per_token is None  # its stores were not made from text
    meter.bytes_per_token = 4.0
    meter.validation(1, {"val_loss": 2 * math.log(2)})
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["val_bpb"] == pytest.approx(0.5)


def test_numbers_and_durations_as_people_read_them() -> None:
    assert [short(x) for x in (0.5, 950, 12_345, 999_999, 4.57e6, 2e9)] == [
        "0.5", "950", "12.3k", "1.00M", "4.57M", "2.00B",
    ]  # fmt: skip
    assert [duration(x) for x in (3, 61, 3_725, 90_000)] == ["3 s", "1:01", "1:02:05", "1 d 1:00"]
