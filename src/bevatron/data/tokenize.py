"""Tokenizing text into a token store, in parallel, in bounded memory; a killed job resumes."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from bevatron.checkpoint.new_folder import check_target, new_folder
from bevatron.data.file_formats import DATASET, KNOWN
from bevatron.data.text_documents import Unfit
from bevatron.data.text_encoder import Choice, Engine, choose
from bevatron.data.token_store import TokenStore
from bevatron.data.token_store_writer import StoreWriter
from bevatron.data.tokenize_part import DONE, Done, Job, find_done, item_pieces, make_part
from bevatron.data.tokenize_sources import Part, plan
from bevatron.data.tokenize_workers import in_workers
from bevatron.data.tokenizer import CONFIGS, OpenTokenizer, open_tokenizer
from bevatron.errors import BevatronError, failed

PROBES, PROBE = 64, 4096  # pieces of the text itself on which engines are compared; characters
HERE = 4 << 20  # bytes that are not worth starting other processes for


def tokenize(
    sources: Sequence[str | Path],
    dst: Path,
    *,
    tokenizer: str | Path,
    overwrite: bool = False,
    append_eos: bool = True,
    text_field: str = "text",
    split: str | None = None,
    workers: int | None = None,
    engine: Engine = "auto",
    part_bytes: int | None = None,
    as_text: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> TokenStore:
    """Write the token store `dst`, whole or not at all, and open it.

    Text goes through as it is: no special token is added but the eos after each document. The name
    of a special token in the text becomes that token, as in transformers. A document of more than
    256K characters is cut, at a line end if it has one, and its parts are encoded apart.

    The work is done in parts, which are kept beside `dst` until it is whole: the same call after a
    killed one goes on from there, and gives the same bytes. So does any number of workers.

    Args:
        sources: text files (a document each), .jsonl, .json, .csv and .tsv (perhaps packed),
            .parquet and .arrow (a document per record), folders of all of these or saved by
            `datasets`; a dataset on the Hub (`org/name`, `org/name:config`) if there is no such
            path. What is hidden, binary or not UTF-8 and a dataset's card are left out and counted
            in the store's `info.skipped`; another known format is an error.
        tokenizer: see `open_tokenizer`.
        append_eos: the eos that the first of `tokenizer.CONFIGS` beside tokenizer.json names.
        text_field: the key or column that holds the text.
        split: of a dataset, default "train"; given with a folder, that is a dataset, too.
        workers: processes; default: one per core. A small job is done in this one.
        engine: see `choose`. All give the same ids.
        part_bytes: how much a part is at most; default 16 MiB, less for little text.
        as_text: suffixes of files that are a document each, whatever they are known for.
        leave_out: patterns of names of files and folders to leave out below a folder.
    Raises BevatronError for a source or tokenizer that is missing or unreadable, for no text at
    all, for an unknown eos, and for a `dst` that exists or contains or lies in a source.
    """
    if workers is not None and workers < 1:
        raise BevatronError(f"the number of workers is {workers}, expected at least 1")
    check_target(dst, overwrite=overwrite)
    for source in sources:
        check_target(dst, overwrite=overwrite, apart_from=Path(source))
    skipped: Counter[str] = Counter()
    parts = plan(
        sources,
        skipped,
        split=split,
        text_field=text_field,
        part_bytes=part_bytes,
        as_text=as_text,
        leave_out=leave_out,
    )
    opened = open_tokenizer(tokenizer)
    if append_eos and opened.eos_id is None:
        raise BevatronError(
            f"{opened.file}: no eos token is named beside it, in {', '.join(CONFIGS)}; pass the "
            "folder of the whole model, or tokenize without separators (append_eos off)"
        )
    unknown = any(item.kind == DATASET for part in parts for item in part.items)
    total = None if unknown else sum(part.nbytes for part in parts)
    probes = islice(_texts(parts, text_field), PROBES)
    choice = choose(engine, opened.file, opened.encoder, probes, total)
    job = Job(
        fingerprint=opened.fingerprint,
        engine=choice.engine,
        vocab_size=opened.vocab_size,
        eos_id=opened.eos_id if append_eos else None,
        text_field=text_field,
    )
    count = workers or cores()
    with new_folder(dst, overwrite=overwrite) as folder:
        writer = StoreWriter(folder, opened.vocab_size, job.eos_id)
        with _parts_folder(dst) as beside:
            try:
                _run(parts, job, choice, opened, beside, count, writer, skipped)
            finally:
                writer.close()
        if not writer.tokens:
            shutil.rmtree(beside, ignore_errors=True)
            raise BevatronError(_nothing(sources, parts, skipped))
        writer.finish(
            tokenizer=opened.name,
            fingerprint=opened.fingerprint,
            bos_id=opened.bos_id,
            skipped=+skipped,  # without zeros
            encoding=opened.encoding,
            engine=choice.describe(),
            sources=[str(source) for source in sources],
        )
    shutil.rmtree(_parts_path(dst), ignore_errors=True)
    return TokenStore.open(dst)


def _run(
    parts: Sequence[Part],
    job: Job,
    choice: Choice,
    opened: OpenTokenizer,
    beside: Path,
    count: int,
    writer: StoreWriter,
    skipped: Counter[str],
) -> None:
    """Tokenize what is not yet in `beside`, and join all parts in their order as they come."""
    from bevatron.progress import progress

    folders = [beside / job.key(part) for part in parts]
    _clear(beside, {folder.name for folder in folders})
    todo = {f: p for f, p in zip(folders, parts, strict=True) if find_done(f) is None}
    nbytes = sum(part.nbytes for part in parts)
    before = nbytes - sum(part.nbytes for part in todo.values())
    joiner = _Joiner(parts, folders, writer, skipped, job, choice, opened)
    with progress("tokenizing", total=nbytes or None, unit="B") as advance:
        if before:
            advance(before)
        if count == 1 or len(todo) <= 1 or 0 < nbytes - before < HERE:
            encoder = choice.encoder(opened.encoder)
            for folder, part in todo.items():
                make_part(folder, part, job, encoder)
                joiner.join()
                advance(part.nbytes, tokens=writer.tokens)
        else:
            tasks = list(todo.items())
            for number in in_workers(tasks, job, choice, opened.file, beside, count):
                joiner.join()
                advance(tasks[number][1].nbytes, tokens=writer.tokens)
        joiner.join()


class _Joiner:
    """Appends the parts to the store, each as soon as all before it are there."""

    def __init__(
        self,
        parts: Sequence[Part],
        folders: Sequence[Path],
        writer: StoreWriter,
        skipped: Counter[str],
        job: Job,
        choice: Choice,
        opened: OpenTokenizer,
    ) -> None:
        self.parts, self.folders, self.writer, self.skipped = parts, folders, writer, skipped
        self.job, self.choice, self.opened = job, choice, opened
        self.at = 0  # the first part that is not joined yet

    def join(self) -> None:
        while self.at < len(self.parts):
            end = self._end_of_file(self.at)
            done = [find_done(folder) for folder in self.folders[self.at : end]]
            found = [one for one in done if one is not None]
            if len(found) < len(done):
                return
            unfit = next((one.unfit for one in found if one.unfit is not None), None)
            if unfit is not None:
                self.skipped[unfit] += 1
            else:
                for number, one in enumerate(found, self.at):
                    self._append(number, one)
            self.at = end

    def _end_of_file(self, begin: int) -> int:
        """The end of the parts that are ranges of the same long text as part `begin`: it is used
        as a whole or not at all."""
        end = begin + 1
        name = self.parts[begin].range_of
        while (
            name is not None
            and end < len(self.parts)
            and self.parts[end].range_of == name
            and self.parts[end].items[0].begin > 0
        ):
            end += 1
        return end

    def _append(self, number: int, done: Done) -> None:
        self.skipped.update(done.skipped)
        if self.writer.append(done.folder, done.written):
            return
        # Its files are not what was written: after a loss of power, say. Once more
        encoder = self.choice.encoder(self.opened.encoder)
        make_part(done.folder, self.parts[number], self.job, encoder)
        again = find_done(done.folder)
        if again is None or not self.writer.append(again.folder, again.written):
            raise BevatronError(f"{done.folder}: cannot be read back as written; check the disk")


def cores() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _parts_path(dst: Path) -> Path:
    dst = Path(os.path.abspath(dst))  # noqa: PTH100  (resolve() would follow a link target)
    return dst.parent / f".{dst.name}.parts"


@contextmanager
def _parts_folder(dst: Path) -> Iterator[Path]:
    """The folder of finished parts. On an error it stays if there are any, and the message says
    so."""
    folder = _parts_path(dst)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except BaseException as error:
        _clear(folder, None)
        if not any(folder.glob(f"*/{DONE}")):
            shutil.rmtree(folder, ignore_errors=True)
        elif isinstance(error, BevatronError):
            kept = f"what is done is kept in {folder}: the same command goes on from there; "
            message = f"{error} ({kept}remove it to start anew)"
            raise failed(message, error.exit_status) from error
        raise


def _clear(folder: Path, keep: set[str] | None) -> None:
    """Remove what a killed process left half done and, if `keep` is given, finished parts of
    another job: other sources, another tokenizer or other options."""
    for path in folder.iterdir():
        if path.name.startswith(".") or (keep is not None and path.name not in keep):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _texts(parts: Sequence[Part], field: str) -> Iterator[str]:
    """The beginnings of the first pieces."""
    for part in parts:
        for item in part.items:
            with suppress(Unfit):
                for piece in item_pieces(item, field, Counter()):
                    yield piece.text[:PROBE]


def _nothing(sources: Sequence[str | Path], parts: Sequence[Part], skipped: Counter[str]) -> str:
    files = {item.path for part in parts for item in part.items}
    reasons = ", ".join(f"{n} {why}" for why, n in sorted((+skipped).items())) or "none"
    return (
        f"{', '.join(map(str, sources)) or 'no source'}: no text found in {len(files)} files "
        f"(skipped: {reasons}); expected {KNOWN}"
    )
