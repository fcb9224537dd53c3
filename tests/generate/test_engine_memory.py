"""Memory: what the cache may take, what one request takes of it, and what happens without any."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from bevatron.generate import scheduler
from bevatron.generate.engine import Engine
from bevatron.generate.request import NoRoom, Request, Sampling
from bevatron.train.hardware import free_bytes
from tests.generate.engine_models import greedy, make
from tests.generate.test_engine import prompts

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.mark.parametrize("kind", ["llama", "dynamic"])
def test_requests_that_outgrow_the_cache_together_are_answered_one_after_the_other(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may fill the cache alone, all begin at once, and what is put off goes on as it was: with
    its seed, its penalties, its text and its log-probabilities."""
    model = make(tmp_path, kind)
    monkeypatch.setattr(scheduler, "RESERVE", 4)
    monkeypatch.setattr(scheduler, "CHUNK", 7)
    asked = prompts(3, 9, 1, 20, 5)
    drawn = Sampling(1.0, seed=3, repetition_penalty=1.2)
    requests = [Request(p, 60) for p in asked]
    requests += [Request(asked[1], 50, drawn, logprobs=1, prompt_logprobs=0)]
    with Engine.open(tmp_path, max_tokens=1000) as engine:
        alone = [engine.complete([request])[0] for request in requests]
    put_off = []
    real = scheduler.Scheduler._put_off
    monkeypatch.setattr(
        scheduler.Scheduler, "_put_off", lambda self, s: (put_off.append(s.arrival), real(self, s))
    )
    with Engine.open(tmp_path, max_tokens=150) as engine:
        together = engine.complete(requests)
        scores = [engine.submit(request) for request in requests]
        likely = engine.loglikelihoods([asked[3], asked[1]])
        again = [stream.result() for stream in scores]
        assert engine.stats().cached_tokens == engine.stats().running == 0
    assert len(put_off) > 3 and 1 not in put_off, "the first one is never put off"
    for prompt, answer in zip(asked, together, strict=False):
        assert answer.tokens == greedy(model, list(prompt), 60)
    for answers in (together, again):
        assert [a.tokens for a in answers] == [a.tokens for a in alone]
        assert [a.text for a in answers] == [a.text for a in alone]
    for found, expected in zip(together[-1].logprobs or (), alone[-1].logprobs or (), strict=True):
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
    known = [p.logprob for p in (alone[-1].prompt_logprobs or ())[1:] if p is not None]
    assert likely[1].logprobs == pytest.approx(known, abs=1e-4)


def test_an_answer_without_a_limit_does_not_keep_the_whole_cache(tmp_path: Path) -> None:
    make(tmp_path, "llama", max_position_embeddings=100_000)
    with Engine.open(tmp_path, max_tokens=100_000) as engine:
        endless = [engine.submit(Request((1,), 99_000)) for _ in range(3)]
        for stream in endless:
            next(stream)  # each begins while the others run
        assert engine.stats().running == 3
        for stream in endless:
            stream.cancel()


def wide(folder: Path) -> Path:
    """A small model with a large cache: 256 KiB per layer and position."""
    shape = {
        "hidden_size": 128,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "head_dim": 256,
    }
    make(folder, "llama", max_position_embeddings=1 << 20, **shape)
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")
@pytest.mark.parametrize("tp", [1, 2])
def test_a_request_that_memory_does_not_suffice_for_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int
) -> None:
    """The others go on and give what they give alone, and so do later ones."""
    folder = wide(tmp_path)
    # The large one's 5,010 positions at once: 2.5 GiB per layer, where all have 3 GiB.
    monkeypatch.setattr(scheduler, "CHUNK", 1 << 13)
    with Engine.open(folder, max_tokens=1 << 20, max_batch=3, tp=tp) as engine:
        expected = engine.complete([Request((5, 6), 30)])[0]
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        running = [engine.submit(Request((5, 6), 30)) for _ in range(2)]
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * GIB, hard))
        try:
            large = engine.submit(Request((1,) * 5000, 10))
            with pytest.raises(NoRoom, match="not enough memory for this request, which has 5,000"):
                large.result()
            later = engine.complete([Request((5, 6), 30)])[0]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert [stream.result().tokens for stream in running] == [expected.tokens] * 2
        assert later.tokens == expected.tokens
        assert engine.failure is None and engine.stats().running == 0
        cache = engine.group.model.cache
        assert {kv.shape[3] for kv in cache.layers.values()} == {cache.capacity}, "given back"
        assert engine.complete([Request((1,) * 600, 2)])[0].finish_reason == "length"


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_is_within_the_limits_of_control_groups(tmp_path: Path) -> None:
    machine = {"proc__meminfo": "MemTotal: 99 kB\nMemAvailable:   8388608 kB\n"}
    assert free_bytes(CPU, write(tmp_path / "machine", **machine)) == 8 * GIB
    assert free_bytes(CPU, tmp_path / "nothing") == 8 * GIB, "unknown"
    inner = "sys__fs__cgroup__user.slice__job"
    second = {
        **machine,
        "proc__self__cgroup": "0::/user.slice/job\n",
        f"{inner}__memory.max": "max\n",
        f"{inner}__memory.current": f"{GIB}\n",
        "sys__fs__cgroup__user.slice__memory.max": f"{4 * GIB}\n",
        "sys__fs__cgroup__user.slice__memory.current": f"{3 * GIB}\n",
        "sys__fs__cgroup__user.slice__memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
    }
    assert free_bytes(CPU, write(tmp_path / "second", **second)) == 3 * GIB // 2
    container = {
        **machine,
        "proc__self__cgroup": "0::/a/place/of/the/host\n",
        "sys__fs__cgroup__memory.max": f"{2 * GIB}",
        "sys__fs__cgroup__memory.current": "0",
    }
    assert free_bytes(CPU, write(tmp_path / "container", **container)) == 2 * GIB
    first = {
        **machine,
        "proc__self__cgroup": "5:cpu,memory:/job\n1:name=systemd:/\n",
        "sys__fs__cgroup__memory__job__memory.limit_in_bytes": f"{GIB}",
        "sys__fs__cgroup__memory__job__memory.usage_in_bytes": f"{2 * GIB}",
    }
    assert free_bytes(CPU, write(tmp_path / "first", **first)) == 0
    assert 0 < free_bytes(CPU) < 1 << 50


def test_the_cache_fits_the_memory_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bevatron.generate import engine
    from bevatron.generate.server.served_model import Serving
    from bevatron.generate.server.server_settings import Settings

    folder = wide(tmp_path)
    for free, share in ((GIB, 0.7), (1 << 60, 0.25), (0, 0)):
        monkeypatch.setattr(engine, "free_bytes", lambda device, free=free: free)
        with Engine.open(folder) as opened:
            position = opened.group.model.cache.bytes_per_position
            expected = max(256, int(share * free / position))
            assert opened.max_tokens == expected
            assert Serving(opened, Settings("m")).context == min(expected, 1 << 20)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    monkeypatch.setattr(engine, "free_bytes", lambda device: GIB)
    with Engine.open(folder) as opened:
        assert opened.max_tokens == 512, "a context, and no quarter of the memory is less"
