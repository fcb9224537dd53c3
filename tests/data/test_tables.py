"""Text in tables: .parquet, packed .jsonl, and what the `datasets` library reads."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from bevatron.data import table_documents
from bevatron.data.tokenize import tokenize
from bevatron.errors import BevatronError
from tests.data.test_tokenize import NOTE, POEM, documents, model  # noqa: F401  (a fixture)

pa = pytest.importorskip("pyarrow")
TEXTS = [POEM, NOTE, "", None, *(f"row {i}: {NOTE}" for i in range(40))]
FOUND = [t for t in TEXTS if t]


def write_parquet(path: Path, texts: list[str | None], rows: int, field: str = "text") -> Path:
    import pyarrow.parquet as pq

    numbers = {"nested": [{"a": i, "b": [i]} for i in range(len(texts))]}
    table = pa.table({**numbers, field: pa.array(texts, pa.string()), "id": range(len(texts))})
    pq.write_table(table, path, row_group_size=rows)
    return path


def test_each_row_of_parquet_is_a_document(tmp_path: Path, model: Path) -> None:  # noqa: F811
    """Row groups are parts, and a column of another name is found."""
    file = write_parquet(tmp_path / "x.parquet", TEXTS, rows=7, field="content")
    assert len(table_documents.text_sizes(file, "parquet", "content")) == 7
    for name, part_bytes in [("whole", None), ("parts", 300)]:
        store = tokenize(
            [file],
            tmp_path / name,
            tokenizer=model,
            text_field="content",
            part_bytes=part_bytes,
            workers=1,
        )
        store.verify()
        assert documents(store, model) == FOUND
        assert store.info.skipped == {"empty": 2}


def test_packed_jsonl_is_unpacked(tmp_path: Path, model: Path) -> None:  # noqa: F811
    lines = "\n".join(json.dumps({"text": t}) for t in FOUND).encode()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.CompressedOutputStream(str(tmp_path / "x.jsonl.zst"), "zstd") as out:
        out.write(lines)
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        store = tokenize([tmp_path / name], tmp_path / f"{name}.out", tokenizer=model)
        assert documents(store, model) == FOUND
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(BevatronError, match=rf"{name}: cannot be unpacked"):
            tokenize([tmp_path / name], tmp_path / "bad", tokenizer=model)


def test_bad_tables_are_named(tmp_path: Path, model: Path) -> None:  # noqa: F811
    file = write_parquet(tmp_path / "x.parquet", TEXTS, rows=7)

    def message(path: Path, field: str = "text") -> str:
        with pytest.raises(BevatronError) as caught:
            tokenize([path], tmp_path / "out", tokenizer=model, text_field=field)
        return str(caught.value)

    assert "has no column 'body', it has 'nested', 'text', 'id'; name" in message(file, "body")
    assert "column 'id' holds int64, expected text" in message(file, "id")
    data = bytearray(file.read_bytes())
    data[20:400] = b"\xff" * 380
    (tmp_path / "damaged.parquet").write_bytes(data)
    assert "damaged.parquet: is damaged" in message(tmp_path / "damaged.parquet")
    (tmp_path / "no.parquet").write_text("text")
    assert "no.parquet: is no .parquet file" in message(tmp_path / "no.parquet")


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "in").mkdir()
    file = write_parquet(tmp_path / "in" / "x.parquet", TEXTS, rows=7)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BevatronError, match=r'needs pyarrow to be read; pip install "bevatron'):
        tokenize([file], tmp_path / "out", tokenizer=model)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BevatronError, match=r'needs datasets to be read; pip install "bevatron'):
        tokenize([file.parent], tmp_path / "out", tokenizer=model, split="train")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder as it comes from the Hub: a card with two configurations, splits, shards."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    for i in range(3):
        write_parquet(folder / "data" / f"train-{i}.parquet", TEXTS[i * 20 : i * 20 + 20], rows=5)
    write_parquet(folder / "data" / "test-0.parquet", [NOTE], rows=5)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n"
        "  - {split: train, path: 'data/train-*.parquet'}\n"
        "- config_name: small\n  data_files:\n"
        "  - {split: test, path: 'data/test-*.parquet'}\n---\nA card.\n"
    )
    return folder


def test_a_folder_of_which_a_split_is_asked_for_is_a_dataset(
    dataset: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr(
        table_documents, "_commit", lambda name: pytest.fail("looked it up on the Hub")
    )
    out = dataset.parent
    store = tokenize([dataset], out / "train", tokenizer=model, split="train", workers=1)
    assert documents(store, model) == FOUND
    assert store.info.skipped == {"empty": 2}
    small = tokenize([f"{dataset}:small"], out / "test", tokenizer=model, split="test")
    assert documents(small, model) == [NOTE]
    plain = tokenize([dataset], out / "plain", tokenizer=model)
    assert len(documents(plain, model)) == len(FOUND) + 1  # the other split
    with pytest.raises(BevatronError, match="has no column 'body', it has 'nested', 'text', 'id'"):
        tokenize([dataset], out / "bad", tokenizer=model, split="train", text_field="body")
    with pytest.raises(BevatronError, match=r"dataset: cannot be read .*valid"):
        tokenize([dataset], out / "bad", tokenizer=model, split="validation")


def test_a_name_is_a_dataset_only_if_no_path_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table_documents, "_commit", lambda name: "c0ffee")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("a file")
    assert table_documents.named("org/name", None) is None
    assert table_documents.named("org/name", "train") is None
    assert table_documents.named("nothing-here", "train") is None
    assert table_documents.named("../org/other", None) is None
    found = table_documents.named("org/other:config", "test")
    assert found == table_documents.Dataset("org/other", "config", "test", "c0ffee", local=False)
    found = table_documents.named("org/other", None)
    assert found == table_documents.Dataset("org/other", None, "train", "c0ffee", local=False)
    assert table_documents.Dataset.from_json(found.to_json()) == found


def test_a_name_that_the_hub_does_not_know_is_an_error(
    tmp_path: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BevatronError, match="no/such-data: no such path, and no dataset of this"):
        tokenize(["no/such-data"], tmp_path / "out", tokenizer=model)
