"""What there is to tokenize, cut into parts: work of bounded size, the same whoever does it.

The parts depend on the sources alone, never on the number of workers, and so do the tokens. Cuts
within a file lie at multiples of the part size, moved on to the next line (.jsonl) or to the next
place where every tokenizer splits (a long text), so a worker finds them without reading what comes
before.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bevatron.data import tables
from bevatron.data.text import next_line, next_split
from bevatron.errors import BevatronError

PART = 16 << 20  # bytes of a part, at most, where a file can be cut
SMALL = 1 << 20  # and at least
PARTS = 64  # what there is at least, where parts may be smaller
HIDDEN = "hidden"

TEXT, JSONL, PACKED, PARQUET, DATASET = "text", "jsonl", "jsonl, packed", "parquet", "dataset"
SUFFIXES = {
    ".jsonl": JSONL,
    ".jsonl.gz": PACKED,
    ".jsonl.zst": PACKED,
    ".parquet": PARQUET,
}


@dataclass(frozen=True)
class Item:
    """A range of a file, or one shard of a dataset.

    Attributes:
        path: of the file; for a dataset what `tables.Dataset` needs, as JSON.
        begin, end: bytes; row groups of .parquet; for a dataset the shard and how many there are.
        nbytes: how much of the sources this is.
        size, mtime_ns: of the file when the parts were made; 0 for a dataset.
    """

    kind: str
    path: str
    begin: int
    end: int
    nbytes: int
    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class Part:
    """Items that are tokenized in one go. A range of a long text is a part of its own, because such
    a file is used as a whole or not at all."""

    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    @property
    def range_of(self) -> str | None:
        """The long text that this is a range of."""
        item = self.items[0]
        return item.path if item.kind == TEXT and item.end - item.begin < item.size else None

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(item) for item in self.items]

    @classmethod
    def from_json(cls, items: list[dict[str, Any]]) -> Part:
        return cls(tuple(Item(**item) for item in items))


@dataclass(frozen=True)
class File:
    """A file as it was found."""

    path: Path
    size: int
    mtime_ns: int

    @property
    def kind(self) -> str:
        name = self.path.name.lower()
        return next((kind for end, kind in SUFFIXES.items() if name.endswith(end)), TEXT)


def find_files(sources: Sequence[str | Path], skipped: Counter[str]) -> list[File]:
    """Files as given, folders recursively and sorted by path. Hidden entries below a folder are
    counted in `skipped`, a hidden folder as one.

    Raises BevatronError for a source that does not exist."""
    paths: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            paths += sorted(_walk(path, skipped), key=lambda p: p.parts)
        elif path.is_file():
            paths.append(path)
        elif path.exists():
            raise BevatronError(f"{path}: is neither a file nor a folder; expected text")
        else:
            raise BevatronError(
                f"{path}: does not exist; expected text, .jsonl, .parquet, a folder of them, or a "
                "dataset on the Hugging Face Hub (org/name or org/name:config)"
            )
    found = []
    for path in paths:
        status = path.stat()
        found.append(File(path, status.st_size, status.st_mtime_ns))
    return found


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise BevatronError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        skipped[HIDDEN] += sum(name.startswith(".") for name in [*folders, *files])
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(root) / name
            if not name.startswith(".") and path.is_file():
                yield path


def plan(
    sources: Sequence[str | Path],
    skipped: Counter[str],
    *,
    split: str | None = None,
    text_field: str = "text",
    part_bytes: int | None = None,
) -> list[Part]:
    """The parts of all sources, in order. Each source is a path, or a dataset's name if no such
    path exists; with `split`, a folder is a dataset as well.

    Raises BevatronError for a source that is missing or cannot be read."""
    items: list[Item | File] = []
    for source in sources:
        dataset = tables.named(str(source), split)
        if dataset is None:
            items += find_files([source], skipped)
        else:
            shards = dataset.shards(text_field)
            items += [Item(DATASET, dataset.to_json(), i, shards, 0) for i in range(shards)]
    total = sum(item.size for item in items)
    limit = part_bytes or min(PART, max(SMALL, total // PARTS))
    parts: list[list[Item]] = [[]]
    nbytes = 0  # of the last one
    for item in items:
        if not isinstance(item, File):
            parts += [[item], []]
            nbytes = 0
            continue
        for piece in _cut(item, limit, text_field):
            alone = Part((piece,)).range_of is not None
            if parts[-1] and (alone or nbytes + piece.nbytes > limit):
                parts.append([])
                nbytes = 0
            parts[-1].append(piece)
            nbytes += piece.nbytes
            if alone:
                parts.append([])
                nbytes = 0
    return [Part(tuple(part)) for part in parts if part]


def _cut(file: File, limit: int, text_field: str) -> Iterator[Item]:
    kind, path = file.kind, str(file.path)

    def item(begin: int, end: int, nbytes: int) -> Item:
        return Item(kind, path, begin, end, nbytes, file.size, file.mtime_ns)

    if kind == PARQUET:
        sizes = tables.row_groups(file.path, text_field)
        begin = 0
        for at in range(1, len(sizes) + 1):
            if at == len(sizes) or sum(sizes[begin : at + 1]) > limit:
                share = file.size * sum(sizes[begin:at]) // max(1, sum(sizes))
                yield item(begin, at, share)
                begin = at
        return
    if kind == PACKED or file.size <= limit:
        yield item(0, file.size, file.size)
        return
    begin = 0
    find = next_line if kind == JSONL else next_split
    with file.path.open("rb") as opened:
        for at in range(limit, file.size, limit):
            end = find(opened, at)
            if begin < end < file.size:
                yield item(begin, end, end - begin)
                begin = end
    yield item(begin, file.size, file.size - begin)
