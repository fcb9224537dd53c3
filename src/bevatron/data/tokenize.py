"""From text to a token store, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bevatron.checkpoint.new_folder import check_target, new_folder
from bevatron.data.store import StoreWriter, TokenStore
from bevatron.data.text import Piece, find_files, pieces
from bevatron.data.tokenizer import CONFIGS, OpenTokenizer, open_tokenizer
from bevatron.errors import BevatronError

BATCH = 2 << 20  # characters that are encoded at once, in some 250 MB
BATCH_PIECES = 16 << 10


def tokenize(
    sources: Sequence[str | Path],
    dst: Path,
    *,
    tokenizer: str | Path,
    overwrite: bool = False,
    append_eos: bool = True,
) -> TokenStore:
    """Write the token store `dst`, whole or not at all, and open it.

    Text goes through as it is: no special token is added but the eos after each document. The name
    of a special token in the text becomes that token, as in transformers. A document of more than
    256K characters is cut, at a line end if it has one, and its parts are encoded apart.

    Args:
        sources: text files (a document each), .jsonl files with a "text" (a document per line),
            folders of both. What is hidden, binary or not UTF-8 is left out and counted in the
            store's `info.skipped`.
        tokenizer: see `open_tokenizer`.
        append_eos: the eos that the first of `tokenizer.CONFIGS` beside tokenizer.json names.
    Raises BevatronError for a source or tokenizer that is missing or unreadable, for no text at
    all, for an unknown eos, and for a `dst` that exists or contains or lies in a source.
    """
    skipped: Counter[str] = Counter()
    files = find_files(sources, skipped)
    check_target(dst, overwrite=overwrite)
    for source in sources:
        check_target(dst, overwrite=overwrite, apart_from=Path(source))
    opened = open_tokenizer(tokenizer)
    if append_eos and opened.eos_id is None:
        raise BevatronError(
            f"{opened.file}: no eos token is named beside it, in {', '.join(CONFIGS)}; pass the "
            "folder of the whole model, or tokenize without separators (append_eos off)"
        )
    with new_folder(dst, overwrite=overwrite) as folder:
        eos_id = opened.eos_id if append_eos else None
        writer = StoreWriter(folder, opened.vocab_size, eos_id)
        try:
            _encode(pieces(files.paths, skipped), opened, writer, files.nbytes)
        finally:
            writer.close()
        skipped = +skipped  # without zeros
        if not writer.tokens:
            reasons = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items())) or "none"
            raise BevatronError(
                f"{', '.join(map(str, sources)) or 'no source'}: no text found in "
                f"{len(files.paths)} files (skipped: {reasons}); expected UTF-8 text or .jsonl"
            )
        writer.finish(
            tokenizer=opened.name,
            fingerprint=opened.fingerprint,
            bos_id=opened.bos_id,
            skipped=skipped,
        )
    return TokenStore.open(dst)


def _encode(
    stream: Iterator[Piece], tokenizer: OpenTokenizer, writer: StoreWriter, total: int
) -> None:
    from bevatron.progress import progress

    with progress("tokenizing", total=total, unit="B") as advance:
        for batch in _batches(stream):
            texts = [piece.text for piece in batch]
            encodings = tokenizer.encoder.encode_batch_fast(texts, add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                writer.add(encoding.ids, piece.ends)
            advance(sum(piece.nbytes for piece in batch), tokens=writer.tokens)


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
