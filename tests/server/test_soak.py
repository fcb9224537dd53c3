"""Minutes of clients that come, go, and leave in the middle: memory stays, the cache is freed.

BEVATRON_SOAK_S sets how many seconds.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter

import httpx2 as httpx
import psutil
import pytest

from tests.server.served import Served

CLIENTS = 24
# Bytes that may still be added after the warm-up. oneDNN keeps what it prepared for every shape
# that it has seen; with prompts of one length alone the process does not grow by a page.
GROWTH = 64 << 20


async def client(http: httpx.AsyncClient, until: float, rng: random.Random, seen: Counter) -> None:
    """Requests of all kinds; one in two is left before its end."""
    while time.monotonic() < until:
        body = {"n": rng.randint(1, 4), "stream": rng.random() < 0.7, "ignore_eos": True}
        body |= {"max_tokens": rng.randint(1, 150), "temperature": rng.choice([0, 1])}
        chat = rng.random() < 0.5
        text = "fox " * rng.randint(1, 30)
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        patience = rng.uniform(0.01, 0.5) if rng.random() < 0.5 else 60
        try:
            async with asyncio.timeout(patience), http.stream("POST", path, json=body) as answer:
                async for line in answer.aiter_lines():
                    assert not line.startswith('data: {"error"'), line
                seen[answer.status_code] += 1
        except (TimeoutError, httpx.TransportError):
            seen["left"] += 1


@pytest.mark.slow
def test_a_soak_with_random_disconnects_leaves_nothing_behind(server: Served) -> None:
    process = psutil.Process(server.process.pid)
    seconds = float(os.environ.get("BEVATRON_SOAK_S", "240"))
    seen: Counter = Counter()

    async def load(seconds: float, seed: int) -> None:
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
            rngs = (random.Random(seed * CLIENTS + i) for i in range(CLIENTS))
            await asyncio.gather(*(client(http, until, rng, seen) for rng in rngs))

    sizes = []
    for round_ in range(6):
        asyncio.run(load(seconds / 6, round_))
        assert server.idle(30)
        sizes.append(process.memory_info().rss)
        connections = [c for c in process.net_connections() if c.status == "ESTABLISHED"]
        assert len(connections) <= 2
    print([size >> 20 for size in sizes], seen)
    assert seen[200] and seen["left"]
    assert set(seen) <= {200, 429, "left"}
    assert sizes[-1] - sizes[1] < GROWTH, [size >> 20 for size in sizes]
