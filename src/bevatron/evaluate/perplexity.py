"""Loss, perplexity and bits per byte of a model on tokens or text.

Windows slide over a stream of tokens, so that each token but the first is scored exactly once.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bevatron.data.table_documents import NAME
from bevatron.data.text_documents import utf8_bytes
from bevatron.data.token_store import FILE_NAME, TokenStore
from bevatron.data.tokenize import tokenize
from bevatron.data.tokenize_sources import find_files
from bevatron.data.tokenizer import check_made_with, open_tokenizer
from bevatron.errors import BevatronError
from bevatron.generate.engine import Engine
from bevatron.progress import progress

SEQ_LEN = 2048  # unless the model's context is shorter
TOGETHER = 16384  # tokens in the windows that the engine is given at once
DECODED = 1 << 16  # tokens that are decoded at once to count their bytes
MAX_BATCH = 32  # sequences at once


def open_engine(
    ckpt: str,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    int8: bool = False,
    device: str | None = None,
    max_batch: int = MAX_BATCH,
) -> Engine:
    """`Engine.open`; `dtype`: bf16, fp16 or fp32, default: as stored."""
    return Engine.open(
        ckpt,
        tp=tp,
        pp=pp,
        dtype=dtype,
        int8=int8,
        device=device,
        max_batch=max_batch,
        queue=2 * max_batch,
    )


@dataclass(frozen=True)
class Score:
    """What a model makes of a stream of tokens.

    Attributes:
        data: what was scored, as the user named it.
        loss: in nats per scored token; `perplexity`: its exponential.
        accuracy: the share of scored tokens that the model held for the likeliest.
        bits_per_byte: of the text that the tokens came from, which makes models with different
            tokenizers comparable; None where it is not known.
        tokens: in the stream, of which `scored` were: all but the first.
        text_bytes: of the text, in UTF-8.
    """

    data: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    accuracy: float
    tokens: int
    scored: int
    text_bytes: int | None


def evaluate(
    engine: Engine,
    data: Sequence[str | Path],
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score each of `data`: token stores, or text as `tokenize` takes it, which is tokenized with
    the model's tokenizer first. Documents follow each other as in training; no token is added but
    the eos after each.

    Args:
        seq_len: how many tokens the model sees at once; default 2,048 or its context, if shorter.
        stride: see `windows`; default `seq_len`.
        limit: score the first so many tokens of each.
    Returns what `bevatron eval --json` prints: the values of a Score over all data, the settings,
    and in `parts` a Score for each of them if there are several.
    """
    check_data(data)
    if limit is not None and limit < 2:
        raise BevatronError(f"the limit is {limit} tokens, expected at least 2")
    seq_len = min(SEQ_LEN, engine.context) if seq_len is None else seq_len
    stride = seq_len if stride is None else stride
    next(windows(2, seq_len, stride))  # refuses what is wrong with them
    if seq_len > engine.context:
        raise BevatronError(
            f"the sequence length is {seq_len}, the model's context has {engine.context} tokens "
            "(max_position_embeddings); use at most that"
        )
    began = time.monotonic()
    with ExitStack() as stack:
        stores = [stack.enter_context(_tokens(engine, str(path))) for path in data]
        lengths = [min(limit or s.tokens, s.tokens) for s in stores]
        for path, length in zip(data, lengths, strict=True):
            if length < 2:
                raise BevatronError(f"{path}: has {length} token, expected at least 2 to score one")
        with progress("evaluating", sum(lengths) - len(lengths), "tokens") as advance:
            scores = [
                _score(engine, str(path), store, length, seq_len, stride, advance)
                for path, store, length in zip(data, stores, lengths, strict=True)
            ]
    found: dict[str, Any] = {**asdict(_joined(scores)), "seq_len": seq_len, "stride": stride}
    found["seconds"] = round(time.monotonic() - began, 3)
    if len(scores) > 1:
        found["parts"] = [asdict(score) for score in scores]
    return found


def check_data(data: Sequence[str | Path]) -> None:
    """Refuse what is not there, before a model is opened."""
    if not data:
        raise BevatronError("nothing to evaluate on; name token stores or text with --data")
    for path in map(str, data):
        folder = path.partition(":")[0]  # of a dataset, before its configuration
        if not (Path(path).exists() or Path(folder).is_dir() or NAME.fullmatch(path)):
            find_files([path], Counter())  # raises


class _Advance(Protocol):
    def __call__(self, n: int = 1, **fields: object) -> None: ...


def _score(
    engine: Engine,
    data: str,
    store: TokenStore,
    length: int,
    seq_len: int,
    stride: int,
    advance: _Advance,
) -> Score:
    """Score the first `length` tokens of a store."""
    nats, right, scored = 0.0, 0, 0
    pending = windows(length, seq_len, stride)
    at_once = max(1, TOGETHER // (seq_len + 1))
    while batch := list(islice(pending, at_once)):
        sequences = [store.read(w.begin, w.end - w.begin).tolist() for w in batch]
        for window, found in zip(batch, engine.loglikelihoods(sequences), strict=True):
            nats -= math.fsum(found.logprobs[-window.scored :])
            right += sum(found.greedy[-window.scored :])
        new = sum(window.scored for window in batch)
        scored += new
        advance(new, loss=f"{nats / scored:.4f}")
    loss = nats / scored
    size = _text_bytes(engine, store, length)
    return Score(
        data=data,
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=loss / math.log(2) * length / size if size else None,
        accuracy=right / scored,
        tokens=length,
        scored=scored,
        text_bytes=size,
    )


def _joined(scores: Sequence[Score]) -> Score:
    """One score of all streams: every token counts the same, wherever it lies."""
    tokens, scored = sum(s.tokens for s in scores), sum(s.scored for s in scores)
    loss = sum(s.loss * s.scored for s in scores) / scored
    sizes = [s.text_bytes for s in scores if s.text_bytes is not None]
    size = sum(sizes) if len(sizes) == len(scores) else None
    bits = sum((s.bits_per_byte or 0.0) * (s.text_bytes or 0) for s in scores)
    return Score(
        data=", ".join(s.data for s in scores),
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=bits / size if size else None,
        accuracy=sum(s.accuracy * s.scored for s in scores) / scored,
        tokens=tokens,
        scored=scored,
        text_bytes=size,
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def _tokens(engine: Engine, path: str) -> Iterator[TokenStore]:
    """The tokens of a store, or of text."""
    if (Path(path) / FILE_NAME).is_file():
        store = TokenStore.open(Path(path))
        store.check_vocab(engine.spec.vocab_size)
        opened, or_text = engine.opened, ", or give the text itself as --data"
        check_made_with(store, opened.tokenizer, opened.folder, or_text)
        yield store
        return
    assert engine.tokenizer is not None  # else it has raised: text needs one
    own = open_tokenizer(engine.opened.tokenizer or "")
    with tempfile.TemporaryDirectory(prefix="bevatron-eval-") as folder:
        target = Path(folder) / "tokens"
        store = tokenize([path], target, tokenizer=own.file, append_eos=own.eos_id is not None)
        store.check_vocab(engine.spec.vocab_size)
        yield store


def _text_bytes(engine: Engine, store: TokenStore, length: int) -> int | None:
    """Of the text behind a store's first `length` tokens: as counted when it was made, or for a
    part of it, or in a store that does not know, by decoding."""
    if length == store.tokens and store.info.text_bytes:
        return store.info.text_bytes
    if engine.opened.tokenizer is None:
        return None
    return sum(
        utf8_bytes(
            engine.tokenizer.decode(store.read(begin, min(DECODED, length - begin)).tolist())
        )
        for begin in range(0, length, DECODED)
    )


class Window(NamedTuple):
    """Tokens `begin` to `end` of a stream, of which the last `scored` are scored; the others are
    their context."""

    begin: int
    end: int
    scored: int


def windows(tokens: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The windows over a stream of so many tokens. The model sees at most `seq_len` of them at
    once: a window has one more, which is only predicted.

    Args:
        stride: how many tokens a window scores. At `seq_len` all that it predicts, which is the
            fastest; the smaller, the more context each token has, and the lower the loss. The last
            window is as long as the others where the stream is, so it scores fewer.
    """
    if seq_len < 1:
        raise BevatronError(f"the sequence length is {seq_len}, expected at least 1")
    if not 1 <= stride <= seq_len:
        raise BevatronError(
            f"the stride is {stride}, expected 1 to {seq_len}, the sequence length: a larger one "
            "would leave tokens out"
        )
    done = 1  # nothing comes before the first token
    while done < tokens:
        # The first window has no context to give up, so it scores all that it sees
        end = min(tokens, done + (stride if done > 1 else seq_len))
        yield Window(max(0, end - seq_len - 1), end, end - done)
        done = end
