"""What a file holds, judged by its name: text, a table of documents, or data that cannot be read.

A file with an unknown suffix is read as text, because source code has hundreds of suffixes. A file
that is known to hold documents in another form is never read as text and never left out silently:
it is refused by name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from bevatron.errors import BevatronError

TEXT, JSONL, ARRAY, CSV, PARQUET, ARROW, DATASET = (
    "text",
    "jsonl",
    "json array",
    "csv",
    "parquet",
    "arrow",
    "dataset",
)
JSON = "json"  # JSONL or ARRAY, as its beginning says
SUFFIXES = {
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".jsonlines": JSONL,
    ".json": JSON,
    ".csv": CSV,
    ".tsv": CSV,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
}
PACKINGS = (".gz", ".zst", ".bz2", ".xz")
ROWWISE = {JSONL, JSON, CSV}  # what may be packed
REFUSED = {
    "an archive": (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"),
    "a packed file of another kind": PACKINGS,
    "an array or a pickle": (".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".ckpt"),
    "a file of weights": (".safetensors", ".gguf"),
    "a table or a database": (
        *(".orc", ".avro", ".lance", ".h5", ".hdf5", ".xls", ".xlsx", ".ods"),
        *(".sqlite", ".sqlite3", ".db", ".duckdb", ".mdb", ".lmdb", ".dta", ".sav", ".rds"),
    ),
    "a file of records": (".tfrecord", ".tfrecords", ".mds", ".msgpack", ".warc", ".wet", ".cbor"),
    "a document that is no plain text": (
        *(".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".ps", ".ppt", ".pptx"),
    ),
}
KNOWN = "text, .parquet, .arrow, or .jsonl, .json, .csv, .tsv (perhaps with .gz, .zst, .bz2, .xz)"
INSTALL = 'pip install "bevatron[hf]"'
CARDS = ("README.md", "dataset_infos.json", "dataset_info.json")  # about a dataset, not of it
PEEK = 1 << 16


def file_kind(path: Path, as_text: Collection[str] = ()) -> str:
    """TEXT, JSONL, ARRAY, CSV, PARQUET or ARROW.

    Args:
        as_text: suffixes of files that are texts whatever they are known for, such as ".json".
    Raises BevatronError for a known format that is not read."""
    name = path.name.lower()
    if any(name.endswith(suffix.lower()) for suffix in as_text):
        return TEXT
    inner, packing = _unpacked_name(name)
    kind = next((kind for end, kind in SUFFIXES.items() if inner.endswith(end)), None)
    if kind is not None and (not packing or kind in ROWWISE):
        return _json_kind(path) if kind == JSON else kind
    for what, ends in REFUSED.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is not None:
            raise BevatronError(
                f"{path}: is {what} ({end}), which is not read; unpack or convert it to {KNOWN}, "
                f"or leave it out with --leave-out '*{end}'"
            )
    return TEXT


def is_packed(path: Path | str) -> bool:
    """Whether its name says that it is packed."""
    return bool(_unpacked_name(str(path).lower())[1])


def is_tab_separated(path: Path) -> bool:
    """Whether the columns of a CSV file are separated by tabs."""
    return _unpacked_name(path.name.lower())[0].endswith(".tsv")


def _unpacked_name(name: str) -> tuple[str, str]:
    end = next((end for end in PACKINGS if name.endswith(end)), "")
    return name.removesuffix(end), end


def _json_kind(path: Path) -> str:
    """Whether a .json file is an array of records or has one in each line. An empty one is a text,
    which is left out as such."""
    with open_unpacked(path) as file:
        begin = file.read(PEEK).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begin:
        return TEXT if not is_packed(path) else JSONL
    line, newline, _ = begin.partition(b"\n")
    if begin[:1] == b"[":
        return ARRAY
    if begin[:1] == b"{" and (not newline or line.rstrip().endswith(b"}")):
        return JSONL
    what = "one JSON object over several lines" if begin[:1] == b"{" else "no JSON records"
    raise BevatronError(
        f"{path}: holds {what}, expected an array of records [{{...}}, ...] or a record per line; "
        "write its records as .jsonl, read files of this kind as plain text with --as-text .json, "
        f"or leave it out with --leave-out '{path.name}'"
    )


def open_unpacked(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if its name says that it is packed."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if name.endswith(".bz2"):
        return bz2.open(path, "rb")
    if name.endswith(".xz"):
        return lzma.open(path, "rb")
    if name.endswith(".zst"):
        arrow = import_arrow(path)
        return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def unpacked_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file. Raises BevatronError if it is packed and damaged."""
    try:
        with open_unpacked(path) as file:
            yield from file
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise BevatronError(f"{path}: cannot be unpacked ({first_line(error)})") from error


def import_arrow(path: Path | str) -> Any:
    """pyarrow, which reading `path` takes. Raises BevatronError saying what to install."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BevatronError(f"{path}: needs pyarrow to be read; {INSTALL}") from error
    return pyarrow


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
