"""`bevatron report`: true numbers, nothing fetched from anywhere, no text of a run as markup."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bevatron.charts import html_page
from bevatron.cli.main import app
from bevatron.data.tokenize import tokenize
from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec
from bevatron.spec.json import to_json
from bevatron.train.bad_steps import event
from bevatron.train.launch import train
from bevatron.train.report import report
from bevatron.train.report.run_reading import read_run
from tests.specs import HOMOGENEOUS

CONFIG = """\
model: {spec: SPEC}
data: {train: [{path: tokens}], validation: [{path: tokens}], seq_len: 16}
train: {steps: 6, global_batch: 4, precision: fp32, val_every: 3, val_batches: 1}
optimizer: {lr: 1.0e-3}
checkpoint: {every: 3}
log: {tensorboard: true, peak_tflops: 0.5}
run: {dir: run}
"""
NASTY = """<script>alert("1")</script><img src=http://x.test/a.png>'&"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of six steps in this process."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text").mkdir()
    shutil.copy(json.__file__, folder / "text" / "a.txt")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: i + 1 for i, c in enumerate(alphabet)} | {"<unk>": 0}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (folder / "hf").mkdir()
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    tokenize([folder / "text"], folder / "tokens", tokenizer=folder / "hf", append_eos=False)
    (folder / "spec.json").write_text(to_json(ModelSpec(300, 32, HOMOGENEOUS.layers)))
    text = CONFIG.replace("SPEC", str(folder / "spec.json"))
    (folder / "run.yaml").write_text(text.replace("path: tokens", f"path: {folder / 'tokens'}"))
    train(folder / "run.yaml", [f"run.dir={folder / 'run'}"])
    return folder / "run"


class Page(HTMLParser):
    """Collects tags, text outside of scripts and styles, and scripts; checks that tags close."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text, self.scripts = "", []
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    @property
    def charts(self) -> list[dict[str, Any]]:
        """How each chart is drawn."""
        found = (a.get("data-chart") for t, a in self.tags if t == "figure")
        return [json.loads(text) for text in found if text]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data + "\n"


def test_the_numbers_of_a_real_run_are_on_its_page(run: Path) -> None:
    target = report([run])
    assert target == run / "report.html"
    page = Page(target.read_text())
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    assert f"{steps[-1]['loss']:.4f}" in page.text
    assert f"{[x['val_loss'] for x in lines if 'val_loss' in x][-1]:.4f}" in page.text
    assert "finished" in page.text and "step-00000006" in page.text
    assert page.text.count("complete") == 2
    assert "global batch" in page.text and "llama" in page.text
    drawn = [json.loads(s) for s in page.scripts if s.startswith("[")]
    loss, validation = drawn[0]
    assert loss["x"] == [1, 2, 3, 4, 5, 6]
    assert loss["y"] == pytest.approx([x["loss"] for x in steps], rel=1e-5)
    assert validation["x"] == [0, 3, 6]


def test_no_page_asks_for_anything_from_anywhere(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    text = Path(str(report([run, other], tmp_path / "both.html"))).read_text()
    library = (Path(html_page.__file__).parent / "vendor" / "echarts.min.js").read_text()
    assert text.count(library) == 1  # what it could ask for, the policy forbids: see tests/charts
    own = text.replace(library, "")
    assert not re.search(r"https?:|//[a-z]|@import|\burl\((?!#)|fetch\(|XMLHttp|import\(", own)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag in ("link", "script") or not {"src", "href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag != "script" or "src" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"
    policy = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy[0] is not None and policy[0].startswith("default-src 'none'")


def test_text_from_a_run_is_never_markup(run: Path, tmp_path: Path) -> None:
    """In the folder's name, events, the configuration, starts and a checkpoint's complaint."""
    folder = shutil.copytree(run, tmp_path / NASTY.replace("/", "_"))
    with (folder / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 6, "event": NASTY, "reason": NASTY, "loss": None}) + "\n")
        out.write('{"step": 7, "loss"')  # cut by a crash
    (folder / "starts.jsonl").write_text(
        "".join(json.dumps({"step": s, NASTY: {NASTY: NASTY}}) + "\n" for s in (0, 3))
    )
    newest = folder / "step-00000006"
    (newest / "config.yaml").write_text(json.dumps({NASTY: {"a": NASTY}, "b": [NASTY]}))
    plain, nasty = (Page(Path(str(report([f], tmp_path / "p.html"))).read_text())
                    for f in (run, folder))  # fmt: skip
    assert nasty.text.count(NASTY) >= 6
    for tag in ("script", "img"):
        count = [sum(t == tag for t, _ in page.tags) for page in (plain, nasty)]
        assert count[0] == count[1]


def test_events_and_restarts_are_marked_and_damage_is_named(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as out:
        out.write(json.dumps(event(4, "skipped", "the loss is too high", 99.0, math.nan)))
    (folder / "starts.jsonl").write_text('{"step": 0}\n{"step": 3, "ranks": 2}\n')
    weights = next((folder / "step-00000003" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    (folder / "step-00000006" / "manifest.json").unlink()
    record = read_run(folder)
    assert [(e.step, e.kind) for e in record.events] == [(3, "restart"), (4, "skipped")]
    assert 99.0 not in record.series["loss"].values, "the loss of a skipped step is no loss"
    states = [c.state for c in record.checkpoints]
    assert "bytes, expected" in states[0] and weights.name in states[0]
    assert states[1] == "incomplete: no manifest.json"
    page = Page(Path(str(report([folder]))).read_text())
    marks = [m for chart in page.charts for m in chart["marks"]]
    assert len(marks) == 4, "two on the loss, two on the gradient norm"
    assert [bad for _, _, _, bad, _ in marks] == [False, True] * 2, "the skipped step is red"


def long_run(folder: Path, losses: Sequence[float], *events: dict[str, object]) -> Path:
    folder.mkdir()
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *events])
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_falling_curve_is_there_from_its_first_step_on(tmp_path: Path) -> None:
    losses = [2 + 9 * math.exp(-step / 4) for step in range(1000)]
    page = Page(Path(str(report([long_run(tmp_path / "run", losses)]))).read_text())
    assert "top" not in page.charts[0], "nothing is cut off"
    (loss,) = next(json.loads(s) for s in page.scripts if s.startswith("["))
    assert loss["x"] == list(range(1, 1001))
    assert loss["y"][0] == pytest.approx(losses[0], rel=1e-5)
    assert loss["mean"][0] == pytest.approx(losses[0], rel=1e-5), "smoothing does not hide it"


def test_under_the_pointer_are_the_run_s_own_values_and_the_smoothed_beside_them(
    tmp_path: Path,
) -> None:
    losses = [2.0 + step % 2 for step in range(100)]
    page = Page(Path(str(report([long_run(tmp_path / "run", losses)]))).read_text())
    (loss,) = next(json.loads(s) for s in page.scripts if s.startswith("["))
    assert loss["y"] == losses and loss["x"] == list(range(1, 101))
    assert loss["mean"][50] == pytest.approx(2.5, abs=0.2)
    assert "3" in page.text.split("Loss")[2].splitlines()[1], "the last value, not its mean"


def test_events_of_several_runs_say_whose_they_are(tmp_path: Path) -> None:
    skipped = event(5, "skipped", "the loss is nan", math.nan, 1.0)
    runs = [long_run(tmp_path / name, [3.0] * 9, skipped) for name in ("left", "right")]
    page = Page(Path(str(report(runs, tmp_path / "both.html"))).read_text())
    for run, name in enumerate(("left", "right")):
        said = f"{name}, step 5: skipped. the loss is nan; grad_norm 1"
        assert [run, 5, said, True, True] in page.charts[0]["marks"]


def test_several_runs_are_overlaid_and_their_differences_named(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    config = other / "step-00000006" / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.5"))
    page = Page(Path(str(report([run, other], tmp_path / "both.html"))).read_text())
    assert "What differs" in page.text and "optimizer.lr" in page.text
    assert "seq_len" not in page.text.split("Checkpoints")[0]
    drawn = [json.loads(s) for s in page.scripts if s.startswith("[")]
    assert [c["label"] for c in drawn[0]] == [str(run), str(other)], "one name: whole paths"


def test_json_has_the_headline_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["report", str(run), "--json"], standalone_mode=False)
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["steps"], found["planned_steps"], found["tokens"]) == (6, 6, 6 * 4 * 16)
    assert found["mfu"] > found["mfu_causal"] > 0
    assert [c["step"] for c in found["checkpoints"]] == [3, 6]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BevatronError, match="expected a run's folder"):
            report([path])


def test_a_page_in_a_folder_that_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BevatronError, match=f"there is no folder {tmp_path / 'no'}$"):
        report([run], tmp_path / "no" / "page.html")
