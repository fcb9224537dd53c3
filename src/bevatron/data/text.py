"""The documents of text files, folders and .jsonl files, streamed as pieces of bounded size."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bevatron.errors import BevatronError

PIECE = 1 << 18  # characters; more are cut
READ = 1 << 20  # bytes
LINE_END = re.compile(r"\S\n(?=\S)")
SPACE = re.compile(r"\S(?=\s)")

HIDDEN, BINARY, NOT_UTF8, EMPTY = "hidden", "binary", "not UTF-8", "empty"


class Piece(NamedTuple):
    """A part of a document: its text, whether the document ends with it, and how many bytes of
    the sources were consumed since the piece before."""

    text: str
    ends: bool
    nbytes: int


class Files(NamedTuple):
    """The files to read, in order, and the bytes in them."""

    paths: list[Path]
    nbytes: int


def find_files(sources: Sequence[str | Path], skipped: Counter[str]) -> Files:
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
            raise BevatronError(f"{path}: does not exist; expected a text file, .jsonl or folder")
    return Files(paths, sum(p.stat().st_size for p in paths))


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


def pieces(paths: Sequence[Path], skipped: Counter[str]) -> Iterator[Piece]:
    """Every document of the files. A text file is one document, a .jsonl file one per line.

    A file that is not text is read twice at most and then skipped as a whole. Raises BevatronError
    for a file that cannot be read and for a .jsonl line without a "text".
    """
    for path in paths:
        try:
            why = _unfit(path)
            if why is not None:
                skipped[why] += 1
                yield Piece("", True, path.stat().st_size)
            elif path.suffix == ".jsonl":
                yield from _jsonl(path, skipped)
            else:
                yield from _text(path)
        except OSError as error:
            raise BevatronError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise BevatronError(f"{path}: changed while it was read; run it again") from error


def _unfit(path: Path) -> str | None:
    """Why a file is no text, or None. It is scanned to its end, so that no half of it is used."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    empty = True
    with path.open("rb") as file:
        while data := file.read(READ):
            empty = False
            if b"\0" in data:
                return BINARY
            try:
                decoder.decode(data)
            except UnicodeDecodeError:
                return NOT_UTF8
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return NOT_UTF8
    return EMPTY if empty else None


def _text(path: Path) -> Iterator[Piece]:
    """One document; line ends are kept as they are, a byte order mark is not."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, nbytes = "", 0
    with path.open("rb") as file:
        while data := file.read(READ):
            nbytes += len(data)
            rest += decoder.decode(data)
            while len(rest) > PIECE:
                at = cut(rest)
                yield Piece(rest[:at], False, nbytes)
                rest, nbytes = rest[at:], 0
    yield Piece(rest + decoder.decode(b"", final=True), True, nbytes)


def _jsonl(path: Path, skipped: Counter[str]) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _record(path, number, line)
            nbytes = len(line)
            if text == "":
                skipped[EMPTY] += 1
            begin = 0
            while text is not None and len(text) - begin > PIECE:
                end = begin + cut(text[begin : begin + PIECE])
                yield Piece(text[begin:end], False, nbytes)
                begin, nbytes = end, 0
            yield Piece(text[begin:] if text else "", True, nbytes)


def _record(path: Path, number: int, line: bytes) -> str | None:
    """The text of a .jsonl line; None for a blank one."""
    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    if not text:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BevatronError(
            f"{path}: line {number} is not valid JSON ({error}); correct it or remove it"
        ) from error
    found = record.get("text") if isinstance(record, dict) else None
    if not isinstance(found, str):
        what = (
            f"the keys {', '.join(map(repr, record))[:200]}"
            if isinstance(record, dict)
            else (f"a JSON {type(record).__name__}")
        )
        raise BevatronError(
            f'{path}: line {number} holds {what}, expected an object with a string "text"'
        )
    # JSON can spell half of a surrogate pair, which is no character and which no encoder takes
    return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut(text: str) -> int:
    """Where to cut a text of PIECE characters or more: at most there.

    After a line, between two characters that are not spaces: byte-level tokenizers split words
    there anyway, so the tokens are those of the uncut text. Else before a space; else anywhere."""
    for pattern in (LINE_END, SPACE):
        for begin in (PIECE - (1 << 12), PIECE - (1 << 16), 0):
            ends = [match.end() for match in pattern.finditer(text, begin, PIECE)]
            if ends:
                return ends[-1]
    return PIECE
