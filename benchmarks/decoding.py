"""Decoding beside transformers' generate, on a CPU, and the limit that reading the weights sets.

    python benchmarks/decoding.py [--shapes 60m,1b] [--dtypes fp32,bf16] [--batches 1,8]
                                  [--rounds 3] [--threads 1] [--new 32] [--int8]
                                  [--prompt 128] [--long 1000]
                                  [--llama-cpp PATH/TO/llama-batched-bench]

Every contender is a process of its own that stays warm; they take turns, so that a slow minute of
the machine hits all of them, and work is counted in CPU-seconds of its process. A turn generates
from prompts of --prompt random tokens, once --new tokens and once a single one; the difference is
decoding. The time to first token is of a prompt of --long tokens (0: none). Weights are random.
llama.cpp, if its program is there (and the package gguf), is started for every measurement.

The limit is the rate at which the best matrix-vector product of the dtype streams weights of these
shapes, alone, in the same run: stock torch's products, and those that the engine uses. Its bytes
are those of the stored dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from measured import measured

SHAPES: dict[str, dict[str, Any]] = {
    "60m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": 32000,
    },
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
CONTENDERS = ("bevatron", "transformers")

# What a contender gives: ask(batch, prompt length, new tokens) generates as much.
Ask = Callable[[int, int, int], None]


def prompts(batch: int, length: int, vocab: int) -> list[list[int]]:
    import random

    rng = random.Random(batch)
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(batch)]


def bevatron(folder: Path, vocab: int, int8: bool) -> Ask:
    from bevatron.generate.engine import Engine
    from bevatron.generate.request import Request

    engine = Engine.open(folder, int8=int8)

    def ask(batch: int, length: int, new: int) -> None:
        made = [Request(tuple(p), new) for p in prompts(batch, length, vocab)]
        assert all(len(a.tokens) == new for a in engine.complete(made))

    return ask


def transformers(folder: Path, vocab: int, int8: bool) -> Ask:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def ask(batch: int, length: int, new: int) -> None:
        ids = torch.tensor(prompts(batch, length, vocab))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.shape[1] == length + new

    return ask


def limit(shape: dict[str, Any], dtype: str, int8: bool) -> dict[str, float]:
    """Stored bytes per CPU-second, of one vector through matrices of a layer and the head."""
    import torch
    import torch.nn.functional as F

    from bevatron.generate.matrix_product import matrix

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    h, f, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    width = h // heads
    rows = (heads + 2 * shape["num_key_value_heads"]) * width
    sizes = [(rows, h), (h, h), (2 * f, h), (h, f)]
    layer = sum(a * b for a, b in sizes)
    copies = max(1, min(shape["num_hidden_layers"], int(4e8 / layer / kind.itemsize)))
    sizes = sizes * copies + [(shape["vocab_size"] // 4, h)]
    numel = sum(a * b for a, b in sizes)
    weights = [torch.randn(a, b).to(kind) for a, b in sizes]
    ways: dict[str, list[Callable[[], object]]] = {"linear": [], "mv": [], "engine": []}
    for w in weights:
        x = torch.randn(w.shape[1])
        ways["linear"].append(partial(F.linear, x.to(kind)[None], w))
        ways["mv"].append(partial(torch.mv, w, x.to(kind)))
        m = matrix(w, batches=False, int8=int8)
        ways["engine"].append(partial(m, x.to(kind)[None]))
    out = {}
    with torch.inference_mode():
        for name, products in ways.items():
            best = float("inf")
            for _ in range(6):
                began = time.process_time()
                for product in products:
                    product()
                best = min(best, time.process_time() - began)
            out[name] = numel * kind.itemsize / best
    return out


def streamed(shape: dict[str, Any]) -> int:
    """Weights that are read for a token."""
    h, f, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    rows = (heads + 2 * shape["num_key_value_heads"]) * (h // heads)
    layers: int = shape["num_hidden_layers"] * (rows * h + h * h + 3 * h * f)
    return layers + shape["vocab_size"] * h


def child(name: str, folder: str, shape: str, threads: int, int8: bool) -> None:
    """Answers lines [batch, length, new] with CPU-seconds, wall seconds and peak GiB."""
    import torch

    torch.set_num_threads(threads)
    ask = {"bevatron": bevatron, "transformers": transformers}[name](
        Path(folder), SHAPES[shape]["vocab_size"], int8
    )
    print("ready", flush=True)
    for line in sys.stdin:
        batch, length, new = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        ask(batch, length, new)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([cpu, wall, peak]), flush=True)


class LlamaCpp:
    """llama-batched-bench with the same weights; its start is the same in all measurements."""

    def __init__(self, program: str, folder: str, shape: str, threads: int) -> None:
        self.program, self.threads = program, threads
        self.file = Path(folder) / "model.gguf"
        write_gguf(Path(folder), SHAPES[shape], self.file)

    def ask(self, batch: int, length: int, new: int) -> tuple[float, float, float]:
        counts = ["-npp", str(length), "-ntg", str(new), "-npl", str(batch)]
        positions = max(64, batch * (length + new))  # it warms up with 16 tokens
        context = ["-c", str(positions), "-t", str(self.threads)]
        cost = measured([self.program, "-m", str(self.file), *counts, *context])
        return cost.cpu_s, cost.wall_s, cost.peak_mb / 1.024**3 / 1e3

    def close(self) -> None:
        self.file.unlink()


def write_gguf(folder: Path, shape: dict[str, Any], target: Path) -> None:
    """The folder's weights for llama.cpp, without a tokenizer. (Rows of queries and keys stay in
    the order of Hugging Face, which llama.cpp would rotate otherwise: the work is the same.)"""
    import gguf
    import torch
    from safetensors.torch import load_file

    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    names |= {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    for source, tensor in load_file(folder / "model.safetensors").items():
        stem = source.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{names[rest]}"
        else:
            stem = top[stem]
        name = f"{stem}.weight"
        if tensor.ndim > 1 and tensor.dtype == torch.bfloat16:
            bits = tensor.view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Contender:
    def __init__(self, name: str, folder: str, shape: str, threads: int, int8: bool) -> None:
        command = [sys.executable, __file__, "--child", name, folder, shape, str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*command, str(int(int8))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self.process.args}: ended")
        return line

    def ask(self, batch: int, length: int, new: int) -> tuple[float, float, float]:
        assert self.process.stdin is not None
        print(json.dumps([batch, length, new]), file=self.process.stdin, flush=True)
        cpu, wall, peak = json.loads(self._read())
        return cpu, wall, peak

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def make(folder: Path, shape: str, dtype: str) -> None:
    import torch
    import transformers as hf

    config = hf.LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    torch.manual_seed(0)
    torch.set_default_dtype(kind)
    model = hf.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="20GB")


def compare(shape: str, dtype: str, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        make(Path(folder), shape, dtype)
        rates = limit(SHAPES[shape], dtype, args.int8)
        itemsize = {"fp32": 4, "bf16": 2}[dtype]
        names = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in rates.items())
        floor = streamed(SHAPES[shape]) * itemsize / max(rates.values())
        print(f"\n{shape} {dtype}: GB/s of one vector: {names}; limit {floor * 1e3:.1f} ms/token")
        contenders: dict[str, Contender | LlamaCpp] = {
            name: Contender(name, folder, shape, args.threads, args.int8) for name in CONTENDERS
        }
        if args.llama_cpp:
            contenders["llama.cpp"] = LlamaCpp(args.llama_cpp, folder, shape, args.threads)
        found: dict[tuple[str, str], list[float]] = {}
        peaks: dict[str, float] = {}
        for _ in range(args.rounds):
            for batch in args.batches:
                for name, contender in contenders.items():
                    first = contender.ask(batch, args.prompt, 1)[0]
                    whole, _, peaks[name] = contender.ask(batch, args.prompt, 1 + args.new)
                    per_step = (whole - first) / args.new
                    found.setdefault((name, f"batch {batch}"), []).append(per_step)
            for name, contender in contenders.items() if args.long else ():
                took = contender.ask(1, args.long, 1)[0]
                found.setdefault((name, "first token"), []).append(took)
        for contender in contenders.values():
            contender.close()
    for what in dict.fromkeys(what for _, what in found):
        times = {name: statistics.median(found[name, what]) for name in contenders}
        ours = times["bevatron"]
        line = f"  {what:12}"
        for name, took in times.items():
            line += f" {name} {took * 1e3:8.1f} ms"
            line += f" ({took / ours:.2f}x) " if name != "bevatron" else " "
        if what == "batch 1":
            line += f" {floor / ours:4.0%} of the limit"
        print(line, flush=True)
    print("  peak GiB: " + ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items()))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        _, _, name, folder, shape, threads, int8 = sys.argv
        child(name, folder, shape, int(threads), bool(int(int8)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="60m,1b", type=lambda s: s.split(","))
    parser.add_argument("--dtypes", default="fp32,bf16", type=lambda s: s.split(","))
    parser.add_argument("--batches", default="1,8", type=lambda s: [int(n) for n in s.split(",")])
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--new", default=32, type=int)
    parser.add_argument("--prompt", default=128, type=int)
    parser.add_argument("--long", default=1000, type=int)
    parser.add_argument("--int8", action="store_true", help="of bevatron; transformers has none")
    parser.add_argument("--llama-cpp", help="its program llama-batched-bench")
    parser.add_argument("--dir", default=None, help="where the models are written for the time")
    args = parser.parse_args()
    for shape in args.shapes:
        for dtype in args.dtypes:
            compare(shape, dtype, args)


if __name__ == "__main__":
    main()
