"""A language model becomes a classifier: it learns, resumes, and is the same in transformers."""

from __future__ import annotations

import asyncio
import email
import encodings
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import compare_logits
from bevatron.train.config_file import load_config
from bevatron.train.labelled_feed import LabelledFeed
from bevatron.train.launch import layout_of, train
from bevatron.train.launch import work as work_
from bevatron.train.run_start import find_start
from tests.labelled_data import save_llama, save_tokenizer, write_rows
from tests.processes import Pool

PACKAGES = {"asyncio": asyncio, "email": email, "encodings": encodings}
T = 64

CONFIG = """\
model: {init: hf}
objective: {name: sequence_classification, labels: [asyncio, email, encodings]}
data: {train: [{path: train.jsonl}], validation: [{path: held-out.jsonl}], seq_len: 64}
train: {steps: 60, global_batch: 24, micro_batch: 24, precision: fp32, val_every: 60,
        val_batches: 5}
optimizer: {lr: 3.0e-3}
schedule: {warmup_steps: 5}
run: {dir: run}
"""


def snippets() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pieces of 200 characters of three packages; the held-out ones are of other files."""
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for label, package in PACKAGES.items():
        files = sorted(Path(str(package.__file__)).parent.glob("*.py"))
        for i, file in enumerate(files[:24]):
            text = file.read_text(encoding="utf-8")
            held_out = i % 6 == 5
            pieces = [text[at : at + 200] for at in range(0, min(len(text), 6000), 200)]
            kept = pieces[:: 3 if held_out else 1][: 10 if held_out else 30]
            parts[held_out].extend({"text": piece, "label": label} for piece in kept)
    return parts


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine-tune")
    rows, held_out = snippets()
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "held-out.jsonl", held_out[:120])
    save_llama(folder / "hf")
    save_tokenizer(folder / "hf", (row["text"] for row in rows[::5]))
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_classifier_learns_and_says_the_same_in_transformers(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported folder loads in the stock class, with labels and pad token,
    and its predictions on the held-out texts are as accurate as validation said."""
    monkeypatch.chdir(work)
    train(Path("run.yaml"), [])
    *_, last, validation = metrics(work / "run")
    rows = [json.loads(line) for line in (work / "held-out.jsonl").read_text().splitlines()]
    labels = [row["label"] for row in rows]
    chance = max(labels.count(name) for name in PACKAGES) / len(labels)
    assert chance < 0.45 and validation["val_accuracy"] > 0.7
    assert last["loss"] < 1 and last["accuracy"] > 0.5

    export_checkpoint("run", "out")
    config = json.loads((work / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "asyncio", "1": "email", "2": "encodings"}
    assert config["problem_type"] == "single_label_classification"
    facts = json.loads((work / "out" / "bevatron.json").read_text())
    assert facts["skipped"] == {"lm_head.weight": "its head was replaced"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [row["text"] for row in rows]
    inputs = tokenizer(texts, truncation=True, max_length=T, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            **inputs, labels=torch.tensor([model.config.label2id[row["label"]] for row in rows])
        )
    said = [model.config.id2label[i] for i in out.logits.argmax(-1).tolist()]
    right = sum(a == row["label"] for a, row in zip(said, rows, strict=True))
    assert right / len(rows) == pytest.approx(validation["val_accuracy"])
    assert float(out.loss) == pytest.approx(validation["val_loss"], rel=1e-4)


KINDS = {
    "sequence": ("sequence_classification", ["labels=[low, high]"], "SequenceClassification"),
    "multi": ("sequence_classification",
              ["labels=[a, b, c]", "problem_type=multi_label_classification"],
              "SequenceClassification"),
    "tokens": ("token_classification", ["labels=[O, B-X, I-X]"], "TokenClassification"),
    "answers": ("question_answering", ["stride=4"], "QuestionAnswering"),
}  # fmt: skip
CONTEXT = "The accelerator began operating in 1954 and closed in 1993."
ROWS: dict[str, list[dict[str, Any]]] = {
    "sequence": [{"text": f"number {i}", "label": int(i > 5)} for i in range(11)],
    "multi": [{"text": f"number {i}", "label": ["a", "c"][: i % 3]} for i in range(11)],
    "tokens": [{"tokens": ["a", "word", str(i)], "labels": ["O", -100, "B-X"]} for i in range(11)],
    "answers": [{"question": "When?" * i, "context": CONTEXT,
                 "answers": {"text": ["1954"], "answer_start": [35]}} for i in range(1, 6)],
}  # fmt: skip


def overrides(kind: str, *more: str) -> list[str]:
    name, options, _ = KINDS[kind]
    return [f"objective.name={name}", "objective.labels=[]", *(f"objective.{o}" for o in options),
            f"data.train.0.path={kind}.jsonl", f"data.validation.0.path={kind}.jsonl",
            "data.seq_len=32", "train.global_batch=4", "train.micro_batch=1", *more]  # fmt: skip


@pytest.fixture(scope="module")
def kinds(work: Path) -> Path:
    for kind, rows in ROWS.items():
        write_rows(work / f"{kind}.jsonl", rows)
    save_tokenizer(work / "other", ["another text"])
    tied = save_llama(work / "tied", tie_word_embeddings=True, initializer_range=0.05)
    labels = dict(enumerate(PACKAGES))
    own = save_llama(work / "classifier", "SequenceClassification", id2label=labels,
                     problem_type="single_label_classification")  # fmt: skip
    for file in work.glob("hf/tokenizer*"):
        for folder in (tied, own):
            (folder / file.name).write_bytes(file.read_bytes())
    import_checkpoint(tied, work / "native", show_progress=False)
    return work


@pytest.mark.parametrize(("kind", "init"), [("sequence", "tied"), ("tokens", "native"),
                                            ("answers", "hf"), ("multi", "native")])  # fmt: skip
def test_a_new_head_stands_on_the_body_as_it_was(
    kinds: Path, kind: str, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step with hardly any rate: the body keeps its values, the head is a normal draw with
    initializer_range, its bias zero, and stock transformers computes the same scores."""
    monkeypatch.chdir(kinds)
    run = f"new-{kind}"
    short = ["train.steps=1", "train.val_every=0", "optimizer.lr=1e-30", f"run.dir={run}"]
    train(Path("run.yaml"), overrides(kind, f"model.init={init}", *short))
    export_checkpoint(run, f"{run}-out", show_progress=False)
    source = load_file(("tied" if init == "native" else init) + "/model.safetensors")
    model = getattr(transformers, f"AutoModelFor{KINDS[kind][2]}")
    loaded, info = model.from_pretrained(f"{run}-out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = loaded.state_dict()
    prefix = "transformer." if kind == "answers" else "model."
    for name, values in source.items():
        if name != "lm_head.weight":
            assert torch.equal(found[prefix + name.removeprefix("model.")], values), name
    head = "qa_outputs" if kind == "answers" else "score"
    std = 0.02 if init == "hf" else 0.05
    assert float(found[f"{head}.weight"].std()) == pytest.approx(std, rel=0.3)
    if kind in ("tokens", "answers"):
        assert found[f"{head}.bias"].abs().max() < 1e-20
    compared = compare_logits(Path(run), Path(f"{run}-out"))
    assert compared["b"] == "transformers" and compared["max_abs_difference"] < 1e-5
    if kind == "multi":
        assert loaded.config.problem_type == "multi_label_classification"


def run_part(folder: str, options: list[str]) -> None:
    os.chdir(folder)
    config = load_config(Path("run.yaml"), options)
    work_(config, layout_of(config, dist.get_world_size()), False)


def test_a_run_on_labelled_examples_resumes_at_another_layout(kinds: Path, pool: Pool) -> None:
    """Across epochs (17 windows, 4 a step): losses, metrics and validation as in one
    process without a stop. The new head is drawn alike at every layout."""
    options = overrides("answers", "train.steps=6", "train.val_every=3", "train.val_batches=null")
    options.append("schedule.name=constant")
    more = ["train.val_batches=9", "run.dir=whole"]  # than there are
    pool.run(1, run_part, str(kinds), [*options, *more])
    for layout in (["train.steps=3", "parallel.tp=2"], ["parallel.pp=2"]):
        pool.run(2, run_part, str(kinds), [*options, *layout, "run.dir=parts"])
    got, want = metrics(kinds / "parts"), metrics(kinds / "whole")
    assert len(got) == len(want) == 9
    for a, b in zip(got, want, strict=True):
        for key in {*a} & {"step", "loss", "grad_norm", "exact_match", "f1", "val_loss", "val_f1"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)


def feed(options: list[str], **place: int) -> LabelledFeed:
    config = load_config(Path("run.yaml"), options)
    where = {"dp_rank": 0, "dp": 1, **place}
    return LabelledFeed(config, find_start(config), global_batch=4, seed=7,
                        device=torch.device("cpu"), **where)  # fmt: skip


def test_every_example_comes_once_an_epoch_and_validation_once_in_order(
    kinds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kinds)
    options = overrides("sequence", "run.dir=not-started")
    one = feed(options)
    in_order = [one.validation_batch(i) for i in range(4)]
    tokens = torch.cat([part["tokens"] for part in in_order])
    labels = torch.cat([part["labels"] for part in in_order])
    assert labels.tolist() == [int(i > 5) for i in range(11)] + [-100] * 5
    name = {tuple(t): i for i, t in enumerate(tokens[:11].tolist())}
    assert len(name) == 11
    drawn = [name[tuple(t)] for step in range(11) for t in one.batch(step)["tokens"].tolist()]
    epochs = [drawn[at : at + 11] for at in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "every epoch in another order"
    parts = [feed(options, dp_rank=rank, dp=2).batch(5) for rank in range(2)]
    for key, whole in one.batch(5).items():
        assert torch.equal(torch.cat([part[key] for part in parts]), whole)


def test_a_question_that_is_too_long_is_found_before_the_first_step(
    kinds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kinds)
    write_rows(
        kinds / "long.jsonl", [ROWS["answers"][0], {**ROWS["answers"][0], "question": "?" * 99}]
    )
    options = overrides("answers", "data.train.0.path=long.jsonl", "run.dir=refused")
    with pytest.raises(BevatronError, match=r"long\.jsonl: line 2: .*data\.seq_len 32"):
        feed(options)


MISMATCHES = [
    (["objective.name=classify"], "known are pretrain, distill, on_policy_distill, "),
    (["objective.z_loss=0.1"], "z_loss means nothing to sequence_classification, only to pretrain"),
    (["objective.labels=[a, a]"], "labels has a name twice"),
    (["objective.labels=[]"], "objective.labels: missing"),
    (["objective.name=pretrain", "objective.labels=[]", "model.init=classifier"],
     "needs a model with a causal_lm head.*use objective.name: sequence_classification"),
    (["objective.name=question_answering", "objective.labels=[]", "model.init=classifier"],
     "use objective.name: sequence_classification, or set objective.new_head: true"),
    (["objective.labels=[a, b]", "model.init=classifier"], "to go on with these"),
    (["objective.problem_type=regression", "model.init=classifier"], "is for single_label_class"),
    (["model.init=classifier", "data.train.0.path=sequence.jsonl", "objective.labels=[]"],
     None),
    (["data.train.0.path=multi.jsonl"], r"line 1: the label \[\] is not one of the model's"),
    (["tokenizer=other"], "is not the tokenizer.json that lies with the model"),
    (["parallel.cp=2"], "use cp: 1"),
    (["data.document_mask=true"], "document_mask is for packed"),
    (["data.train.0.path=hf"], "is a folder; this objective reads examples"),
    (["model.init=null", "model.spec=llama3.2-1b"], "tokenizer: missing"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISMATCHES)
def test_objective_model_and_data_that_do_not_fit_are_refused_with_advice(
    kinds: Path, changes: list[str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kinds)

    def check() -> None:
        config = load_config(Path("run.yaml"), ["run.dir=refused", *changes])
        LabelledFeed.check(config, find_start(config))

    if message is None:
        check()
        return
    with pytest.raises(BevatronError, match=message):
        check()


def test_the_documentations_configurations_take_its_rows(
    kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/finetune-heads.md").read_text()
    configs = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    examples = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert len(configs) == len(examples) == 3
    monkeypatch.chdir(tmp_path)
    for config, rows in zip(configs, examples, strict=True):
        Path("run.yaml").write_text(config)
        for name in ("train.jsonl", "validation.jsonl"):
            Path(name).write_text(rows)
        loaded = load_config(Path("run.yaml"), [f"model.init={kinds / 'hf'}"])
        LabelledFeed.check(loaded, find_start(loaded))
