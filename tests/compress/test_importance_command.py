"""`bevatron importance`: the file, the page, the summary, and failures before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bevatron.cli.main import app
from bevatron.compress.importance_command import layout_of
from bevatron.compress.importance_page import page
from bevatron.compress.importance_scores import Scores
from bevatron.compress.pruned_spec import layers_to_keep
from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout, LayoutError
from tests.charts.drawn import drawn
from tests.compress.calibration import write_tokens
from tests.compress.test_importance import save_hf
from tests.compress.test_scores import scores_of
from tests.specs import HETEROGENEOUS


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["importance", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_scores_a_page_and_a_summary(tmp_path):
    folder, tokens = save_hf(tmp_path / "hf", "llama"), write_tokens(tmp_path / "tokens")
    out, html = tmp_path / "scores.safetensors", tmp_path / "scores.html"
    said = run(
        folder, out, "--data", tokens, "--samples", 6, "--seq-len", 16, "--layers", "spans",
        "--span", 2, "--html", html, "--json",
    )  # fmt: skip
    found, scores = json.loads(said), Scores.read(out)
    assert found["tokens"] == 96 and found["loss"] == float(scores.metadata["loss"])
    np.testing.assert_allclose(found["loss_without_2"], scores.loss_without(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", html.name, out.name, "tokens"]
    text = html.read_text()
    assert "Loss added by leaving out 2 layers" in text
    assert "2" in drawn(text)["Attention heads, sorted within each layer"][0]["rows"]
    assert "default-src 'none'" in text  # it asks for nothing


def test_a_page_shows_what_there_is_and_escapes_names():
    scores = scores_of(HETEROGENEOUS)
    scores.metadata["model"] = "<script>alert(1)</script>"
    text = page(scores)
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    charts = drawn(text)
    (heads, cells), (_, neurons) = (
        charts[f"{what}, sorted within each layer"] for what in ("Attention heads", "Neurons")
    )
    assert sum(y == 0 for _, y, *_ in cells) == 4
    assert "1" not in heads["rows"], "it has no attention"
    assert sum(y == 1 for _, y, *_ in neurons) == 27


def test_layers_are_bars_and_axes_and_shades_have_names_and_units():
    scores = scores_of(HETEROGENEOUS)
    text = page(scores)
    count = len(HETEROGENEOUS.layers)
    charts = drawn(text)
    shown, (bars,) = charts["Block influence"]
    assert bars["style"] == "bars" and len(bars["y"]) == count
    values = scores.block_influence.tolist()
    assert bars["names"] == [f"layer {i}: {value:.4g}" for i, value in enumerate(values)]
    assert shown["axis"] == "layer"
    assert shown["value"] == "1 - mean cosine of the residual stream before and after"
    channels = charts["Channels of the residual stream"][0]
    assert channels["axis"] == "channels, from the most important on"
    shown, cells = charts["Attention heads, sorted within each layer"]
    assert shown["axis"] == "heads of a layer, from the most important on"
    first = np.argsort(-scores.heads(0))
    row = [(name, share) for _, y, share, _, name in cells if y == 0]
    assert [name for name, _ in row] == [f"head {i}" for i in first], "the most important first"
    assert row[0][1] == 1, "relative to the highest of its layer"


def test_what_it_would_drop_is_what_prune_drops():
    scores = scores_of(HETEROGENEOUS)
    count = len(HETEROGENEOUS.layers)
    keep = 3 * count // 4
    kept = layers_to_keep(scores, count, keep, "influence")
    gone = [i for i in range(count) if i not in kept]
    text = page(scores)
    assert f"--num-layers {keep}</code></td><td>layers {', '.join(map(str, gone))}</td>" in text
    (bars,) = drawn(text)["Block influence"][1]
    assert bars["marked"] == gone
    assert f"red: what --num-layers {keep} drops" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--data", "none"], "none: "),
        (["missing/out", "--data", "tokens"], "its folder missing does not exist"),
        ([".", "--data", "tokens"], "is a folder"),
        (["out", "--data", "tokens", "--samples", "5000"], "5000 were asked for"),
        (["out", "--data", "tokens", "--seq-len", "16", "--tp", "3"], "tp=3 does not divide"),
        (["out", "--data", "tokens", "--tp", "2", "--nproc", "3"], "cannot be divided by tp 2"),
    ],
)
def test_failures_come_before_anything_starts(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_hf(Path("hf"), "llama")
    write_tokens(Path("tokens"))
    with pytest.raises(BevatronError, match=message):
        run("hf", *arguments)
    assert not Path("out").exists()


def test_what_is_left_of_the_processes_is_data_parallel():
    assert layout_of(8, 2, 2, None) == Layout(tp=2, pp=2, dp_shard=2)
    assert layout_of(8, 2, 1, 2) == Layout(tp=2, dp_replicate=2, dp_shard=2)
    with pytest.raises(LayoutError, match="start a multiple of 4"):
        layout_of(6, 2, 1, 2)


@pytest.mark.slow
def test_processes_of_its_own_write_the_same_scores(tmp_path):
    folder, tokens = save_hf(tmp_path / "hf", "llama"), write_tokens(tmp_path / "tokens")
    common = ["--data", tokens, "--samples", 7, "--seq-len", 16, "--json"]
    run(folder, tmp_path / "a", *common)
    done = subprocess.run(
        [sys.executable, "-m", "bevatron", "importance", folder, tmp_path / "b", "--tp", "2"]
        + [str(word) for word in common],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["layout"] == "tp 2 + SP"
    a, b = Scores.read(tmp_path / "a"), Scores.read(tmp_path / "b")
    for name, values in a.tensors.items():
        np.testing.assert_allclose(b.tensors[name], values, rtol=1e-5, atol=1e-5)
