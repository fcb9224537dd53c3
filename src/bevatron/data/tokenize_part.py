"""Tokenizing one part of a job into a small folder of tokens and starts of documents.

The folder is named by a hash of everything that decides its content, and it appears complete or not
at all. So if the job is killed, the next run of the same job finds the parts that were finished.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bevatron.checkpoint.read_boxes import new_hasher, spell
from bevatron.data import table_documents
from bevatron.data.file_formats import (
    ARRAY,
    ARROW,
    CSV,
    DATASET,
    JSONL,
    PARQUET,
    is_packed,
    open_unpacked,
    unpacked_lines,
)
from bevatron.data.text_documents import (
    EMPTY,
    Piece,
    Unfit,
    array_pieces,
    jsonl_pieces,
    text_pieces,
    utf8_bytes,
)
from bevatron.data.text_encoder import Encoder
from bevatron.data.token_store_writer import StoreWriter, Written
from bevatron.data.tokenize_sources import Item, Part
from bevatron.errors import BevatronError

BATCH = 2 << 20  # characters that are encoded at once
BATCH_PIECES = 16 << 10
DONE = "part.json"  # written last


@dataclass(frozen=True)
class Job:
    """What all parts of a run of `tokenize` have in common.

    Attributes:
        fingerprint, engine: of the tokenizer, and what encodes; they only name the parts.
    """

    fingerprint: str
    engine: str
    vocab_size: int
    eos_id: int | None
    text_field: str

    def key(self, part: Part) -> str:
        """The name of a part's folder."""
        hasher = new_hasher()
        text = json.dumps([1, asdict(self), part.to_json()], sort_keys=True)
        hasher.update(memoryview(text.encode("utf-8", "surrogatepass")))
        return spell(hasher).partition(":")[2]


@dataclass(frozen=True)
class Done:
    """A part that is tokenized. `unfit`: why its file is no text, of a range of a long one."""

    folder: Path
    written: Written
    skipped: dict[str, int]
    unfit: str | None


def find_done(folder: Path) -> Done | None:
    """The finished part in this folder, if it is there and readable."""
    try:
        raw = json.loads((folder / DONE).read_bytes())
        return Done(folder, Written(**raw["written"]), raw["skipped"], raw["unfit"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_part(
    folder: Path, part: Part, job: Job, encoder: Encoder, alive: Callable[[], bool] = lambda: True
) -> None:
    """Tokenize a part into `folder`, in bounded memory.

    `alive` is asked now and then: where it says no, nobody waits for the part any more."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    skipped: Counter[str] = Counter()
    unfit = None
    writer = StoreWriter(
        partial,
        job.vocab_size,
        job.eos_id,
        inside=part.items[0].begin > 0 and part.range_of is not None,
    )
    try:
        for batch in _batches(_pieces(part, job.text_field, skipped)):
            texts = [piece.text for piece in batch]
            ids, lengths = encoder.encode(texts)
            ends = [piece.ends for piece in batch]
            writer.add_batch(ids, lengths, ends, sum(map(utf8_bytes, texts)))
            if not alive():
                raise BevatronError("the job was stopped")
    except Unfit as error:
        unfit = str(error)
    except BaseException:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    done = {"written": asdict(writer.close()), "skipped": dict(skipped), "unfit": unfit}
    (partial / DONE).write_text(json.dumps(done), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:  # another process, orphaned and slow, has just made the same part
        shutil.rmtree(partial, ignore_errors=True)
        if find_done(folder) is None:
            raise


def _batches(stream: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH or len(batch) >= BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(part: Part, field: str, skipped: Counter[str]) -> Iterator[Piece]:
    """Every document of the part's items. Files that are no text are counted in `skipped`; for a
    range of a long text Unfit is raised instead."""
    for item in part.items:
        try:
            yield from item_pieces(item, field, skipped)
        except Unfit as error:
            if part.range_of is not None:
                raise
            skipped[str(error)] += 1


def item_pieces(item: Item, field: str, skipped: Counter[str]) -> Iterator[Piece]:
    """The documents of one item. Raises Unfit for a file that is no text, before any piece of it,
    and BevatronError for what cannot be read or has changed since it was found."""
    if item.kind == DATASET:
        dataset = table_documents.Dataset.from_json(item.path)
        yield from dataset.pieces(item.begin, item.end, field, skipped)
        return
    path = Path(item.path)
    try:
        _check_unchanged(item)
        if item.kind == PARQUET:
            yield from table_documents.parquet_pieces(path, item.begin, item.end, field, skipped)
        elif item.kind == ARROW:
            yield from table_documents.arrow_pieces(path, item.begin, item.end, field, skipped)
        elif item.kind == CSV:
            yield from table_documents.csv_pieces(path, field, skipped)
        elif item.kind == ARRAY:
            with open_unpacked(path) as unpacked:
                yield from array_pieces(unpacked, path, field, skipped)
        elif item.kind == JSONL and is_packed(path):
            yield from jsonl_pieces(unpacked_lines(path), path, field, skipped)
        else:
            with path.open("rb") as file:
                file.seek(item.begin)
                data = file.read(item.end - item.begin)
            _check_unchanged(item)  # before any of it is used
            if item.kind == JSONL:
                yield from jsonl_pieces(io.BytesIO(data), path, field, skipped, item.begin)
            elif data:
                first, last = item.begin == 0, item.end == item.size
                yield from text_pieces(data, first=first, last=last)
            else:
                skipped[EMPTY] += 1
        _check_unchanged(item)
    except OSError as error:
        raise BevatronError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_unchanged(item: Item) -> None:
    status = Path(item.path).stat()
    if (status.st_size, status.st_mtime_ns) != (item.size, item.mtime_ns):
        raise BevatronError(f"{item.path}: changed while it was read; run it again")
