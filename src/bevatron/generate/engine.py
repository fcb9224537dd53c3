"""One model, many requests at once."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevatron.bridge.opened import Opened, open_weights
from bevatron.errors import BevatronError
from bevatron.generate.cache import make_caches
from bevatron.generate.load import load_opened
from bevatron.generate.request import (
    Generation,
    Loglikelihood,
    Piece,
    QueueFull,
    Request,
    Sampling,
    Stats,
    TokenLogprob,
)
from bevatron.generate.sampling import choose
from bevatron.generate.stream import Stream
from bevatron.generate.text import TextStream, Vocabulary
from bevatron.nn.decoder import Decoder
from bevatron.parallel.world import default_device

__all__ = ["Engine", "Generation", "generate"]


class Engine:
    """A model that answers requests. Use as a context, or `close()` it."""

    def __init__(self, opened: Opened, decoder: Decoder, queue: int) -> None:
        self.opened, self.spec, self.decoder = opened, opened.spec, decoder
        self.tokenizer = load_tokenizer(opened)
        self.context = self.spec.max_position_embeddings
        self.stop_tokens = stop_tokens(opened)
        self._vocabulary = Vocabulary(self.tokenizer)
        self._queue = queue
        self._waiting: deque[Stream] = deque()
        self._running: Stream | None = None
        self._cancelled: set[Stream] = set()
        self._changed = threading.Condition()
        self._model = threading.Lock()
        self._closed = False
        self._totals = [0, 0, 0]  # finished, prompt tokens, new tokens
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        ckpt: str | Path,
        *,
        tp: int = 1,
        pp: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        int8: bool = False,
        max_batch: int = 32,
        max_tokens: int | None = None,
        queue: int = 128,
    ) -> Engine:
        """Open a native checkpoint, a run, an HF folder or a Hub id."""
        if tp != 1 or pp != 1:
            raise BevatronError("generate runs in one process for now; use --tp 1 --pp 1")
        opened = open_weights(ckpt)
        if opened.spec.head.kind != "causal_lm":
            raise BevatronError(
                f"{opened.folder}: has the head {opened.spec.head.kind}; only a model with a "
                "causal_lm head can generate text"
            )
        decoder, _ = load_opened(opened, device or default_device(), dtype)
        return cls(opened, decoder, queue)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, request: Request) -> Stream:
        """Begin an answer. Raises BevatronError for a request that can never run, QueueFull when
        too many wait."""
        self._check(request.prompt)
        stream = Stream(request, self._cancel)
        with self._changed:
            if self._closed:
                raise BevatronError("the engine is closed")
            if len(self._waiting) >= self._queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting; try again later")
            self._waiting.append(stream)
            self._changed.notify_all()
        return stream

    def complete(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer all of these; results in their order."""
        results: list[Generation] = []
        step = max(1, self._queue)
        for at in range(0, len(requests), step):
            streams = [self.submit(r) for r in requests[at : at + step]]
            results += [stream.result() for stream in streams]
        return results

    @torch.inference_mode()
    def loglikelihoods(self, sequences: Sequence[Sequence[int]]) -> list[Loglikelihood]:
        """Of every next token of each sequence."""
        out = []
        for ids in sequences:
            self._check(ids)
            with self._model:
                logits = self.decoder.logits(torch.tensor([list(ids)])).float()[0, :-1]
            logprobs = logits.log_softmax(-1)
            following = torch.tensor(ids[1:])
            picked = logprobs.gather(1, following[:, None])[:, 0]
            greedy = logits.argmax(-1) == following
            out.append(Loglikelihood(picked.tolist(), greedy.tolist()))
        return out

    def stats(self) -> Stats:
        with self._changed:
            running = 1 if self._running else 0
            return Stats(running, len(self._waiting), 0, *self._totals)

    def close(self) -> None:
        """End the thread; running and waiting streams end as `cancelled`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise BevatronError("the prompt has no tokens; give at least one")
        if max(ids) >= self.spec.vocab_size or min(ids) < 0:
            raise BevatronError(
                f"the prompt has token {max(ids)}, the model has {self.spec.vocab_size}; the "
                "tokenizer belongs to another model"
            )

    def _cancel(self, stream: Stream) -> None:
        with self._changed:
            if stream in self._waiting:
                self._waiting.remove(stream)
                stream.put(Piece((), "", finish_reason="cancelled"))
            elif stream is self._running:
                self._cancelled.add(stream)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    for stream in self._waiting:
                        stream.put(Piece((), "", finish_reason="cancelled"))
                    return
                self._running = stream = self._waiting.popleft()
            try:
                with self._model:
                    self._answer(stream)
            except Exception as error:
                stream.fail(f"the engine failed: {type(error).__name__}: {error}")
            with self._changed:
                self._running = None
                self._totals[0] += 1
                self._cancelled.discard(stream)

    @torch.inference_mode()
    def _answer(self, stream: Stream) -> None:
        request = stream.request
        text = TextStream(
            self._vocabulary, request.prompt, request.stop_strings, request.skip_special_tokens
        )
        if request.prompt_logprobs is not None:
            logits = self.decoder.logits(torch.tensor([request.prompt]))[0]
            stream.prompt_logprobs = [None]
            for i, token in enumerate(request.prompt[1:]):
                stream.prompt_logprobs.append(_logprob(logits[i], token, request.prompt_logprobs))
        self._totals[1] += len(request.prompt)
        count = 0
        for token, logits in decode_logits(
            self.decoder, list(request.prompt), request.sampling, request.max_new_tokens
        ):
            count += 1
            self._totals[2] += 1
            logprobs = (
                () if request.logprobs is None else (_logprob(logits, token, request.logprobs),)
            )
            if token in request.stop_tokens:
                stream.put(Piece((token,), text.finish(), logprobs, "stop"))
                return
            new = text.add(token)
            reason = "stop" if text.stopped else None
            if self._closed or stream in self._cancelled:
                reason = "cancelled"
            elif reason is None and count == request.max_new_tokens:
                new, reason = new + text.finish(), "length"
                reason = "stop" if text.stopped else reason
            stream.put(Piece((token,), new, logprobs, reason))
            if reason is not None:
                return


def _logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))


@torch.inference_mode()
def decode_logits(
    decoder: Decoder, ids: list[int], sampling: Sampling, limit: int
) -> Iterator[tuple[int, Tensor]]:
    weight = next(decoder.parameters())
    generator = torch.Generator().manual_seed(sampling.seed or 0)
    caches: Any = make_caches(decoder.spec, 1, len(ids) + limit, weight.dtype, weight.device)
    new = torch.tensor([ids], device=weight.device)  # [1, T]
    position = 0
    for _ in range(limit):
        positions = torch.arange(position, position + new.shape[1], device=weight.device)[None]
        logits = decoder(new, _last(decoder), positions=positions, caches=caches)  # [1, V]
        position += new.shape[1]
        token = choose(logits, sampling, generator)
        yield int(token), logits[0]
        new = token[:, None]


def decode(
    decoder: Decoder, ids: list[int], sampling: Sampling, limit: int, stops: frozenset[int]
) -> Iterator[int]:
    """Yield new tokens one by one; ends after a stop token or `limit` tokens."""
    for token, _ in decode_logits(decoder, ids, sampling, limit):
        yield token
        if token in stops:
            return


def _last(decoder: Decoder) -> Any:
    """Logits of the last position only: a prompt's other logits are never made."""

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        return decoder.to_logits(hidden[:, -1], weight)

    return compute


def generate(
    ckpt: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = 0,
    stop: Sequence[str] = (),
    tp: int = 1,
    pp: int = 1,
    int8: bool = False,
) -> Generation:
    """Complete `prompt` with a native checkpoint, a run, an HF folder or a Hub id."""
    sampling = Sampling(
        temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    with Engine.open(ckpt, tp=tp, pp=pp, int8=int8, max_batch=1) as engine:
        ids = engine.tokenizer.encode(prompt).ids
        request = Request(tuple(ids), max_new_tokens, sampling, engine.stop_tokens, tuple(stop))
        return engine.complete([request])[0]


def load_tokenizer(opened: Opened) -> Any:
    """The source's tokenizer.json, by the tokenizers library."""
    from tokenizers import Tokenizer

    path = opened.source / "tokenizer.json" if opened.source else None
    if path is None or not path.is_file():
        raise BevatronError(
            f"{opened.folder}: has no tokenizer.json among its source files; import a folder that "
            "has one, or name `tokenizer` in the run configuration"
        )
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BevatronError(f"{path}: cannot be read as a tokenizer ({error})") from error


def stop_tokens(opened: Opened) -> frozenset[int]:
    """End-of-sequence ids: generation_config.json's, else config.json's; one or a list."""
    for name in ("generation_config.json", "config.json"):
        if text := opened.source_text(name):
            found = json.loads(text).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
