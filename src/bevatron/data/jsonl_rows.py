"""The rows of .jsonl files. All are checked first; a row is parsed when it is needed.

Memory holds only where each row begins.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bevatron.data.file_formats import JSONL, TEXT, file_kind, is_packed
from bevatron.errors import BevatronError

Row = dict[str, Any]


class Rows:
    """All rows of some files, in order. Blank lines are none.

    Args:
        check: raises BevatronError for a row that cannot be used; called on every row at once, so
            that no step finds a bad one.
    Raises BevatronError naming the file, and the line if one of them is wrong.
    """

    def __init__(self, paths: Sequence[Path], check: Callable[[Row], None]) -> None:
        self.paths, self.check = list(paths), check
        self._bytes: list[bytes | mmap.mmap] = []
        found = [self._scan(number, path) for number, path in enumerate(self.paths)]
        self._table = np.concatenate(found)  # [rows, (file, begin, end, line)]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        file, begin, end, line = map(int, self._table[index])
        return self._parse(file, self._bytes[file][begin:end], line)

    def where(self, index: int) -> str:
        """The file and line of a row, for a message."""
        file, _, _, line = map(int, self._table[index])
        return f"{self.paths[file]}: line {line}"

    def _scan(self, number: int, path: Path) -> NDArray[np.int64]:
        if path.is_dir():
            raise BevatronError(
                f"{path}: is a folder; this objective reads labelled examples, so name a .jsonl "
                "file (token stores are for pretraining)"
            )
        if path.is_file():
            _check_kind(path)
        places = []
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                # One copy for all processes of a machine, and no more of it than is read.
                access = mmap.ACCESS_READ
                self._bytes.append(mmap.mmap(file.fileno(), 0, access=access) if size else b"")
                begin = 0
                for line_number, line in enumerate(file, 1):
                    end = begin + len(line)
                    if line.strip():
                        places.append((number, begin, end, line_number))
                        self._parse(number, line, line_number)
                    begin = end
        except OSError as error:
            raise BevatronError(f"{path}: cannot be read ({error.strerror})") from error
        if not places:
            raise BevatronError(f"{path}: holds no example; expected one JSON object a line")
        return np.array(places, dtype=np.int64)

    def _parse(self, file: int, data: bytes, line: int) -> Row:
        where = f"{self.paths[file]}: line {line}"
        try:
            row = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BevatronError(
                f"{where} is not valid JSON ({error}); correct it or remove it"
            ) from error
        if not isinstance(row, dict):
            raise BevatronError(f"{where} holds a JSON {type(row).__name__}, expected an object")
        try:
            self.check(row)
        except BevatronError as error:
            raise BevatronError(f"{where}: {error}") from None
        return row


def _check_kind(path: Path) -> None:
    """Refuse a file that is known to be something else than one JSON object a line."""
    kind = file_kind(path)
    if kind not in (TEXT, JSONL) or is_packed(path):
        what = f"packed {kind}" if is_packed(path) else kind
        raise BevatronError(
            f"{path}: is {what} ({path.suffix}), and labelled examples are read from .jsonl; "
            "convert it with datasets' load_dataset(...).to_json('examples.jsonl')"
        )
