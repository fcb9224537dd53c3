"""Many requests at once give what each gives alone, which is what transformers gives."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bevatron.errors import BevatronError
from bevatron.generate import scheduler
from bevatron.generate.engine import Engine, generate
from bevatron.generate.request import QueueFull, Request, Sampling
from tests.generate.engine_models import KINDS, VOCAB, greedy, make


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    rng = random.Random(1)
    return [tuple(rng.randrange(VOCAB) for _ in range(n)) for n in lengths]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, make(folder, "llama")


@pytest.fixture
def engine(llama: tuple[Path, Any]) -> Iterator[Engine]:
    with Engine.open(llama[0]) as engine:
        yield engine


@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_batch_gives_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    """From one token to beyond the length that the model was made for (the dynamic rope's: 32)."""
    model = make(tmp_path, kind)
    asked = prompts(1, 2, 5, 9, 17, 30, 31, 40)
    with Engine.open(tmp_path) as engine:
        answers = engine.complete([Request(p, 10 + i) for i, p in enumerate(asked)])
    for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        assert answer.tokens == greedy(model, list(prompt), 10 + i), len(prompt)


def test_prompts_in_chunks_beside_running_answers_change_nothing(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = llama
    monkeypatch.setattr(scheduler, "CHUNK", 7)
    monkeypatch.setattr(scheduler, "BESIDE", 3)
    monkeypatch.setattr(scheduler, "CAPACITY", 4)
    rng = random.Random(2)
    asked = prompts(*(rng.randrange(1, 60) for _ in range(24)))
    counts = [rng.randrange(1, 30) for _ in asked]
    with Engine.open(folder, max_batch=5) as engine:
        streams = [engine.submit(Request(p, n)) for p, n in zip(asked, counts, strict=True)]
        for i in (3, 11, 12):
            streams[i].cancel()
        answers = [stream.result() for stream in streams]
        assert engine.stats().cached_tokens == engine.stats().running == 0
    for i, (prompt, count, answer) in enumerate(zip(asked, counts, answers, strict=True)):
        expected = greedy(model, list(prompt), count)
        if answer.finish_reason == "cancelled":
            assert i in (3, 11, 12)
            assert answer.tokens == expected[: len(answer.tokens)]
        else:
            assert answer.tokens == expected


@pytest.mark.parametrize("kind", ["llama", "dynamic", "llama-nemotron"])
def test_a_prompt_that_several_requests_share_is_computed_once(kind: str, tmp_path: Path) -> None:
    """Whoever comes first computes it, also while others answer and where the cache is too small
    for all; what is said is what each would say alone."""
    make(tmp_path, kind)
    shared, other = prompts(21, 9)
    asked = [
        Request(prompt, 3 + 2 * i, sampling=Sampling(temperature=0.8, seed=i), logprobs=0)
        for i, prompt in enumerate([other, shared, shared, other, shared, shared, (5,), shared])
    ]
    with Engine.open(tmp_path, max_batch=1) as engine:
        alone = [engine.complete([request])[0] for request in asked]
        assert engine.stats().prompt_tokens == sum(len(request.prompt) for request in asked)
    for batch, most in ((8, None), (3, None), (8, 150)):
        with Engine.open(tmp_path, max_batch=batch, max_tokens=most) as engine:
            together = engine.complete(asked)
            computed = engine.stats().prompt_tokens
        for one, all_ in zip(alone, together, strict=True):
            assert one.tokens == all_.tokens
            pairs = zip(one.logprobs or (), all_.logprobs or (), strict=True)
            assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in pairs)
        if batch == 8 and most is None:
            assert computed == len(shared) + len(other) + 1


def test_a_seed_repeats_whatever_runs_beside_it(engine: Engine) -> None:
    prompt = prompts(6)[0]
    kinds = [
        Sampling(1.0, seed=5),
        Sampling(0.8, top_k=20, seed=5),
        Sampling(1.2, top_p=0.7, seed=6),
        Sampling(1.0, min_p=0.1, seed=7),
        Sampling(0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=8),
        Sampling(1.0, frequency_penalty=0.5, presence_penalty=0.4, seed=9),
        Sampling(0.0, repetition_penalty=1.5, logit_bias={3: 5.0}),
    ]
    requests = [Request(prompt, 25, sampling) for sampling in kinds]
    alone = [engine.complete([request])[0].tokens for request in requests]
    others = [Request(p, 9, Sampling(2.0, seed=None)) for p in prompts(3, 30, 8, 1)]
    together = engine.complete([*others, *requests, *others])[4 : 4 + len(kinds)]
    assert [answer.tokens for answer in together] == alone
    assert len({tuple(tokens) for tokens in alone}) == len(kinds)
    unseeded = Request(prompt, 25, Sampling(1.0, seed=None))
    a, b = engine.complete([unseeded, unseeded])
    assert a.tokens != b.tokens


def test_logprobs_are_those_of_the_model(llama: tuple[Path, Any], engine: Engine) -> None:
    prompt = prompts(12)[0]
    request = Request(prompt, 6, Sampling(0.7, seed=1), logprobs=3, prompt_logprobs=2)
    answer = engine.complete([Request((5,), 20), request])[1]
    ids = [*prompt, *answer.tokens]
    with torch.no_grad():
        expected = llama[1](torch.tensor([ids])).logits[0].log_softmax(-1)
    assert answer.logprobs is not None
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None
    found = [*answer.prompt_logprobs[1:], *answer.logprobs]
    for i, one in enumerate(found):
        assert one is not None
        assert one.token == ids[i + 1]
        best = expected[i].topk(2 if i < len(prompt) - 1 else 3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        values = [one.logprob, *(value for _, value in one.top)]
        wanted = [float(expected[i, ids[i + 1]]), *best.values.tolist()]
        assert values == pytest.approx(wanted, abs=1e-4)


def test_a_request_may_ask_for_logprobs_at_its_temperature(
    llama: tuple[Path, Any], engine: Engine
) -> None:
    """As a policy gradient needs them; beside others, and before top-k."""
    prompt = prompts(12)[0]
    asked = [
        Request(prompt, 6, Sampling(0.7, top_k=5, seed=1), logprobs=2, tempered=True),
        Request(prompt, 6, Sampling(0.7, top_k=5, seed=1), logprobs=1),
        Request(prompt, 6, logprobs=0, tempered=True),  # greedy: there is nothing to divide by
    ]
    for request, answer, divisor in zip(asked, engine.complete(asked), (0.7, 1, 1), strict=True):
        ids = [*prompt, *answer.tokens]
        with torch.no_grad():
            logits = llama[1](torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / divisor).log_softmax(-1)
        assert answer.logprobs is not None
        for row, token, found in zip(expected, answer.tokens, answer.logprobs, strict=True):
            assert found.token == token and len(found.top) == request.logprobs
            values = [found.logprob, *(value for _, value in found.top)]
            wanted = [float(row[token]), *row.topk(request.logprobs or 0).values.tolist()]
            assert values == pytest.approx(wanted, abs=1e-4)


def test_loglikelihoods_are_those_of_the_model(
    llama: tuple[Path, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "CHUNK", 11)
    sequences = prompts(1, 2, 40, 7, 100)
    beside = engine.submit(Request((1, 2), 60))
    for ids, found in zip(sequences, engine.loglikelihoods(sequences), strict=True):
        with torch.no_grad():
            logits = llama[1](torch.tensor([ids])).logits[0, :-1]
        following = torch.tensor(ids[1:], dtype=torch.long)
        expected = logits.log_softmax(-1).gather(1, following[:, None])[:, 0]
        assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert found.greedy == (logits.argmax(-1) == following).tolist()
    assert len(beside.result().tokens) == 60


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(engine: Engine) -> None:
    prompt = prompts(4)[0]
    free = engine.complete([Request(prompt, 12)])[0]
    stop = free.tokens[5]
    at = free.tokens.index(stop)
    ended = engine.complete([Request(prompt, 12, stop_tokens=frozenset([stop, 10**6]))])[0]
    assert ended.tokens == free.tokens[: at + 1]
    assert ended.finish_reason == "stop"
    assert free.text.startswith(ended.text)
    assert ended.text == engine.complete([Request(prompt, at)])[0].text


def test_cancelling_ends_a_stream_and_frees_its_cache(engine: Engine) -> None:
    stream = engine.submit(Request((1, 2, 3), 10_000))
    next(stream)
    waiting = engine.stats()
    assert (waiting.running, waiting.cached_tokens > 0) == (1, True)
    stream.cancel()
    last = list(stream)[-1]
    assert last.finish_reason == "cancelled"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cached_tokens, stats.finished) == (0, 0, 0, 1)
    stream.cancel()  # once more is nothing
    assert len(engine.complete([Request((1,), 3)])[0].tokens) == 3


def test_a_full_queue_refuses(llama: tuple[Path, Any]) -> None:
    with Engine.open(llama[0], max_batch=1, queue=2) as engine:
        running = engine.submit(Request((1,), 10_000))
        next(running)
        waiting = [engine.submit(Request((1,), 2)) for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.submit(Request((1,), 2))
        waiting.pop().cancel()
        assert engine.stats().waiting in (1, 2)
        running.cancel()
        assert [len(stream.result().tokens) for stream in waiting] == [2]


def test_closing_ends_streams_as_cancelled(llama: tuple[Path, Any]) -> None:
    before = set(threading.enumerate())
    engine = Engine.open(llama[0], max_batch=1)
    streams = [engine.submit(Request((1,), 10_000)) for _ in range(2)]
    next(streams[0])
    assert [t.name for t in set(threading.enumerate()) - before] == ["bevatron-engine"]
    engine.close()
    assert [stream.result().finish_reason for stream in streams] == ["cancelled"] * 2
    with pytest.raises(BevatronError, match="closed"):
        engine.submit(Request((1,), 1))
    assert not set(threading.enumerate()) - before


def test_what_can_never_run_is_refused(llama: tuple[Path, Any]) -> None:
    with Engine.open(llama[0], max_tokens=64) as engine:
        for request, words in (
            (Request((1, VOCAB), 1), f"token {VOCAB}"),
            (Request((1, -1), 1), "token -1"),
            (Request((1,), 65), "64 positions"),
            (Request((1,), 1, Sampling(logit_bias={VOCAB: 1.0})), "logit_bias"),
        ):
            with pytest.raises(BevatronError, match=words):
                engine.submit(request)
        assert len(engine.complete([Request((1,) * 32, 33)])[0].tokens) == 33
    for wrong in ({"prompt": ()}, {"max_new_tokens": 0}, {"stop_strings": ("",)}):
        with pytest.raises(BevatronError):
            Request(**{"prompt": (1,), **wrong})  # type: ignore[arg-type]
    nan = float("nan")
    for bad in ({"temperature": nan}, {"top_p": 0.0}, {"min_p": 1.5}, {"repetition_penalty": 0}):
        with pytest.raises(BevatronError):
            Sampling(**bad)


def test_a_small_cache_is_shared_one_after_the_other(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    asked = prompts(20, 3, 30, 8, 1, 25)
    with Engine.open(folder, max_tokens=70) as engine:
        answers = engine.complete([Request(p, 20) for p in asked])
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.tokens == greedy(model, list(prompt), 20)


def test_a_stream_is_for_threads_and_for_asyncio(engine: Engine) -> None:
    request = Request(prompts(5)[0], 15)
    expected = engine.complete([request])[0]

    async def one() -> str:
        return "".join([piece.text async for piece in engine.submit(request)])

    async def several() -> list[str]:
        return await asyncio.gather(*(one() for _ in range(3)))

    assert asyncio.run(several()) == [expected.text] * 3
    pieces = list(engine.submit(request))
    assert [token for piece in pieces for token in piece.tokens] == expected.tokens
    assert [piece.finish_reason for piece in pieces] == [None] * 14 + ["length"]


def test_an_engine_that_fails_says_so_to_everyone(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(llama[0]) as engine:
        stream = engine.submit(Request((1,), 10_000))
        next(stream)

        def fail(step: object) -> None:
            raise BevatronError("the disk is on fire")

        monkeypatch.setattr(engine.group, "run", fail)
        for _ in range(2):
            with pytest.raises(BevatronError, match="on fire"):
                list(stream)
        with pytest.raises(BevatronError, match="on fire"):
            engine.submit(Request((1,), 1))


def test_generate_completes_a_prompt(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    answer = generate(folder, "the fox", max_new_tokens=8)
    with Engine.open(folder) as engine:
        ids = engine.tokenizer.encode("the fox").ids
        assert answer.tokens == greedy(model, ids, 8)
        assert answer.text == engine.tokenizer.decode(answer.tokens)


def test_int8_rounds_the_weights_and_nothing_else(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                scale = (parameter.abs().amax(1, keepdim=True) / 127).bfloat16().float()
                parameter.copy_((parameter / scale).round() * scale)
    ids = prompts(40)[0]
    with Engine.open(folder, int8=True) as engine:
        found = engine.loglikelihoods([ids, ids[:5]])
        together = engine.complete([Request(p, 5) for p in prompts(1, 3, 9)])
        alone = [engine.complete([Request(p, 5)])[0] for p in prompts(1, 3, 9)]
    with torch.no_grad():
        logits = rounded(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    # What is left is the rounding of activations to bf16.
    assert (torch.tensor(found[0].logprobs) - expected).abs().max() < 0.1
    assert (torch.tensor(found[1].logprobs) - expected[:4]).abs().max() < 0.1
    assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_bf16_weights_are_computed_with_at_least_as_exactly_as_by_transformers(
    tmp_path: Path,
) -> None:
    model = make(tmp_path / "fp32", "llama").bfloat16()
    model.save_pretrained(tmp_path / "bf16")
    ids = prompts(50)[0]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        exact = model.float()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    following = torch.tensor(ids[1:])[:, None]
    with Engine.open(tmp_path / "bf16") as engine:
        ours = torch.tensor(engine.loglikelihoods([ids])[0].logprobs)
    wrong = (theirs - exact).gather(1, following)[:, 0].abs().mean()
    assert (ours - exact.gather(1, following)[:, 0]).abs().mean() <= 1.2 * wrong
