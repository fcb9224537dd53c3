"""The documents of text and .jsonl files, as pieces of bounded size."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from bevatron.errors import BevatronError

PIECE = 1 << 18  # characters; more are cut
WINDOW = 1 << 16  # bytes in which a place to cut a file is looked for
LINE_END = re.compile(r"\S\n(?=\S)")
SPACE = re.compile(r"\S(?=\s)")

CHARACTERS = 1 << 20  # of a JSON array that are read at once; more for a longer record
BETWEEN = [re.compile(r"\s*\[\s*"), re.compile(r"\s*(?:,\s*|(?=\]))")]  # records: the first, others

BINARY, NOT_UTF8, EMPTY = "binary", "not UTF-8", "empty"
BOM = codecs.BOM_UTF8


class Piece(NamedTuple):
    """A part of a document, and whether the document ends with it."""

    text: str
    ends: bool


def utf8_bytes(text: str) -> int:
    """How many bytes a text has as UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class Unfit(Exception):
    """A file is no text; its argument says why: BINARY or NOT_UTF8."""


def text_pieces(data: bytes, *, first: bool, last: bool) -> Iterator[Piece]:
    """The document that a text file is; line ends are kept as they are, a byte order mark is not.

    Args:
        data: the file, or a range of it; `first`, `last`: whether the file begins and ends with it.
    Raises Unfit."""
    if b"\0" in data:
        raise Unfit(BINARY)
    try:
        text = (data.removeprefix(BOM) if first else data).decode("utf-8")
    except UnicodeDecodeError:
        raise Unfit(NOT_UTF8) from None
    yield from document(text, ends=last)


def document(text: str, *, ends: bool = True) -> Iterator[Piece]:
    """A document's text in pieces; `ends`: it is the end of its document, too."""
    begin = 0
    while len(text) - begin > PIECE:
        end = begin + cut(text[begin : begin + PIECE])
        yield Piece(text[begin:end], False)
        begin = end
    yield Piece(text[begin:] if begin else text, ends)


def jsonl_pieces(
    lines: Iterator[bytes], path: Path, field: str, skipped: Counter[str], before: int = 0
) -> Iterator[Piece]:
    """The documents of .jsonl lines.

    Args:
        before: bytes of the file that come before, for the line numbers of messages.
    Raises BevatronError for a line that is no object with a string `field`.
    """
    for number, line in enumerate(lines):
        try:
            text = _record(line, field, first=number == 0 and before == 0)
        except ValueError as error:
            at = number + 1 + _lines_before(path, before)
            raise BevatronError(f"{path}: line {at} {error}") from None
        if text is None:
            continue
        if not text:
            skipped[EMPTY] += 1
        yield from document(text)


def _record(line: bytes, field: str, *, first: bool) -> str | None:
    """The text of a .jsonl line; None for a blank one. Raises ValueError."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text; correct it or remove it") from None
    if not text:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error}); correct it or remove it") from None
    return text_of(record, field)


def text_of(record: object, field: str) -> str:
    """The text of a record, empty for a null, as tables have it. Raises ValueError if it has none
    or one that is no Unicode."""
    found = record.get(field) if isinstance(record, dict) else None
    if found is None and isinstance(record, dict) and field in record:
        return ""
    if not isinstance(found, str):
        what = (
            f"the keys {', '.join(map(repr, record))[:200]}"
            if isinstance(record, dict)
            else (f"a JSON {type(record).__name__}")
        )
        raise ValueError(
            f'holds {what}, expected an object with a string "{field}"; name another with '
            "--text-field"
        )
    try:  # JSON can spell half of a surrogate pair
        found.isascii() or found.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(found[error.start]):04x}"
        raise ValueError(
            f'holds {half} in "{field}", half of a surrogate pair, which has no UTF-8 form; '
            "correct it or remove it"
        ) from None
    return found


def array_pieces(file: IO[bytes], path: Path, field: str, skipped: Counter[str]) -> Iterator[Piece]:
    """The documents of a JSON array of records, of which one is in memory at a time.

    Raises BevatronError naming the record (from 1) that is no object with a string `field`."""
    number, decoder = 0, json.JSONDecoder()
    reader = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    text, at, ends = "", 0, False
    want = CHARACTERS

    def refuse(what: object) -> BevatronError:
        return BevatronError(f"{path}: record {number} {what}")

    try:
        while True:
            match = BETWEEN[number > 0].match(text, at)
            if match is not None and match.end() < len(text):
                begin = match.end()
                if text[begin] == "]":
                    break
                try:
                    record, after = decoder.raw_decode(text, begin)
                except ValueError as error:
                    if ends:
                        number += 1
                        raise refuse(f"is not valid JSON ({error}); correct it") from None
                else:
                    number, at, want = number + 1, after, CHARACTERS
                    try:
                        found = text_of(record, field)
                    except ValueError as error:
                        raise refuse(error) from None
                    if not found:
                        skipped[EMPTY] += 1
                    yield from document(found)
                    continue
            elif ends:
                raise BevatronError(
                    f"{path}: its array of records does not end well after record {number}; "
                    "correct it or copy it anew"
                )
            more = reader.read(want)
            text, at, ends, want = text[at:] + more, 0, not more, want * 2
        if (text[begin + 1 :] + reader.read(CHARACTERS)).strip():
            raise BevatronError(f"{path}: goes on after its array of records; expected one array")
    except UnicodeDecodeError as error:
        raise BevatronError(f"{path}: is not UTF-8 text after record {number}") from error
    except RecursionError as error:
        raise BevatronError(f"{path}: nested too deeply after record {number}") from error


def _lines_before(path: Path, before: int) -> int:
    count = 0
    if before:
        with path.open("rb") as file:
            while before > 0 and (data := file.read(min(before, 1 << 20))):
                before -= len(data)
                count += data.count(b"\n")
    return count


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


# ---------------------------------------------------------------------------------------------
# Where a long file may be cut
# ---------------------------------------------------------------------------------------------


def next_line(file: BinaryIO, at: int) -> int:
    """The first beginning of a line at byte `at` or after it; the file's size if there is none."""
    file.seek(at - 1)
    position = at - 1
    while data := file.read(WINDOW):
        found = data.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(data)
    return position


def next_split(file: BinaryIO, at: int) -> int:
    """Where to cut a text of UTF-8 at byte `at` or soon after it; as `cut`, forwards."""
    file.seek(at)
    data = file.read(WINDOW)
    skip = 0
    while skip < min(4, len(data)) and data[skip] & 0xC0 == 0x80:  # inside of a character
        skip += 1
    # An invalid byte changes where the cut is, but then the whole file is left out
    text = codecs.getincrementaldecoder("utf-8")("ignore").decode(data[skip:])
    for pattern in (LINE_END, SPACE):
        if match := pattern.search(text):
            return at + skip + len(text[: match.end()].encode())
    return at + skip
