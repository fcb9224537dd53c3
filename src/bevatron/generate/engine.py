"""The engine: one model answers many requests at once, by continuous batching over one KV cache."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bevatron.bridge.merged_weights import merge_notes
from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.checkpoint.dtypes import parse_dtype
from bevatron.checkpoint.save_and_load import DTYPES
from bevatron.errors import BevatronError, UnexpectedError, failure
from bevatron.generate.answer_stream import Stream
from bevatron.generate.decoding_model import Model, is_want_of_memory
from bevatron.generate.detokenize import Vocabulary
from bevatron.generate.engine_processes import Group, check_layout, open_group
from bevatron.generate.engine_step import Output, Step
from bevatron.generate.kv_cache import CAPACITY
from bevatron.generate.request import (
    Generation,
    Loglikelihood,
    NoRoom,
    QueueFull,
    Request,
    Sampling,
    Stats,
)
from bevatron.generate.sampling_options import defaults_of
from bevatron.generate.scheduler import Scheduler
from bevatron.parallel.process_groups import choose_device
from bevatron.train.hardware import free_bytes

__all__ = ["Engine", "Generation", "generate"]

SHARE = 0.25  # of the free memory that the cache may take if nothing is said
MOST = 0.7  # and if less would not hold one context


class Engine:
    """A model that answers requests. Use as a context, or `close()` it.

    Attributes:
        opened: the checkpoint; spec: the model.
        context: positions that the model was made for. The engine computes beyond it, as
            transformers does; what that is worth depends on the model's rope.
        stop_tokens: end-of-sequence tokens that the checkpoint names.
        sampling: what its generation_config.json says, the default of every verb.
        max_tokens: positions that the cache may have, over all sequences.
    """

    def __init__(
        self,
        opened: Opened,
        group: Group,
        *,
        max_batch: int,
        max_tokens: int | None,
        queue: int,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.opened, self.spec, self.group = opened, opened.spec, group
        vocabulary = vocabulary or vocabulary_of(opened)
        self._tokenizer = vocabulary.tokenizer
        self.context = self.spec.max_position_embeddings
        defaults = defaults_of(opened)
        self.stop_tokens, self.sampling = defaults.stop_tokens, defaults.sampling
        self.max_tokens = max_tokens or _default_tokens(group.model, self.context)
        self._queue = queue
        self._scheduler = Scheduler(vocabulary, self.spec.vocab_size, max_batch, self.max_tokens)
        self._changed = threading.Condition()
        self._incoming: list[tuple[Stream, bool]] = []
        self._cancelled: set[Stream] = set()
        self._closed = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="bevatron-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        ckpt: str | Path,
        *,
        tp: int = 1,
        pp: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        int8: bool = False,
        max_batch: int = 32,
        max_tokens: int | None = None,
        queue: int = 128,
    ) -> Engine:
        """Open a native checkpoint, a run, an HF folder or a Hub id.

        Args:
            tp, pp: processes that share the model; they are started here, on this machine. Under
                torchrun its processes are used, and this returns on rank 0 alone.
            device: such as cpu, cuda, cuda:1 or mps; as `default_device` if absent.
            dtype: of the weights, such as bf16; that of the stored ones if absent.
            int8: on a CPU, matrices rounded to 8 bits, row by row.
            max_batch: sequences that run at once.
            max_tokens: positions that the cache may have; from the free memory if absent.
            queue: requests that may wait.
        Raises BevatronError for what cannot generate text, whichever process found it out.
        """
        for name, value in (("tp", tp), ("pp", pp), ("max_batch", max_batch)):
            if value < 1:
                raise BevatronError(f"{name} is {value}, expected at least 1")
        if isinstance(dtype, str):
            parse_dtype(dtype)  # a mistake in it is said at once
        opened = open_weights(ckpt)
        for note in merge_notes(opened.folder):
            print(f"{note} as it is read", file=sys.stderr, flush=True)
        check_layout(opened.spec, str(opened.folder), tp, pp)
        where = choose_device(None if device is None else str(device))
        if tp * pp > 1 and ":" in str(device):
            raise BevatronError(
                f"device {device} is a single one, but tp {tp} x pp {pp} need {tp * pp}"
            )
        kind = DTYPES[parse_dtype(dtype)] if isinstance(dtype, str) else dtype
        group = open_group(opened, str(ckpt), tp, pp, where, kind, int8, batches=max_batch > 1)
        try:
            return cls(opened, group, max_batch=max_batch, max_tokens=max_tokens, queue=queue)
        except BaseException:
            group.close()
            raise

    @property
    def tokenizer(self) -> Any:
        """Of the tokenizers library. Raises BevatronError if the checkpoint has none: then only
        token ids go in and out."""
        return self._tokenizer or load_tokenizer(self.opened)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, request: Request) -> Stream:
        """Begin an answer. Raises BevatronError for a request that can never run, QueueFull when
        too many wait."""
        self._check(request)
        with self._changed:
            waiting = len(self._scheduler.waiting) + len(self._incoming)
            if waiting >= self._queue + self._scheduler.max_batch - len(self._scheduler.running):
                raise QueueFull(f"{waiting} requests are waiting, which is the limit; try again")
            return self._add(request, True)

    def complete(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer all of these, however many; results in their order."""
        for request in requests:
            self._check(request)
        with self._changed:
            streams = [self._add(request, True) for request in requests]
        return [stream.result() for stream in streams]

    def loglikelihoods(self, sequences: Sequence[Sequence[int]]) -> list[Loglikelihood]:
        """Of every next token of each sequence, however many sequences; results in their order."""
        requests = [Request(tuple(ids), prompt_logprobs=0) for ids in sequences]
        for request in requests:
            self._check(request, answers=False)
        with self._changed:
            streams = [
                self._add(request, False) if len(request.prompt) > 1 else None
                for request in requests
            ]
        out = []
        for stream in streams:
            scored = []
            if stream is not None:
                if stream.result().finish_reason == "cancelled":
                    raise BevatronError("the engine was closed")
                scored = [p.logprob for p in stream.prompt_logprobs or () if p is not None]
            out.append(Loglikelihood(scored, stream.greedy if stream is not None else []))
        return out

    def stats(self) -> Stats:
        """Now, and in all."""
        scheduler = self._scheduler
        with self._changed:
            return Stats(
                len(scheduler.running),
                len(scheduler.waiting) + len(self._incoming),
                scheduler.cached_tokens,
                scheduler.finished,
                scheduler.prompt_tokens,
                scheduler.new_tokens,
            )

    @property
    def failure(self) -> str | None:
        """Why nothing can be answered any more, if that is so."""
        return self._failure

    def close(self) -> None:
        """End the thread and the other processes; streams that run or wait end as `cancelled`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _add(self, request: Request, answers: bool) -> Stream:
        if self._failure is not None:
            raise UnexpectedError(self._failure)
        if self._closed:
            raise BevatronError("the engine is closed")
        stream = Stream(request, self._cancel)
        self._incoming.append((stream, answers))
        self._changed.notify_all()
        return stream

    def _check(self, request: Request, answers: bool = True) -> None:
        vocab = self.spec.vocab_size
        for what, ids in (
            ("the prompt", request.prompt),
            ("logit_bias", request.sampling.logit_bias),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < vocab):
                wrong = next(i for i in ids if not 0 <= i < vocab)
                raise BevatronError(
                    f"{what} has token {wrong}, the model has {vocab}; the tokenizer belongs to "
                    "another model"
                )
        needed = len(request.prompt) + (request.max_new_tokens - 1 if answers else 0)
        if needed > self.max_tokens:
            raise BevatronError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones "
                f"do not fit into a cache of {self.max_tokens} positions; ask for fewer, or raise "
                "max_tokens"
            )

    def _cancel(self, stream: Stream) -> None:
        with self._changed:
            self._cancelled.add(stream)
            self._changed.notify_all()

    # --- the engine's thread

    def _run(self) -> None:
        try:
            while self._hear():
                if (step := self._scheduler.next_step()) is None:
                    continue
                output = self._computed(step)
                with self._changed:
                    if output is None:
                        self._scheduler.give_one_up()
                    else:
                        self._scheduler.take(step, output)
        except BaseException as error:
            with self._changed:
                self._failure = self.group.why(error) or str(failure(error))
        self._end()

    def _computed(self, step: Step) -> Output | None:
        """None if there is not enough memory for it."""
        try:
            return self.group.run(step)
        except Exception as error:
            survived = self.group.alone and is_want_of_memory(error)
            if not survived and not isinstance(error, NoRoom):
                raise
        device = self.group.model.device
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
        return None

    def _hear(self) -> bool:
        """Take in what was asked meanwhile, waiting if there is nothing to do. False to end."""
        scheduler = self._scheduler
        with self._changed:
            while not (self._incoming or scheduler.running or scheduler.waiting or self._closed):
                self._cancelled.clear()
                self._changed.wait()
            for stream, answers in self._incoming:
                scheduler.add(stream, answers)
            self._incoming.clear()
            if self._cancelled:
                scheduler.cancel(self._cancelled)
                self._cancelled.clear()
            return not self._closed

    def _end(self) -> None:
        with self._changed:
            for stream, answers in self._incoming:
                self._scheduler.add(stream, answers)
            self._incoming.clear()
            left = [s.stream for s in [*self._scheduler.waiting, *self._scheduler.running]]
            if self._failure is not None:
                for stream in left:
                    stream.fail(UnexpectedError(self._failure))
            self._scheduler.cancel(left)
        self.group.close()


def _default_tokens(model: Model, context: int) -> int:
    """As many positions as a share of the free memory holds, and a context if there is room for
    one."""
    free = free_bytes(model.device)
    if model.device.type == "cpu":
        free //= model.ranks.processes  # which share the machine's memory
    position = max(1, model.cache.bytes_per_position)
    usual, most = int(SHARE * free / position), int(MOST * free / position)
    return max(min(context, CAPACITY), min(max(context, usual), most))


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


def vocabulary_of(opened: Opened) -> Vocabulary:
    """Of the source's tokenizer, or of none if it has none."""
    return Vocabulary(load_tokenizer(opened) if opened.tokenizer else None)


def load_tokenizer(opened: Opened) -> Any:
    """The source's tokenizer.json, by the tokenizers library."""
    from bevatron.data.tokenizer import missing, read_encoder

    path = opened.tokenizer
    if path is not None:
        return read_encoder(path)
    older = missing([opened.source] if opened.source else [])
    raise BevatronError(
        f"{opened.folder}: has no tokenizer.json among its source files{older}, and text needs "
        "a tokenizer; put it beside config.json (of a native checkpoint: into its source/ folder)"
    )
