"""The documents of .parquet files and of datasets that the `datasets` library reads."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from bevatron.data.text import EMPTY, Piece, document
from bevatron.errors import BevatronError

ROWS = 256  # that are in memory at a time
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
INSTALL = 'pip install "bevatron[hf]"'


def row_groups(path: Path, field: str) -> list[int]:
    """Bytes of the text in each row group of a .parquet file.

    Raises BevatronError if it cannot be read or has no such column of text."""
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
            raise BevatronError(f"{path}: is damaged ({_why(error)})") from error


def unpacked_lines(path: Path) -> Iterator[bytes]:
    """The lines of a .gz or .zst file. Raises BevatronError if it is damaged."""
    try:
        with _unpacked(path) as file:
            yield from file
    except (OSError, EOFError, ValueError) as error:
        raise BevatronError(f"{path}: cannot be unpacked ({_why(error)})") from error


def _unpacked(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    import io

    arrow = _arrow(path)
    return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd"))


def _documents(texts: Sequence[str | None], skipped: Counter[str]) -> Iterator[Piece]:
    for text in texts:
        if not text:
            skipped[EMPTY] += 1
        else:
            yield from document(text)


def _arrow(path: Path | str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BevatronError(f"{path}: needs pyarrow to be read; {INSTALL}") from error
    return pyarrow


def _parquet(path: Path) -> Any:
    arrow = _arrow(path)
    try:
        return arrow.parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise BevatronError(f"{path}: is no .parquet file ({_why(error)})") from error


def _check_column(path: Path, schema: Any, field: str) -> None:
    names = list(schema.names)
    if field not in names:
        raise BevatronError(
            f"{path}: has no column {field!r}, it has {', '.join(map(repr, names))[:200]}; name "
            "one of them with --text-field"
        )
    kind = str(schema.field(field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise BevatronError(
            f"{path}: column {field!r} holds {kind}, expected text; name another with --text-field"
        )


def _why(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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

    def _open(self, field: str) -> Any:
        """The streamed dataset with the one column."""
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
                streaming=True,
                revision=None if self.local else self.revision,
            )
            names = rows.column_names or list(next(iter(rows), {}))
        except Exception as error:  # many kinds, from the network as well
            where = "as a dataset" if self.local else "no such path, and no dataset on the Hub"
            raise BevatronError(
                f"{self.path}: cannot be read ({where}: {type(error).__name__}: {_why(error)}); "
                "check the name, --split and the connection"
            ) from error
        if field not in names:
            raise BevatronError(
                f"{self.path}: has no column {field!r}, it has {', '.join(map(repr, names))[:200]};"
                " name one of them with --text-field"
            )
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
                f"{_why(error)}); run the same command again to go on from there"
            ) from error


def named(source: str, split: str | None) -> Dataset | None:
    """The dataset that a source means, if it means one: a name (`org/name`, `org/name:config`) of
    which no path exists, or a folder of which a split is asked for. A path that exists is never
    looked up on the Hub."""
    if Path(source).exists():
        return _folder(Path(source), None, split) if split and Path(source).is_dir() else None
    path, _, config = source.partition(":")
    if config and Path(path).is_dir():
        return _folder(Path(path), config, split or "train")
    if not NAME.fullmatch(source):
        return None
    return Dataset(path, config or None, split or "train", _commit(path), local=False)


def _folder(path: Path, config: str | None, split: str) -> Dataset:
    from bevatron.checkpoint.boxes import new_hasher, spell

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
            f"Hub ({type(error).__name__}: {_why(error)}); check the name and the connection"
        ) from error
