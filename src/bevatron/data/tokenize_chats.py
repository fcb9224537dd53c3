"""Tokenizing conversations, completions and texts into a token store that says what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bevatron.checkpoint.new_folder import check_target, new_folder
from bevatron.data.chat_examples import ChatExamples
from bevatron.data.chat_rows import check_row, examples_of_rows
from bevatron.data.dataset_rows import Rows
from bevatron.data.token_store import TokenStore
from bevatron.data.token_store_writer import StoreWriter
from bevatron.progress import progress

SPLIT, MORE = "answers that begin inside of a token", "rows of several examples"


def tokenize_chats(
    sources: Sequence[str | Path],
    dst: Path,
    *,
    tokenizer: str | Path,
    chat_template: str | Path | None = None,
    assistant_only: bool = True,
    completion_only: bool = True,
    split: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> tuple[TokenStore, dict[str, int]]:
    """Write the token store `dst`, whole or not at all, and open it. Each example is a document.

    Args:
        sources: see `dataset_rows.Rows`; rows are as `chat_rows` has them.
        tokenizer: see `open_tokenizer`; `chat_template`: a file in place of its own template.
        assistant_only, completion_only: see `ChatExamples`.
        split: of a dataset of several.
        workers: rows at a time; default: one per core.
    Returns the store, and how many rows or answers are otherwise than one might think, by what.
    Raises BevatronError naming the row that cannot be learned.
    """
    check_target(dst, overwrite=overwrite)
    for source in sources:
        check_target(dst, overwrite=overwrite, apart_from=Path(source))
    examples = ChatExamples.open(
        tokenizer,
        chat_template=chat_template,
        assistant_only=assistant_only,
        completion_only=completion_only,
    )
    rows = Rows(sources, check_row, [split] * len(sources))
    opened, notes = examples.tokenizer, {SPLIT: 0, MORE: 0}
    with new_folder(dst, overwrite=overwrite) as folder:
        writer = StoreWriter(folder, opened.vocab_size, None, masked=True)
        writer.text_bytes = None  # what a template makes of a row is no text of somebody's
        try:
            with progress("tokenizing", len(rows), "rows") as advance:
                for made in examples_of_rows(examples, rows, range(len(rows)), workers):
                    for one in made:
                        writer.add_example(one.ids, one.learned)
                        notes[SPLIT] += one.split
                    notes[MORE] += len(made) > 1
                    advance(1, tokens=writer.tokens)
        finally:
            writer.close()
        writer.finish(
            tokenizer=opened.name,
            fingerprint=opened.fingerprint,
            bos_id=opened.bos_id,
            encoding=opened.encoding,
            sources=[str(source) for source in sources],
        )
    return TokenStore.open(dst), {what: n for what, n in notes.items() if n}
