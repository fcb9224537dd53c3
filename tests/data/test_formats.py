"""Every known format of documents is read as what it is or refused by its name: none is taken for
plain text, and none is left out silently."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bevatron.cli.main import app
from bevatron.data import text_documents as text_module
from bevatron.data.dataset_rows import Rows
from bevatron.data.token_store import TokenStore
from bevatron.data.tokenize import tokenize
from bevatron.errors import BevatronError
from tests.data.test_tokenize import NOTE, POEM, documents, model  # noqa: F401  (a fixture)

datasets = pytest.importorskip("datasets")
TEXTS = [POEM, 'with "quotes", commas\nand lines', NOTE, *(f"row {i}: Ü" for i in range(30))]


def make(sources: list[Path], out: Path, model: Path, **options: Any) -> TokenStore:  # noqa: F811
    return tokenize(sources, out, tokenizer=model, workers=1, **options)


def saved(texts: list[str]) -> Any:
    return datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})


def test_a_saved_dataset_gives_its_rows_in_their_order(
    tmp_path: Path,
    model: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also with rows selected and in a folder of other things, whose card is no document."""
    root = tmp_path / "corpus"
    saved([*TEXTS, "not selected"]).select(range(len(TEXTS) - 1, -1, -1)).save_to_disk(
        root / "set", num_shards=3
    )
    (root / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (root / "more.txt").write_text(NOTE)
    whole = make([root / "set"], tmp_path / "whole", model)
    assert documents(whole, model) == TEXTS[::-1]
    app(
        ["tokenize", str(root), str(tmp_path / "all"), "--tokenizer", str(model), "--json"],
        standalone_mode=False,
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["skipped"] == {"dataset card": 1}
    assert documents(TokenStore.open(tmp_path / "all"), model) == [NOTE, *TEXTS[::-1]]
    (root / "set" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(BevatronError, match=r"state\.json: names .*00001-of-00003\.arrow, which"):
        make([root / "set"], tmp_path / "bad", model)


def test_of_a_saved_dataset_with_splits_one_is_named(tmp_path: Path, model: Path) -> None:  # noqa: F811
    both = datasets.DatasetDict({"train": saved(TEXTS), "test": saved([NOTE])})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(BevatronError, match="splits train, test; name one with --split"):
        make([tmp_path / "both"], tmp_path / "bad", model)
    with pytest.raises(BevatronError, match="splits train, test; and no 'dev'"):
        make([tmp_path / "both"], tmp_path / "bad", model, split="dev")
    for split, texts in (("train", TEXTS), ("test", [NOTE])):
        store = make([tmp_path / "both"], tmp_path / split, model, split=split)
        assert documents(store, model) == texts
    one = make([tmp_path / "both" / "test"], tmp_path / "one", model)
    assert documents(one, model) == [NOTE]


def test_arrow_files_are_streams_or_feather_and_cut_between_batches(
    tmp_path: Path,
    model: Path,  # noqa: F811
) -> None:
    import pyarrow as pa
    import pyarrow.feather

    table = pa.table({"text": TEXTS, "n": range(len(TEXTS))})
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    pyarrow.feather.write_feather(table, str(tmp_path / "x.feather"), chunksize=7)
    for name in ("x.arrow", "x.feather"):
        for size in (None, 60):
            out = tmp_path / f"{name}.{size}"
            store = make([tmp_path / name], out, model, part_bytes=size)
            assert documents(store, model) == TEXTS
    with pytest.raises(BevatronError, match=r"x\.arrow: has no column 'body', it has 'text', 'n'"):
        make([tmp_path / "x.arrow"], tmp_path / "bad", model, text_field="body")
    (tmp_path / "x.arrow").write_text("something else")
    with pytest.raises(BevatronError, match=r"x\.arrow: is damaged or no \.arrow"):
        make([tmp_path / "x.arrow"], tmp_path / "bad", model)


def spelled(texts: list[str]) -> Iterator[tuple[str, bytes]]:
    """Files of the same rows, as datasets and people write them."""
    rows = saved(texts)
    records = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = "\n".join(map(json.dumps, records)).encode()
    array = json.dumps(records, indent=2, ensure_ascii=False).encode()
    written = io.BytesIO()
    rows.to_csv(written)
    tabs = io.BytesIO()
    rows.to_csv(tabs, sep="\t")
    yield "lines.json", lines
    yield "lines.ndjson", lines
    yield "array.json", array
    yield "array-bom.json", b"\xef\xbb\xbf" + array
    yield "x.csv", written.getvalue()
    yield "bom.csv", b"\xef\xbb\xbf" + written.getvalue()
    yield "x.tsv", tabs.getvalue()
    for end, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        yield f"c4.json{end}", pack(lines)
        yield f"x.jsonl{end}", pack(lines)
        yield f"array.json{end}", pack(array)
        yield f"x.csv{end}", pack(written.getvalue())


@pytest.mark.parametrize("characters", [1 << 20, 7])
def test_json_and_csv_give_the_rows_that_datasets_reads(
    tmp_path: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    characters: int,
) -> None:
    monkeypatch.setattr(text_module, "CHARACTERS", characters)
    for name, data in spelled(TEXTS):
        (tmp_path / name).write_bytes(data)
        store = make([tmp_path / name], tmp_path / f"{name}.out", model)
        assert documents(store, model) == TEXTS, name


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", b'{\n "text": "a"\n}', r"x\.json: holds one JSON object over several lines"),
        ("x.json", b'"text"', r"x\.json: holds no JSON records"),
        ("x.json", b'[{"text": "a"}, {"text": 1}]', r"record 2 holds the keys 'text', expected"),
        ("x.json", b'[{"text": "a"}, 3]', r"record 2 holds a JSON int, expected"),
        ("x.json", b'[{"text": "a"}, {"text"]', r"record 2 is not valid JSON"),
        ("x.json", b'[{"text": "a"}', r"does not end well after record 1"),
        ("x.json", b'[{"text": "a"}] {}', r"goes on after its array"),
        ("x.json", b'[{"text": "\xff"}]', r"is not UTF-8 text after record 0"),
        ("x.csv", b"body,id\na,1\n", r"has no column 'text', it has 'body', 'id'; name one"),
        ("x.csv", b"text,text\na,1\n", r"has more than one column 'text'"),
        ("x.csv", b'text,id\n"a\nb",1,2\n', r"row that ends in line 3 has 3 columns, .* has 2"),
        ("x.csv", b'text,id\n"a\nb,1\n', r"line 3: unexpected end of data"),
        ("x.csv", b"text\na\n\xff\n", r"x\.csv: is not UTF-8"),
        ("x.txt.gz", gzip.compress(b"a", mtime=0), r"is a packed file of another kind \(\.gz\)"),
        ("x.zip", b"PK", r"is an archive \(\.zip\), which is not read; unpack or convert"),
        ("x.npy", b"\x93NUMPY", r"is an array or a pickle \(\.npy\)"),
        ("x.PDF", b"%PDF", r"is a document that is no plain text \(\.pdf\)"),
        ("store.json", b"{}", r"is a token store already"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path,
    model: Path,  # noqa: F811
    name: str,
    data: bytes,
    message: str,
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / name).write_bytes(data)
    (root / "good.txt").write_text(NOTE)
    if name == "store.json":
        (root / "tokens.bin").write_bytes(b"")
    with pytest.raises(BevatronError, match=message):
        make([root], tmp_path / "out", model)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl.gz", "x.zip"])
def test_labelled_examples_in_another_format_are_refused_by_its_name(
    tmp_path: Path, name: str
) -> None:
    row = b'[\n{"text": "a", "label": 0}]'
    (tmp_path / name).write_bytes(gzip.compress(row) if name.endswith(".gz") else row)
    kind = "array" if name.endswith("json") else name.rpartition(".")[2]
    with pytest.raises(BevatronError, match=rf"{re.escape(name)}: is .*{kind}.*\.jsonl"):
        Rows([tmp_path / name], lambda row: None)
    (tmp_path / "lines.json").write_text(json.dumps({"text": "a", "label": 0}))
    assert Rows([tmp_path / "lines.json"], lambda row: None)[0]["label"] == 0


def test_a_folder_of_programs_is_read_with_its_json_as_text(
    tmp_path: Path,
    model: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A README without data beside it is a document, and what was left out is said."""
    root = tmp_path / "code"
    root.mkdir()
    (root / "README.md").write_text("---\ntitle: x\n---\nHow to.\n")
    (root / "package.json").write_text('{\n  "name": "x"\n}\n')
    (root / "data.zip").write_bytes(b"PK")
    made = ["tokenize", str(root), str(tmp_path / "out"), "--tokenizer", str(model), "--json"]
    with pytest.raises(BevatronError, match=r"--as-text \.json"):
        app([*made, "--leave-out", "*.zip"], standalone_mode=False)
    app([*made, "--as-text", ".json", "--leave-out", "*.zip"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["documents"], shown["skipped"]) == (2, {"as asked for": 1})


def test_a_readme_beside_nothing_but_data_is_its_card(tmp_path: Path, model: Path) -> None:  # noqa: F811
    root = tmp_path / "set"
    root.mkdir()
    (root / "README.md").write_text("# My data\n")
    (root / "dataset_infos.json").write_text('{\n "default": {}\n}\n')
    (root / "x.jsonl").write_text(json.dumps({"text": NOTE}))
    store = make([root], tmp_path / "out", model)
    assert documents(store, model) == [NOTE]
    assert store.info.skipped == {"dataset card": 2}
