"""The documents of .parquet, .arrow and .csv files and of datasets, saved or on the Hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bevatron.checkpoint.strict_json import read_object
from bevatron.data.file_formats import (
    ARROW,
    INSTALL,
    first_line,
    import_arrow,
    is_tab_separated,
    open_unpacked,
)
from bevatron.data.text_documents import EMPTY, Piece, document
from bevatron.errors import BevatronError

ROWS = 256  # that are in memory at a time
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
FIELD_LIMIT = 1 << 30  # characters of a .csv file's field
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def text_sizes(path: Path, kind: str, field: str) -> list[int]:
    """Bytes of the text in each row group of a .parquet file, in each batch of an .arrow file.

    Raises BevatronError if it cannot be read or has no such column of text."""
    if kind == ARROW:
        with _batches(path, field) as batches:
            return [int(batch.column(field).nbytes) for batch in batches]
    with _parquet(path) as file:
        _check_column(path, file.schema_arrow, field)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        number = [c.name for c in file.schema].index(field)  # among the leaves of nested columns
        return [group.column(number).total_uncompressed_size for group in groups]


def parquet_pieces(
    path: Path, begin: int, end: int, field: str, skipped: Counter[str]
) -> Iterator[Piece]:
    """The documents of row groups `begin` to `end`."""
    with _parquet(path) as file:
        _check_column(path, file.schema_arrow, field)
        try:
            for batch in file.iter_batches(
                ROWS, row_groups=range(begin, end), columns=[field], use_threads=False
            ):
                yield from _documents(batch.column(0).to_pylist(), skipped)
        except (OSError, ValueError) as error:  # pyarrow's own are of these
            raise BevatronError(f"{path}: is damaged ({first_line(error)})") from error


def arrow_pieces(
    path: Path, begin: int, end: int, field: str, skipped: Counter[str]
) -> Iterator[Piece]:
    """The documents of batches `begin` to `end` of an .arrow file."""
    with _batches(path, field) as batches:
        for number, batch in enumerate(batches):
            if number >= end:
                return
            column = batch.column(field)
            for at in range(0, len(column) if number >= begin else 0, ROWS):
                yield from _documents(column[at : at + ROWS].to_pylist(), skipped)


@contextmanager
def _batches(path: Path, field: str) -> Iterator[Iterator[Any]]:
    """The record batches of an .arrow file: a stream, as `datasets` writes it, or a file of batches
    (feather). Raises BevatronError if it is neither, is damaged, or has no such column of text."""
    arrow = import_arrow(path)
    try:
        with arrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = arrow.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                reader = arrow.ipc.open_stream(file)
                batches = iter(reader)
            _check_column(path, reader.schema, field)
            yield batches
    except BevatronError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise BevatronError(f"{path}: is damaged or no .arrow ({first_line(error)})") from error


def csv_pieces(path: Path, field: str, skipped: Counter[str]) -> Iterator[Piece]:
    """The documents of a .csv or .tsv file: one per row below its header, the column `field`.

    Raises BevatronError naming the line that is no row of as many columns as the header has."""
    csv.field_size_limit(FIELD_LIMIT)
    with open_unpacked(path) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        reader = csv.reader(lines, delimiter="\t" if is_tab_separated(path) else ",", strict=True)
        try:
            header = next(reader, [])
            if header.count(field) != 1:
                raise BevatronError(_no_column(path, header, field))
            at = header.index(field)
            for row in reader:
                if row and len(row) != len(header):
                    raise BevatronError(
                        f"{path}: the row that ends in line {reader.line_num} has {len(row)} "
                        f"columns, the header has {len(header)}; correct it"
                    )
                if row:
                    yield from _documents([row[at]], skipped)
        except UnicodeDecodeError as error:
            raise BevatronError(
                f"{path}: is not UTF-8 text near line {reader.line_num + 1}; convert it"
            ) from error
        except csv.Error as error:
            raise BevatronError(f"{path}: line {reader.line_num}: {error}; correct it") from error
        except EOFError as error:
            raise BevatronError(f"{path}: cannot be unpacked ({first_line(error)})") from error


def _documents(texts: Sequence[str | None], skipped: Counter[str]) -> Iterator[Piece]:
    for text in texts:
        if not text:
            skipped[EMPTY] += 1
        else:
            yield from document(text)


def check_parquet(path: Path) -> None:
    """Raises BevatronError for a file that is none."""
    _parquet(path).close()


def _parquet(path: Path) -> Any:
    arrow = import_arrow(path)
    try:
        return arrow.parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise BevatronError(f"{path}: is no .parquet file ({first_line(error)})") from error


def _check_column(path: Path, schema: Any, field: str) -> None:
    if field not in schema.names:
        raise BevatronError(_no_column(path, schema.names, field))
    kind = str(schema.field(field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise BevatronError(
            f"{path}: column {field!r} holds {kind}, expected text; name another with --text-field"
        )


def _no_column(path: Path | str, names: Sequence[str], field: str) -> str:
    found = ", ".join(map(repr, names))[:200] or "none"
    count = "no column" if field not in names else "more than one column"
    return f"{path}: has {count} {field!r}, it has {found}; name one of them with --text-field"


# ---------------------------------------------------------------------------------------------
# Datasets
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """What `datasets.load_dataset` is asked for. `revision`: the commit on the Hub; for a folder a
    hash of its files' sizes and times, so that another content is another dataset."""

    path: str
    config: str | None
    split: str
    revision: str | None
    local: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Dataset:
        return cls(**json.loads(text))

    def rows(self, *, streaming: bool) -> Any:
        """All of it, streamed, or as a table on this disk."""
        try:
            from datasets import load_dataset
            from datasets.utils.logging import disable_progress_bar
        except ImportError as error:
            raise BevatronError(f"{self.path}: needs datasets to be read; {INSTALL}") from error
        disable_progress_bar()
        try:
            rows = load_dataset(
                self.path,
                self.config,
                split=self.split,
                streaming=streaming,
                revision=None if self.local else self.revision,
            )
            if streaming and not rows.column_names:
                next(iter(rows), {})
        except Exception as error:  # many kinds, from the network as well
            where = "as a dataset" if self.local else "no such path, and no dataset on the Hub"
            raise BevatronError(
                f"{self.path}: cannot be read ({where}: {type(error).__name__}: "
                f"{first_line(error)}); check the name, --split and the connection"
            ) from error
        return rows

    def _open(self, field: str) -> Any:
        """The streamed dataset with the one column."""
        rows = self.rows(streaming=True)
        names = rows.column_names or list(next(iter(rows), {}))
        if field not in names:
            raise BevatronError(_no_column(self.path, names, field))
        return rows.select_columns([field])

    def shards(self, field: str) -> int:
        """In how many pieces it is stored, each of which is a part of the work."""
        return max(1, int(self._open(field).num_shards))

    def pieces(self, shard: int, of: int, field: str, skipped: Counter[str]) -> Iterator[Piece]:
        """The documents of a shard."""
        rows = self._open(field)
        if of > 1:
            rows = rows.shard(num_shards=of, index=shard, contiguous=True)
        try:
            for batch in rows.iter(batch_size=ROWS):
                texts = batch[field]
                odd = next((t for t in texts if t is not None and not isinstance(t, str)), None)
                if odd is not None:
                    raise BevatronError(
                        f"{self.path}: column {field!r} holds a {type(odd).__name__}, expected "
                        "text; name another with --text-field"
                    )
                yield from _documents(texts, skipped)
        except BevatronError:
            raise
        except Exception as error:  # many kinds, from the network as well
            raise BevatronError(
                f"{self.path}: shard {shard} of {of} cannot be read ({type(error).__name__}: "
                f"{first_line(error)}); run the same command again to go on from there"
            ) from error


def saved_files(folder: Path, split: str | None) -> list[Path] | None:
    """The .arrow files of a folder that `save_to_disk` of `datasets` wrote, in their order, or None
    for another folder.

    Raises BevatronError where it holds several splits and `split` names none of them, and for a
    file that is missing."""
    if (folder / SPLITS).is_file():
        names = read_object(folder / SPLITS).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BevatronError(f"{folder / SPLITS}: names no splits; save the dataset anew")
        chosen = split if split is not None or len(names) != 1 else names[0]
        if chosen is None or chosen not in names:
            asked = "name one with --split" if split is None else f"and no {split!r}"
            raise BevatronError(
                f"{folder}: is a saved dataset of the splits {', '.join(names)}; {asked}"
            )
        found = saved_files(folder / chosen, None)
        if found is None:
            raise BevatronError(f"{folder / chosen}: has no {STATE}; save the dataset anew")
        return found
    if not (folder / STATE).is_file() or not (folder / INFO).is_file():
        return None
    state = read_object(folder / STATE)
    if split is not None and state.get("_split") not in (None, split):
        raise BevatronError(
            f"{folder}: is the saved split {state['_split']!r}, not {split!r}; leave --split out"
        )
    files = state.get("_data_files")
    named = [file.get("filename") if isinstance(file, dict) else None for file in files or []]
    paths = [folder / name for name in named if isinstance(name, str)]
    missing = next((path for path in paths if not path.is_file()), None)
    if not isinstance(files, list) or len(paths) != len(named) or missing is not None:
        raise BevatronError(
            f"{folder / STATE}: names {missing or 'no files'}, which is not there; copy the whole "
            "folder, or save the dataset anew"
        )
    return paths


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return (folder / SPLITS).is_file() or all((folder / name).is_file() for name in (STATE, INFO))


def named(source: str, split: str | None) -> Dataset | None:
    """The dataset that a source means, if `datasets` is to read one: a name (`org/name`,
    `org/name:config`) of which no path exists, or a folder of which a split is asked for and which
    is not a saved dataset. A path that exists is never looked up on the Hub."""
    if Path(source).exists():
        if not split or not Path(source).is_dir() or is_saved(Path(source)):
            return None
        return _folder(Path(source), None, split)
    path, _, config = source.partition(":")
    if config and Path(path).is_dir():
        return _folder(Path(path), config, split or "train")
    if not NAME.fullmatch(source):
        return None
    return Dataset(path, config or None, split or "train", _commit(path), local=False)


def _folder(path: Path, config: str | None, split: str) -> Dataset:
    from bevatron.checkpoint.read_boxes import new_hasher, spell

    hasher = new_hasher()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        status = file.stat()
        line = f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n"
        hasher.update(memoryview(line.encode("utf-8", "surrogateescape")))
    return Dataset(str(path), config, split, spell(hasher), local=True)


def _commit(name: str) -> str | None:
    """The dataset's newest commit, to which all that is read belongs."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha
    except Exception as error:  # the Hub raises many kinds
        raise BevatronError(
            f"{name}: no such path, and no dataset of this name could be found on the Hugging Face "
            f"Hub ({type(error).__name__}: {first_line(error)}); check the name and the connection"
        ) from error
