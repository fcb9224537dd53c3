"""`bevatron serve` under concurrent streams: tokens per second, time to the first token, and
between tokens, as a client sees them.

    python benchmarks/serving.py [--streams 1,8,32] [--tokens 128] [--prompt 32] [--shape 60m]
                                 [--threads N] [--int8] [--json]

A Llama of the shapes of benchmarks/training.py with random weights, in bf16 or fp32, is served by a
process of its own. Each client streams one completion at a time, of ids that no other request has,
with ignore_eos; a client asks twice. What is measured begins when all clients have been started and
ends with the last answer. "Of one stream" compares tokens per CPU-second of the server, which other
programs on the machine change little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from training import SHAPES, Shape, llama_config

CONTEXT = 2048


def make_model(shape: Shape, folder: Path, bf16: bool) -> None:
    """A Hugging Face folder of this shape, with a tokenizer for the ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = llama_config(shape, max_position_embeddings=CONTEXT)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"t{i}" for i in range(shape.vocab - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


async def client(http: Any, prompt: list[int], tokens: int, times: list[list[float]]) -> None:
    """One stream; the moments at which it was asked for and its tokens came."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    body |= {"temperature": 0, "logprobs": 0}  # so that every token is an event
    seen = [time.perf_counter()]
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                seen.append(time.perf_counter())
    assert len(seen) == tokens + 1, f"{len(seen) - 1} tokens came, expected {tokens}"
    times.append(seen)


def cpu_s(pid: int) -> float:
    """That a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(
    url: str, pid: int, streams: int, options: argparse.Namespace, vocab: int
) -> dict[str, Any]:
    import httpx2

    rng = random.Random(streams)
    times: list[list[float]] = []
    limits = httpx2.Limits(max_connections=streams)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def ask() -> None:
            for _ in range(2):
                prompt = [rng.randrange(vocab) for _ in range(options.prompt)]
                await client(http, prompt, options.tokens, times)

        began, cpu = time.perf_counter(), cpu_s(pid)
        await asyncio.gather(*(ask() for _ in range(streams)))
        took, cpu = time.perf_counter() - began, cpu_s(pid) - cpu
    first = [seen[1] - seen[0] for seen in times]
    between = [b - a for seen in times for a, b in pairwise(seen[1:])]
    tokens = len(times) * options.tokens
    row: dict[str, Any] = {"streams": streams, "tokens_per_s": tokens / took}
    row["tokens_per_cpu_s"] = tokens / cpu
    for name, values in (("first", first), ("between", between)):
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        row |= {f"{name}_p50_ms": 1000 * cuts[49], f"{name}_p99_ms": 1000 * cuts[98]}
    return row


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    shape = SHAPES[options.shape]
    counts = [int(n) for n in options.streams.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder), options.bf16)
        command = [sys.executable, "-m", "bevatron", "serve", folder, "--port", "0"]
        command += ["--max-batch", str(max(counts)), "--name", "model", *["--int8"] * options.int8]
        env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        try:
            assert process.stderr is not None
            url = ""
            while not (found := re.search(r"at (http://\S+)", url)):
                url = process.stderr.readline()
                if not url:
                    raise SystemExit("the server ended")
            asyncio.run(load(found[1], process.pid, 2, options, shape.vocab))  # warm
            rows: dict[int, list[dict[str, Any]]] = {n: [] for n in counts}
            for _ in range(options.rounds):
                for n in counts:
                    rows[n].append(
                        asyncio.run(load(found[1], process.pid, n, options, shape.vocab))
                    )
        finally:
            process.terminate()
            process.wait()
    return [
        {key: statistics.median(row[key] for row in rows[n]) for key in rows[n][0]} for n in counts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="60m")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="default: fp32")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps(rows))
        return
    kind = "int8" if options.int8 else "bf16" if options.bf16 else "fp32"
    print(f"{options.shape}, {kind}: prompts of {options.prompt}, {options.tokens} new tokens")
    print(
        "streams  tokens/s  tokens/CPU-s  of one stream  "
        "first token ms (p50, p99)  next token ms (p50, p99)"
    )
    for row in rows:
        print(
            f"{row['streams']:>7.0f}  {row['tokens_per_s']:>8.1f}  "
            f"{row['tokens_per_cpu_s']:>12.1f}  "
            f"{row['tokens_per_cpu_s'] / rows[0]['tokens_per_cpu_s']:>12.2f}x  "
            f"{row['first_p50_ms']:>13.0f} {row['first_p99_ms']:>11.0f}  "
            f"{row['between_p50_ms']:>13.1f} {row['between_p99_ms']:>10.1f}"
        )


if __name__ == "__main__":
    main()
