"""`bevatron eval` on tokens and text says what transformers computes, of every token once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from bevatron.cli.main import app
from bevatron.data.token_store import FILE_NAME, TokenStore
from bevatron.data.tokenize import tokenize
from bevatron.errors import BevatronError
from bevatron.evaluate.perplexity import windows

TEXT = Path(json.__file__).read_text()
POEM = "Über allen Gipfeln ist Ruh 🎻\n" * 20


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    for name, text in (("a.txt", POEM), ("b.txt", TEXT[:1500])):
        (folder / name).write_text(text)
    tokenize([folder / "a.txt", folder / "b.txt"], folder / "store", tokenizer=model / "hf")
    return folder / "store"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    app(["eval", *map(str, arguments), "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def by_transformers(hf: Path, tokens: list[int], seq_len: int, stride: int) -> float:
    """The loop of transformers' page on perplexity: the whole model, labels of -100 for context."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    nats, done = 0.0, 1
    while done < len(tokens):
        end = min(len(tokens), done + (seq_len if done == 1 else stride))
        ids = torch.tensor([tokens[max(0, end - seq_len - 1) : end]])
        labels = ids.clone()
        labels[:, : -(end - done)] = -100
        with torch.no_grad():
            nats += float(loaded(ids, labels=labels).loss) * (end - done)
        done = end
    return nats / (len(tokens) - 1)


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 10, 30, 31])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_score_every_token_but_the_first_once_with_all_context_there_is(
    total: int, stride: int
) -> None:
    scored = []
    for window in windows(total, 8, stride):
        assert 0 <= window.begin < window.end <= total
        assert window.end - window.begin <= 9
        new = list(range(window.end - window.scored, window.end))
        # As much context as fits: the beginning of the stream, or a full window
        assert window.begin == 0 or window.end - window.begin == 9
        assert new[0] > window.begin
        scored += new
    assert scored == list(range(1, total))


@pytest.mark.parametrize(("seq_len", "stride"), [(32, 32), (32, 5), (63, 40)])
def test_the_loss_on_a_store_is_that_of_transformers(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str], seq_len: int, stride: int
) -> None:
    opened = TokenStore.open(store)
    tokens = opened.read(0, opened.tokens).tolist()
    options = ["--data", store, "--seq-len", seq_len, "--stride", stride]
    found = run(capsys, model / "native", *options)
    expected = by_transformers(model / "hf", tokens, seq_len, stride)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert (found["tokens"], found["scored"]) == (len(tokens), len(tokens) - 1)
    size = len((POEM + TEXT[:1500]).encode())
    assert found["text_bytes"] == size
    bits = expected * len(tokens) / math.log(2) / size
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
def test_layouts_and_dtypes_change_the_loss_by_rounding_alone(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = run(capsys, model / "native", "--data", store)
    split = run(capsys, model / "native", "--data", store, "--tp", 2, "--pp", 2)
    assert split["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    for option in (["--dtype", "bf16"], ["--int8"]):
        rounded = run(capsys, model / "native", "--data", store, *option)
        assert rounded["loss"] == pytest.approx(alone["loss"], rel=2e-2)
        assert rounded["loss"] != alone["loss"]


def test_text_scores_as_its_store_and_several_as_one(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [store.parent / "a.txt", store.parent / "b.txt"]
    alone = [run(capsys, model / "hf", "--data", text) for text in texts]
    tokenize([texts[0]], store.parent / "one", tokenizer=model / "hf")
    again = run(capsys, model / "native", "--data", store.parent / "one")
    for key in ("loss", "bits_per_byte", "tokens", "text_bytes"):
        assert again[key] == alone[0][key]
    both = run(capsys, model / "native", "--data", *texts)
    assert [part["loss"] for part in both["parts"]] == [one["loss"] for one in alone]
    nats = sum(one["loss"] * one["scored"] for one in alone)
    assert both["loss"] == pytest.approx(nats / sum(one["scored"] for one in alone))
    assert both["tokens"] == sum(one["tokens"] for one in alone)
    size = sum(one["bits_per_byte"] * one["text_bytes"] for one in alone)
    assert both["bits_per_byte"] == pytest.approx(size / both["text_bytes"])


def test_a_part_of_a_store_and_one_that_does_not_know_its_bytes_are_decoded(
    model: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(capsys, model / "native", "--data", store.parent / "a.txt")
    limit = first["tokens"]  # of the store's first document
    part = run(capsys, model / "native", "--data", store, "--limit", limit)
    assert part == {**first, "data": str(store), "seconds": part["seconds"]}
    old = json.loads((store / FILE_NAME).read_text())
    whole = run(capsys, model / "native", "--data", store)
    del old["text_bytes"]
    for file in store.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FILE_NAME).write_text(json.dumps(old))
    assert run(capsys, model / "native", "--data", tmp_path)["bits_per_byte"] == pytest.approx(
        whole["bits_per_byte"]
    )


def test_people_read_a_line_per_value(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["eval", str(model / "native"), "--data", str(store)], standalone_mode=False)
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()][:4] == [
        "data", "loss", "perplexity", "bits_per_byte",
    ]  # fmt: skip


def refused(message: str, *arguments: object) -> None:
    with pytest.raises(BevatronError, match=message):
        app(["eval", *map(str, arguments)], standalone_mode=False)


def test_what_cannot_be_scored_is_named(model: Path, store: Path, tmp_path: Path) -> None:
    native = model / "native"
    refused("nothing to evaluate on; name token stores or text with --data", native)
    refused("stride is 9, expected 1 to 8", native, "--data", store, "--seq-len=8", "--stride=9")
    refused("length is 65, the model's context has 64", native, "--data", store, "--seq-len=65")
    refused("the limit is 1 tokens, expected at least 2", native, "--data", store, "--limit=1")
    refused("absent: does not exist", native, "--data", tmp_path / "absent")
    refused("absent: does not exist", tmp_path / "no model", "--data", tmp_path / "absent")
    refused(
        "no option --num_fewshot, and options of lm-evaluation-harness need --tasks",
        native,
        "--data",
        store,
        "--num_fewshot",
        "5",
    )
    refused("CKPT comes first", "--num_fewshot", "5", native)
    info = json.loads((store / FILE_NAME).read_text())
    for file in store.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info |= {"fingerprint": "xxh3:0", "encoding": "xxh3:0", "tokenizer": "another"}
    (tmp_path / FILE_NAME).write_text(json.dumps(info))
    refused("was made with the tokenizer another", native, "--data", tmp_path)
