"""The rows of datasets: .jsonl, .parquet and .arrow files, folders that `datasets` saved, and
datasets on the Hugging Face Hub.

All rows are checked first, and a row is read again when it is needed. Of .jsonl memory holds only
where each row begins; the others are mapped into memory by `datasets`, one copy for all processes
of a machine.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bevatron.checkpoint.read_boxes import hash_bytes, hash_file
from bevatron.data import table_documents
from bevatron.data.file_formats import ARROW, INSTALL, JSONL, PARQUET, TEXT, file_kind, first_line
from bevatron.data.file_formats import is_packed as packed
from bevatron.errors import BevatronError

Row = dict[str, Any]
Check = Callable[[Row], None]
EXPECTED = ".jsonl, .parquet, .arrow, a folder that datasets saved, or a dataset on the Hub"


class _Part(Protocol):
    """The rows of one source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def __iter__(self) -> Iterator[Row]: ...

    def where(self, index: int) -> str: ...


class Rows:
    """All rows of some sources, in order.

    Args:
        sources: files, folders, or names of datasets on the Hub (`org/name`, `org/name:config`).
        check: raises BevatronError for a row that cannot be used; called on every row at once, so
            that no step finds a bad one.
        splits: of each source that is a dataset of several, the one that is meant; "train" where
            there is none.
    Raises BevatronError naming the source, and the row if one of them is wrong.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        check: Check = lambda row: None,
        splits: Sequence[str | None] | None = None,
    ) -> None:
        self.check = check
        named = splits if splits is not None else [None] * len(sources)
        self._parts = [_part(str(s), split) for s, split in zip(sources, named, strict=True)]
        for part, source in zip(self._parts, sources, strict=True):
            if not len(part):
                raise BevatronError(f"{source}: holds no example; expected one JSON object a line")
            for number, row in enumerate(part):
                self._checked(row, part, number)
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:
        part, number = self._at(index)
        return self._checked(part[number], part, number)

    def where(self, index: int) -> str:
        """The source and line or number of a row, for a message."""
        part, number = self._at(index)
        return part.where(number)

    def _at(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < len(self):  # ends iterations too
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], index - (int(self._ends[number - 1]) if number else 0)

    def _checked(self, row: Row, part: _Part, number: int) -> Row:
        try:
            self.check(row)
        except BevatronError as error:
            raise BevatronError(f"{part.where(number)}: {error}") from None
        return row


def hash_of_rows(source: str) -> str:
    """`xxh3:...` of a source's content; of a dataset on the Hub its commit."""
    path = Path(source)
    if path.is_file():
        return hash_file(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listed = [[str(p.relative_to(path)), hash_file(p)] for p in files]
        return hash_bytes(json.dumps(listed).encode("utf-8", "surrogatepass"))
    dataset = table_documents.named(source, None)
    if dataset is None:
        raise BevatronError(f"{source}: does not exist; expected {EXPECTED}")
    return f"commit:{dataset.revision}"


def _part(source: str, split: str | None) -> _Part:
    path = Path(source)
    if path.is_file():
        kind = file_kind(path)
        if kind in (PARQUET, ARROW):
            return _Table(source, _opened_file(path, kind))
        if kind not in (TEXT, JSONL) or packed(path):
            what = f"packed {kind}" if packed(path) else kind
            raise BevatronError(
                f"{path}: is {what} ({path.suffix}), and rows are read from {EXPECTED}; "
                "convert it with datasets' load_dataset(...).to_json('examples.jsonl')"
            )
        return _Lines(path)
    if path.is_dir() and table_documents.is_saved(path):
        files = table_documents.saved_files(path, split)
        return _Table(source, _joined(path, files or []))
    dataset = table_documents.named(source, split)
    if dataset is not None:
        return _Table(source, dataset.rows(streaming=False))
    if path.is_dir():
        raise BevatronError(
            f"{path}: is a folder; this objective reads examples, so name a .jsonl or .parquet "
            "file, or the folder's split (token stores are for pretraining)"
        )
    if not path.exists():
        raise BevatronError(f"{path}: cannot be read (No such file or directory)")
    return _Lines(path)


class _Lines:
    """Of a .jsonl file. Blank lines are none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        places = []
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                # One copy for all processes of a machine, and no more of it than is read.
                access = mmap.ACCESS_READ
                self._bytes = mmap.mmap(file.fileno(), 0, access=access) if size else b""
                begin = 0
                for line_number, line in enumerate(file, 1):
                    end = begin + len(line)
                    if line.strip():
                        places.append((begin, end, line_number))
                    begin = end
        except OSError as error:
            raise BevatronError(f"{path}: cannot be read ({error.strerror})") from error
        self._table: NDArray[np.int64] = np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Row:
        begin, end, _ = map(int, self._table[index])
        where = self.where(index)
        try:
            row = json.loads(self._bytes[begin:end].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BevatronError(
                f"{where} is not valid JSON ({error}); correct it or remove it"
            ) from error
        if not isinstance(row, dict):
            raise BevatronError(f"{where} holds a JSON {type(row).__name__}, expected an object")
        return row

    def where(self, index: int) -> str:
        return f"{self.path}: line {int(self._table[index][2])}"


class _Table:
    """Of a dataset that `datasets` has opened. In a table what a row lacks is a null, so nulls are
    left out, inside of objects as well."""

    def __init__(self, source: str, rows: Any) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return map(_without_nulls, self.rows)

    def __getitem__(self, index: int) -> Row:
        row: Row = _without_nulls(self.rows[index])
        return row

    def where(self, index: int) -> str:
        return f"{self.source}: row {index}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _opened_file(path: Path, kind: str) -> Any:
    if kind == ARROW:
        return _joined(path, [path])
    library = _datasets(path)
    table_documents.check_parquet(path)
    try:
        return library.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # the library raises many kinds
        raise BevatronError(f"{path}: is no .parquet file ({first_line(error)})") from error


def _joined(path: Path, files: Sequence[Path]) -> Any:
    library = _datasets(path)
    try:
        return library.concatenate_datasets([library.Dataset.from_file(str(f)) for f in files])
    except Exception as error:  # the library raises many kinds
        raise BevatronError(f"{path}: is damaged or no .arrow ({first_line(error)})") from error


def _datasets(path: Path) -> Any:
    try:
        import datasets
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise BevatronError(f"{path}: needs datasets to be read; {INSTALL}") from error
    disable_progress_bar()
    return datasets
