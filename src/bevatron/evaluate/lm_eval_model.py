"""The model class `bevatron` for lm-evaluation-harness.

Importing this module registers the class, so that in Python `lm_eval.simple_evaluate(model=
"bevatron", model_args={"pretrained": CKPT, "tp": 2}, tasks=[...])` works. Text is tokenized and
scored as in lm_eval's own class for transformers (`hf`), so the scores are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bevatron.chat.chat_template import ChatTemplate
from bevatron.data.tokenizer import OWN_CONFIGS, open_tokenizer, special_id
from bevatron.errors import BevatronError
from bevatron.evaluate.perplexity import MAX_BATCH, open_engine
from bevatron.generate.answer_stream import Stream
from bevatron.generate.request import Request, Sampling
from bevatron.generate.sampling_options import RECOMMENDED

TOGETHER = 16384  # tokens in the sequences that the engine is given at once
Pair = tuple[Any, list[int], list[int]]  # the request's texts, its context, what is scored


@register_model("bevatron")
class BevatronLM(TemplateLM):
    """Any checkpoint of ours, at any layout.

    Args:
        pretrained: native checkpoint, run, HF folder or Hub id.
        max_length: tokens that the model sees at once; default: its context.
        max_gen_toks: how long an answer may be where the task does not say.
        add_bos_token: whether texts get the tokenizer's special tokens; default: as it says itself.
        prefix_token_id: what comes before a text without a context; default: bos, else eos.
        batch_size: answers that are generated at the same time; 1 (lm_eval's default) and `auto`
            leave it to the engine. Scores do not depend on it.
        chat_template_args: variables of the chat template; `enable_thinking` is one of them.
        trust_remote_code: no code of a checkpoint is ever run.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tp: int = 1,
        pp: int = 1,
        dtype: str | None = None,
        int8: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self._template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template_args["enable_thinking"] = enable_thinking
        size = int(batch_size or 1) if str(batch_size).isdigit() else 1
        self._max_batch = size if size > 1 else max_batch_size or MAX_BATCH
        self.engine = open_engine(
            str(pretrained),
            tp=int(tp),
            pp=int(pp),
            dtype=None if dtype in (None, "auto") else str(dtype),
            int8=bool(int8),
            device=device,
            max_batch=self._max_batch,
        )
        self.max_length = min(max_length or self.engine.context, self.engine.context)
        self.max_gen_toks = max_gen_toks
        self._add_special = True if add_bos_token is None else add_bos_token
        assert self.engine.tokenizer is not None  # else it has raised: tasks are texts
        opened = open_tokenizer(self.engine.opened.tokenizer or "")
        self._encoder = opened.encoder
        eos = special_id(opened.file, opened.encoder, "eos", OWN_CONFIGS)
        bos = special_id(opened.file, opened.encoder, "bos", OWN_CONFIGS)
        self._eos = eos if eos is not None else opened.eos_id
        candidates = (prefix_token_id, bos, self._eos, opened.bos_id)
        self._prefix = next((t for t in candidates if t is not None), None)

    # --- what lm_eval asks for ---------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self._eos is None else self._eos

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is None:
            raise BevatronError(
                f"{self.engine.opened.folder}: its tokenizer names neither a bos nor an eos token, "
                "with which a text without a context begins; pass --model_args prefix_token_id=ID"
            )
        return self._prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """A text that begins with the bos token gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = self._add_special and not self._begins_with_prefix(string)
        ids: list[int] = self._encoder.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def _begins_with_prefix(self, string: str) -> bool:
        if self._prefix is None:
            return False
        text = self._encoder.decode([self._prefix], skip_special_tokens=False)
        return bool(text) and string.startswith(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each pair: the log-likelihood of the second part after the first, and whether all of
        its tokens were the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring")
        for batch in self._batches(requests):
            # What does not fit loses its beginning
            sequences = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in batch]
            for i, scores in zip(batch, self.engine.loglikelihoods(sequences), strict=True):
                count = len(requests[i][2])
                logprobs, greedy = scores.logprobs[-count:], scores.greedy[-count:]
                found[i] = (sum(logprobs), all(greedy)) if count else (0.0, True)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
            bar.update(len(batch))
        bar.close()
        return found

    def _batches(self, requests: Sequence[Pair]) -> Iterator[list[int]]:
        """Numbers of requests, the longest first: what may be too large fails at once."""
        sizes = [min(len(r[1]) + len(r[2]), self.max_length + 1) for r in requests]
        batch: list[int] = []
        for i in sorted(range(len(requests)), key=lambda i: -sizes[i]):
            if batch and sizes[batch[0]] * (len(batch) + 1) > TOGETHER:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in disjoint windows, each text for itself."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, scored = make_disjoint_window(pair)
                windows.append((None, list(context), list(scored)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, cut at the task's stop strings."""
        answers = []
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        asked = [self._request(number, *r.args) for number, r in enumerate(requests)]
        streams = zip(requests, asked, self._streams([a for a, _ in asked]), strict=True)
        for request, (_, until), tokens in streams:
            text: str = self._encoder.decode(tokens)
            for stop in until:
                text = text.partition(stop)[0] if stop else text
            answers.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
            bar.update(1)
        bar.close()
        return answers

    def _streams(self, asked: Sequence[Request]) -> Iterator[list[int]]:
        """The tokens of each answer, in order, while the engine works on others."""
        running: deque[Stream] = deque()
        for request in asked:
            running.append(self.engine.submit(request))
            if len(running) == 2 * self._max_batch:
                yield running.popleft().result().tokens
        while running:
            yield running.popleft().result().tokens

    def _request(
        self, number: int, context: str, options: Mapping[str, Any]
    ) -> tuple[Request, list[str]]:
        """What the engine is asked, and where its text will be cut."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        until = [u for u in kwargs.pop("until", None) or [] if u]
        limit = int(kwargs.pop("max_gen_toks"))
        sampled = kwargs.pop("do_sample", False)
        sampling = {k: kwargs.pop(k) for k in RECOMMENDED if kwargs.get(k) is not None}
        if not sampled:
            sampling["temperature"] = 0.0
        unknown = [k for k, v in kwargs.items() if (k, v) != ("num_beams", 1) and v is not None]
        if unknown:
            raise BevatronError(
                f"the task asks for generation with {', '.join(unknown)}, which is not supported; "
                f"use {', '.join(RECOMMENDED)}, until, do_sample and max_gen_toks (--gen_kwargs)"
            )
        if limit >= self.max_length:
            raise BevatronError(
                f"the task asks for up to {limit} new tokens, the model's context has "
                f"{self.max_length}; pass --gen_kwargs max_gen_toks=N with a smaller number"
            )
        # Tokens, too, may be stops: a special token is in no text
        stops = {t for u in until if (t := self._encoder.token_to_id(u)) is not None}
        request = Request(
            prompt=tuple(self.tok_encode(context)[limit - self.max_length :]),
            max_new_tokens=limit,
            sampling=Sampling(**{**sampling, "seed": number}),
            stop_tokens=self.engine.stop_tokens | {self.eot_token_id} | stops,
            stop_strings=tuple(until),
        )
        return request, [*until, self._encoder.decode([self.eot_token_id], False)]

    # --- chat --------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.opened.source).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's template, which lm_eval records; other ones have no names
        here."""
        return self._template.sources.get("default", "") if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the checkpoint's own template has it."""
        return self._template.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_args,
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.needed(self.engine.opened, self._encoder)
