"""Text becomes a token store that decodes to the same text, or a clear error and no folder."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bevatron.cli.main import app
from bevatron.data import text_documents as text_module
from bevatron.data.text_documents import document
from bevatron.data.token_store import TokenStore
from bevatron.data.tokenize import tokenize
from bevatron.data.tokenize_part import item_pieces
from bevatron.data.tokenize_sources import plan
from bevatron.data.tokenizer import open_tokenizer
from bevatron.errors import BevatronError

EOS = "<|end|>"
POEM = "Über allen Gipfeln\nIst Ruh,\r\n\n\tIn allen Wipfeln  spürest du 🎻\nKaum einen Hauch;\n"
NOTE = "A second document.\nIt has two lines, and no end of the last"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder without weights: a byte-level BPE, its eos named in config.json."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([POEM, NOTE] * 3, trainer)
    tokenizer.enable_truncation(4)  # as some published files have it
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 0], "bos_token_id": 0}))
    return folder


def documents(store: TokenStore, model: Path, eos: bool = True) -> list[str]:
    decoder = open_tokenizer(model).encoder
    ends = [*store.document_starts().tolist(), store.tokens]
    found = []
    for begin, end in pairwise(ends):
        ids = store.read(begin, end - begin).tolist()
        if eos:
            assert ids.pop() == 1
        found.append(decoder.decode(ids, skip_special_tokens=False))
    return found


def test_text_survives_the_round_trip(tmp_path: Path, model: Path) -> None:
    (tmp_path / "poem.txt").write_bytes(POEM.encode())
    (tmp_path / "note.md").write_bytes(b"\xef\xbb\xbf" + NOTE.encode())
    store = tokenize(
        [tmp_path / "poem.txt", str(tmp_path / "note.md")], tmp_path / "out", tokenizer=model
    )
    store.verify()
    assert documents(store, model) == [POEM, NOTE]
    info = store.info
    assert (info.documents, info.eos_id, info.bos_id, info.skipped) == (2, 1, 0, {})
    assert info.tokenizer == str(model)
    assert info.fingerprint == open_tokenizer(model / "tokenizer.json").fingerprint
    assert info.vocab_size == open_tokenizer(model).encoder.get_vocab_size()
    assert info.max_id == store.read(0, store.tokens).max()
    assert info.text_bytes == len((POEM + NOTE).encode())


def test_no_eos_is_written_if_none_is_wanted(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text(NOTE)
    store = tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer=model, append_eos=False)
    assert documents(store, model, eos=False) == [NOTE]
    assert store.info.eos_id is None


def test_a_folder_is_read_in_order_without_what_is_no_text(tmp_path: Path, model: Path) -> None:
    root = tmp_path / "corpus"
    for name in ["b", "a/z", ".git"]:
        (root / name).mkdir(parents=True)
    (root / "b" / "one.txt").write_text("third")
    (root / "a" / "z" / "two.txt").write_text("second")
    (root / "a" / "a.py").write_text("first")
    (root / ".git" / "HEAD").write_text("hidden")
    (root / ".env").write_text("hidden")
    (root / "image.png").write_bytes(b"PNG\0\0")
    (root / "latin.txt").write_bytes("Müller".encode("latin-1"))
    (root / "cut.txt").write_bytes("ü".encode()[:1])
    (root / "empty.txt").touch()
    store = tokenize([root], tmp_path / "out", tokenizer=model)
    assert documents(store, model) == ["first", "second", "third"]
    assert store.info.skipped == {"hidden": 2, "binary": 1, "not UTF-8": 2, "empty": 1}
    assert TokenStore.open(tmp_path / "out").info == store.info


def test_each_line_of_jsonl_is_a_document(tmp_path: Path, model: Path) -> None:
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate([POEM, "", NOTE])]
    lines.insert(1, "   ")
    lines += ['{"text": null}', '{"text": "a pair: \\ud83c\\udfbb"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    store = tokenize([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=model)
    assert documents(store, model) == [POEM, NOTE, "a pair: 🎻"]
    assert store.info.skipped == {"empty": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ('{"content": "x", "id": 1}', "line 2 holds the keys 'content', 'id', expected"),
        ('{"text": 5}', "line 2 holds the keys 'text', expected"),
        ('{"text": "a\\ud800b"}', r"line 2 holds \\ud800 in \"text\", half of a surrogate pair"),
        ('["text"]', "line 2 holds a JSON list, expected"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_kept(
    tmp_path: Path, model: Path, line: str, message: str
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(BevatronError, match=rf"x\.jsonl: {message}"):
        tokenize([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=model)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_cutting_long_documents_changes_no_token(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    long = "".join(f"{POEM}{i} {NOTE}" for i in range(200))
    file = tmp_path / f"long.{kind}"
    file.write_bytes(long.encode() if kind == "txt" else json.dumps({"text": long}).encode())
    whole = tokenize([file], tmp_path / "whole", tokenizer=model)
    monkeypatch.setattr(text_module, "PIECE", 1000)
    parts = list(document(long))
    assert len(parts) > 25
    assert "".join(p.text for p in parts) == long
    assert [p.ends for p in parts] == [False] * (len(parts) - 1) + [True]
    monkeypatch.setattr("bevatron.data.tokenize_part.BATCH", 2500)
    cut = tokenize([file], tmp_path / "cut", tokenizer=model)
    assert cut.info.hash == whole.info.hash
    assert cut.info.documents == whole.info.documents == 1


@pytest.mark.parametrize("long", ["x" * 3000, "word " * 600, "\n" * 3000])
def test_text_without_lines_is_cut_somewhere(monkeypatch: pytest.MonkeyPatch, long: str) -> None:
    monkeypatch.setattr(text_module, "PIECE", 1000)
    parts = [p.text for p in document(long)]
    assert "".join(parts) == long
    assert 0 < max(map(len, parts)) <= 1000


@pytest.mark.parametrize("part_bytes", [64, 333, 1500])
def test_files_cut_into_parts_give_the_tokens_of_whole_ones(
    tmp_path: Path, model: Path, part_bytes: int
) -> None:
    """Texts and .jsonl, longer and shorter than a part, with one that turns out as no text only
    at its end: the store does not know the parts."""
    root = tmp_path / "corpus"
    root.mkdir()
    long = "".join(f"{POEM}{i} {NOTE}." for i in range(12))
    (root / "a.txt").write_bytes(b"\xef\xbb\xbf" + long.encode())
    (root / "b.txt").write_bytes(long.encode() + b"\xff")
    (root / "c.txt").write_text("short")
    (root / "d.txt").write_bytes(long.encode() + b"\0")
    records = [NOTE * (i % 7) for i in range(30)]
    lines = "\r\n".join(json.dumps({"text": r}) for r in records)
    (root / "e.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (root / "f.txt").touch()
    assert len(plan([root], Counter(), part_bytes=part_bytes)) > 3
    store = tokenize([root], tmp_path / "out", tokenizer=model, part_bytes=part_bytes)
    store.verify()
    assert documents(store, model) == [long, "short", *filter(None, records)]
    assert store.info.skipped == {"not UTF-8": 1, "binary": 1, "empty": 6}
    assert store.info.text_bytes == len("".join([long, "short", *records]).encode())
    whole = tokenize([root], tmp_path / "whole", tokenizer=model)
    assert whole.info == store.info


def test_a_bad_line_far_into_a_file_is_named(tmp_path: Path, model: Path) -> None:
    lines = [json.dumps({"text": NOTE})] * 50
    lines[41] = "oops"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(BevatronError, match=r"x\.jsonl: line 42 is not valid JSON"):
        tokenize([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=model, part_bytes=200)


def test_the_eos_is_found_where_it_is_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    assert open_tokenizer(tmp_path).eos_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    assert open_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|begin|>"}')
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": EOS}}))
    assert open_tokenizer(tmp_path).eos_id == 1
    config.write_text(json.dumps({"eos_token": "<|begin|>"}))
    assert open_tokenizer(tmp_path).eos_id == 0
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert open_tokenizer(tmp_path).eos_id == 5
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert open_tokenizer(tmp_path).eos_id == 7
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 100000}')
    with pytest.raises(BevatronError, match=r"eos_token_id is 100000, .* has ids 0 to"):
        open_tokenizer(tmp_path)


def test_a_native_checkpoint_and_a_run_bring_their_tokenizer(tmp_path: Path, model: Path) -> None:
    step = tmp_path / "run" / "step-00000010"
    (step / "source").mkdir(parents=True)
    for file in model.iterdir():
        (step / "source" / file.name).write_bytes(file.read_bytes())
    (step / "manifest.json").write_text("{}")
    (tmp_path / "run" / "latest").write_text(step.name)
    assert open_tokenizer(step).eos_id == open_tokenizer(tmp_path / "run").eos_id == 1


def test_bad_input_is_named_and_nothing_is_kept(tmp_path: Path, model: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "x.bin").write_bytes(b"\0")
    with pytest.raises(BevatronError, match=r"no text found in 1 files \(skipped: 1 binary\)"):
        tokenize([source], out, tokenizer=model)
    with pytest.raises(BevatronError, match="absent: does not exist"):
        tokenize([tmp_path / "absent"], out, tokenizer=model)
    (source / "a.txt").write_text("text")
    with pytest.raises(BevatronError, match=r"in: has no tokenizer\.json"):
        tokenize([source], out, tokenizer=source)
    with pytest.raises(BevatronError, match="no/such/place: does not exist"):
        tokenize([source], out, tokenizer="no/such/place")
    with pytest.raises(BevatronError, match=r"a\.txt: is no tokenizer"):
        tokenize([source], out, tokenizer=source / "a.txt")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    with pytest.raises(BevatronError, match="no eos token is named beside it"):
        tokenize([source], out, tokenizer=tmp_path / "bare")
    with pytest.raises(BevatronError, match="must lie apart"):
        tokenize([source], source / "out", tokenizer=model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "in"]


def test_a_store_is_replaced_only_on_request(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer=model)
    (tmp_path / "a.txt").write_text("two")
    with pytest.raises(BevatronError, match="already exists"):
        tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer=model)
    store = tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer=model, overwrite=True)
    assert documents(store, model) == ["two"]


def test_files_come_in_the_order_of_the_sources(tmp_path: Path) -> None:
    for name in ["b.txt", "a.txt"]:
        (tmp_path / name).write_text(name)
    parts = plan([tmp_path / "b.txt", tmp_path], Counter())
    found = [Path(item.path).name for part in parts for item in part.items]
    assert found == ["b.txt", "a.txt", "b.txt"]
    assert sum(part.nbytes for part in parts) == 15


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    [part] = plan([file], Counter())
    file.write_text("another")
    with pytest.raises(BevatronError, match=r"a\.txt: changed while it was read"):
        list(item_pieces(part.items[0], "text", Counter()))


def test_the_command_makes_a_store_and_inspect_tells_what_it_is(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"body": t}) for t in (POEM, NOTE)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    made = ["tokenize", str(tmp_path / "x.jsonl"), str(tmp_path / "out"), "--tokenizer", str(model)]
    app([*made, "--text-field", "body", "--workers", "2", "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert shown["documents"] == 2
    assert shown["engine"] == {"name": "tokenizers", "why": "under 16 MB of text"}
    app(["inspect", str(tmp_path / "out"), "--json"], standalone_mode=False)
    seen = json.loads(capsys.readouterr().out)
    info = TokenStore.open(tmp_path / "out").info
    assert seen["kind"] == "token store"
    assert (seen["tokens"], seen["hash"]) == (shown["tokens"], info.hash)
    assert seen["fingerprint"] == open_tokenizer(model).fingerprint
    assert seen["sources"] == [str(tmp_path / "x.jsonl")]
    assert seen["bytes"] == 2 * info.tokens + 8 * 2
    app(["inspect", str(tmp_path / "out")], standalone_mode=False)
    assert "tokenizers" in capsys.readouterr().out
    with pytest.raises(BevatronError, match="--engine fast: not supported"):
        app([*made, "--engine", "fast"], standalone_mode=False)
