"""Rows of .jsonl, .parquet, .arrow and saved datasets are the same rows; what is wrong with one is
said with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from bevatron.data.dataset_rows import Rows, hash_of_rows
from bevatron.errors import BevatronError

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    {
        "messages": [
            {"role": "user", "content": "Add 2 and 2."},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "x": [1, 2]}}]},
            {"role": "tool", "content": "4", "name": "add"},
        ]
    },
    {"messages": [{"role": "user", "content": "é 数学 🙂"}], "tools": '[{"name": "add"}]'},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "x.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS))
    table = datasets.Dataset.from_list([{"tools": None} | row for row in ROWS])
    table.to_parquet(folder / "x.parquet")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(folder / "two")
    (folder / "x.arrow").write_bytes(next((folder / "saved").glob("*.arrow")).read_bytes())
    return folder


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.arrow", "saved"])
def test_every_format_has_the_same_rows(folder: Path, name: str) -> None:
    rows = Rows([folder / name])
    assert list(rows) == ROWS, "a null in a table is what a row lacks"
    assert [rows[i] for i in (2, 0)] == [ROWS[2], ROWS[0]]
    assert hash_of_rows(str(folder / name)).startswith("xxh3:")


def test_sources_follow_each_other_and_a_split_is_chosen(folder: Path) -> None:
    rows = Rows([folder / "x.jsonl", folder / "two"], splits=[None, "test"])
    assert list(rows) == [*ROWS, ROWS[2]]
    assert rows.where(2) == f"{folder / 'x.jsonl'}: line 5"
    assert rows.where(3) == f"{folder / 'two'}: row 0"
    plain = folder / "plain"
    plain.mkdir()
    (plain / "test.jsonl").write_bytes((folder / "x.jsonl").read_bytes())
    assert list(Rows([plain], splits=["test"])) == ROWS, "as a dataset of the Hub is read"
    with pytest.raises(BevatronError, match=r"plain: is a folder; this objective reads examples"):
        Rows([plain])
    with pytest.raises(BevatronError, match="the splits train, test; name one with --split"):
        Rows([folder / "two"])


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_the_place_of_a_row_that_cannot_be_used_is_named(folder: Path, name: str) -> None:
    def check(row: dict[str, Any]) -> None:
        if "tools" in row:
            raise BevatronError("has tools")

    place = "line 5" if name == "x.jsonl" else "row 2"
    with pytest.raises(BevatronError, match=rf"{name}: {place}: has tools"):
        Rows([folder / name], check)


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    for name, says in (("x.parquet", "is no .parquet file"), ("x.arrow", "damaged or no .arrow")):
        (tmp_path / name).write_bytes(b"PAR1 and more of it")
        with pytest.raises(BevatronError, match=rf"{name}: .*{says}"):
            Rows([tmp_path / name])
    with pytest.raises(BevatronError, match=r"nowhere.jsonl: cannot be read \(No such file"):
        Rows([tmp_path / "nowhere.jsonl"])
