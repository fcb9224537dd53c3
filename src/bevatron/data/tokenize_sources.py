"""The sources of a tokenizing job, cut into parts of bounded size.

The parts depend on the sources alone and never on the number of workers; so the tokens do not
either. Cuts within a file lie at multiples of the part size, moved forward to the next line
(.jsonl) or to the next place where every tokenizer splits (a long text). So a worker finds the cuts
of its part without reading the text before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bevatron.data import table_documents
from bevatron.data.file_formats import (
    ARRAY,
    ARROW,
    CARDS,
    CSV,
    DATASET,
    JSONL,
    KNOWN,
    PARQUET,
    TEXT,
    file_kind,
    is_packed,
)
from bevatron.data.text_documents import next_line, next_split
from bevatron.errors import BevatronError

PART = 16 << 20  # bytes of a part, at most, where a file can be cut
SMALL = 1 << 20  # and at least
PARTS = 64  # what there is at least, where parts may be smaller
HIDDEN, CARD, LEFT_OUT = "hidden", "dataset card", "as asked for"


@dataclass(frozen=True)
class Item:
    """A range of a file, or one shard of a dataset.

    Attributes:
        kind: see `formats`.
        path: of the file; for a dataset what `tables.Dataset` needs, as JSON.
        begin, end: bytes; row groups of .parquet, batches of .arrow; for a dataset the shard and
            how many there are.
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
    """A file as it was found, and what it is (see `formats`)."""

    path: Path
    kind: str
    size: int
    mtime_ns: int


def find_files(
    sources: Sequence[str | Path],
    skipped: Counter[str],
    *,
    split: str | None = None,
    as_text: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> list[File]:
    """Files as given, folders recursively and sorted by path. Counted in `skipped` is what lies
    below a folder and is hidden (a folder as one), tells of the dataset beside it, or has a name
    that one of the patterns `leave_out` fits.

    Args:
        split: of folders that `datasets` saved.
        as_text: see `file_kind`.
    Raises BevatronError for a source that does not exist, and for a format that is not read."""
    found: list[File] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            paths = list(_walk(path, skipped, split, leave_out))
        elif path.is_file():
            paths = [path]
        elif path.exists():
            raise BevatronError(f"{path}: is neither a file nor a folder; expected text")
        else:
            raise BevatronError(
                f"{path}: does not exist; expected {KNOWN}, a folder of them, or a dataset on the "
                "Hugging Face Hub (org/name or org/name:config)"
            )
        kinds = {one: _kind(one, as_text) for one in paths if one.name not in CARDS}
        cards = _cards(path, paths, kinds)
        skipped[CARD] += len(cards)
        for one in paths:
            if one not in cards:
                status = one.stat()
                kind = kinds[one] if one in kinds else _kind(one, as_text)
                found.append(File(one, kind or TEXT, status.st_size, status.st_mtime_ns))
    return found


def _walk(
    folder: Path, skipped: Counter[str], split: str | None, leave_out: Collection[str]
) -> Iterator[Path]:
    """The files below a folder: those of a saved dataset in its own order, others sorted."""
    saved = table_documents.saved_files(folder, split)
    if saved is not None:
        yield from saved
        return
    if (folder / "store.json").is_file() and (folder / "tokens.bin").is_file():
        raise BevatronError(f"{folder}: is a token store already; name the text that it is of")
    try:
        inside = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise BevatronError(f"{folder}: cannot be listed ({error.strerror})") from error
    for path in inside:
        if path.name.startswith("."):
            skipped[HIDDEN] += 1
        elif any(fnmatch(path.name, pattern) for pattern in leave_out):
            skipped[LEFT_OUT] += 1
        elif path.is_dir():
            if not path.is_symlink():
                yield from _walk(path, skipped, split, leave_out)
        elif path.is_file():
            yield path


def _kind(path: Path, as_text: Collection[str]) -> str | None:
    """As `file_kind`; None for an empty file."""
    return file_kind(path, as_text) if path.stat().st_size else None


def _cards(root: Path, paths: Sequence[Path], kinds: Mapping[Path, str | None]) -> set[Path]:
    """Those of the files in the folder `root` that tell of a dataset beside or below them: its
    README, if that begins as cards on the Hub do or if all else is data, and older descriptions."""
    below: dict[Path, set[str]] = {}  # of each folder
    for path, kind in kinds.items():
        for folder in path.parents if kind is not None else ():
            below.setdefault(folder, set()).add(kind or TEXT)
            if folder == root:
                break
    found = set()
    for path in paths:
        beside = below.get(path.parent, set()) if path.name in CARDS and path != root else set()
        if beside - {TEXT} and (
            path.suffix == ".json" or TEXT not in beside or _has_front_matter(path)
        ):
            found.add(path)
    return found


def _has_front_matter(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(8).rstrip() == b"---"


def plan(
    sources: Sequence[str | Path],
    skipped: Counter[str],
    *,
    split: str | None = None,
    text_field: str = "text",
    part_bytes: int | None = None,
    as_text: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> list[Part]:
    """The parts of all sources, in order. Each source is a path, or a dataset's name if no such
    path exists; with `split`, a folder is a dataset as well. See `find_files`.

    Raises BevatronError for a source that is missing or cannot be read."""
    items: list[Item | File] = []
    for source in sources:
        dataset = table_documents.named(str(source), split)
        if dataset is None:
            items += find_files(
                [source], skipped, split=split, as_text=as_text, leave_out=leave_out
            )
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

    if kind in (PARQUET, ARROW):
        sizes = table_documents.text_sizes(file.path, kind, text_field)
        begin = 0
        for at in range(1, len(sizes) + 1):
            if at == len(sizes) or sum(sizes[begin : at + 1]) > limit:
                share = file.size * sum(sizes[begin:at]) // max(1, sum(sizes))
                yield item(begin, at, share)
                begin = at
        return
    whole = kind in (ARRAY, CSV) or (kind == JSONL and is_packed(path))
    if whole or file.size <= limit:
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
