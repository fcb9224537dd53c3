"""A training step beside transformers' and litgpt's model of the same dimensions, on a CPU.

    python benchmarks/training.py [--shapes 60m,deep,wide] [--rounds 5] [--threads 1]
                                  [--precision auto] [--litgpt PYTHON]

Every contender is a process of its own that stays warm; they take turns, a step or more each, so
that a slow minute of the machine hits all of them, and a step is counted in CPU-seconds of its
process. Data are random tokens, the loss is next-token cross-entropy, the update AdamW after
clipping to norm 1, in the precision that suits the machine: `auto` takes bf16 (for transformers:
autocast over fp32 weights, its usual way) where products of bf16 are faster than of fp32, and else
fp32 for all. Contenders:

- bevatron: as `bevatron train` runs with train.compile, and without
- transformers: LlamaForCausalLM, sdpa, fused AdamW; plainly, and compiled with our allocator
  settings
- litgpt: GPT, fused AdamW, if litgpt is installed, or in the environment whose python is given

The limit is the time that the matrix products of a step take on their own, at the best rate that
products of these sizes reach in the same run. Peak memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """A Llama and its micro-batch."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    batch: int
    length: int

    @property
    def parameters_of_products(self) -> int:
        width = self.hidden // self.heads
        attention = self.hidden * width * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.hidden * self.vocab

    @property
    def flops(self) -> float:
        """Of the matrix products of a step, with causal attention."""
        tokens = self.batch * self.length
        attention = self.layers * 2 * self.length * self.hidden
        return 3.0 * tokens * (2 * self.parameters_of_products + attention)


SHAPES = {
    "60m": Shape(512, 8, 8, 4, 1408, 32000, 4, 512),
    "deep": Shape(256, 16, 4, 2, 704, 8192, 4, 512),
    "wide": Shape(1024, 4, 16, 4, 2816, 32000, 2, 1024),
}
CONTENDERS = ("bevatron", "bevatron eager", "transformers", "transformers compiled", "litgpt")


# --- contenders: each builds a step ---------------------------------------------------------------


def bevatron(shape: Shape, bf16: bool, compiled: bool) -> Step:
    import torch

    from bevatron.parallel.layout import Layout
    from bevatron.parallel.process_groups import mesh
    from bevatron.spec import MLP, Attention, Init, LayerSpec, ModelSpec, Rope
    from bevatron.train.config import OptimizerConfig, TrainConfig
    from bevatron.train.hardware import tune_allocator
    from bevatron.train.objectives import Pretrain
    from bevatron.train.trainer import Trainer

    tune_allocator()
    attention = Attention(shape.heads, shape.kv_heads, shape.hidden // shape.heads)
    spec = ModelSpec(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        layers=(LayerSpec(attention, MLP(shape.ffn)),) * shape.layers,
        rope=Rope(10000.0),
        init=Init(std=0.02),
    )
    device = torch.device("cpu")
    train = TrainConfig(
        steps=1,
        global_batch=shape.batch,
        micro_batch=shape.batch,
        precision="bf16" if bf16 else "fp32",
        compile=compiled,
    )
    trainer = Trainer(
        spec,
        Layout(),
        mesh(Layout(), device),
        Pretrain(compiled=compiled),
        seq_len=shape.length,
        train=train,
        optimizer=OptimizerConfig(lr=3e-4),
        device=device,
    )
    trainer.fill_random(0)
    samples = {"tokens": tokens(shape)}
    return lambda: trainer.step(samples, 3e-4)[0]  # type: ignore[index]


def tokens(shape: Shape) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab, (shape.batch, shape.length + 1), generator=generator)


def plain_loop(model: Any, loss_of: Callable[[Any], Any], bf16: bool, batch: Any) -> Step:
    """The loop that everyone writes."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def llama_config(shape: Shape, **more: Any) -> Any:
    """transformers' configuration of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        **more,
    )


def transformers(shape: Shape, bf16: bool, compiled: bool) -> Step:
    import torch
    from transformers import LlamaForCausalLM

    config = llama_config(shape, attn_implementation="sdpa", use_cache=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if compiled:
        from bevatron.train.hardware import tune_allocator

        tune_allocator()
        model.compile()
    batch = tokens(shape)

    def loss_of(batch: Any) -> Any:
        ids, next_ids = batch[:, :-1], batch[:, 1:].contiguous()
        return model(input_ids=ids, labels=ids, shift_labels=next_ids).loss

    return plain_loop(model, loss_of, bf16, batch)


def litgpt(shape: Shape, bf16: bool) -> Step:
    import torch
    from litgpt import GPT, Config

    config = Config(
        block_size=shape.length,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_query_groups=shape.kv_heads,
        n_embd=shape.hidden,
        intermediate_size=shape.ffn,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    torch.manual_seed(0)
    model, batch = GPT(config), tokens(shape)

    def loss_of(batch: Any) -> Any:
        logits = model(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return plain_loop(model, loss_of, bf16, batch)


def build(name: str, shape: Shape, bf16: bool) -> Step:
    kind, _, how = name.partition(" ")
    if kind == "bevatron":
        return bevatron(shape, bf16, compiled=how != "eager")
    if kind == "transformers":
        return transformers(shape, bf16, compiled=how == "compiled")
    return litgpt(shape, bf16)


def child(name: str, shape: Shape, bf16: bool, threads: int) -> None:
    """A contender's process."""
    import torch

    torch.set_num_threads(threads)
    with ExitStack() as stack:
        if name.startswith("bevatron"):
            from bevatron.parallel.process_groups import world

            stack.enter_context(world(torch.device("cpu")))
        serve(build(name, shape, bf16))


def serve(step: Step) -> None:
    """Read numbers of steps from stdin, take them, and print what they cost."""
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(count := int(line)):
            loss = step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([loss, cpu / count, wall / count, memory]), flush=True)


# --- the limit ------------------------------------------------------------------------------------


def rates(dtype: str, rounds: int = 5) -> list[float]:
    """FLOP/s of one core in products of a training step's size, forward and both gradients, once
    per round. What the first use of a dtype costs (seconds for bf16, whose kernels are chosen and
    made then) is not among them."""
    import torch

    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    x, w, g = (torch.randn(*s).to(kind) for s in ((1024, 512), (1408, 512), (1024, 1408)))
    seconds = []
    for _ in range(1 + rounds):
        began = time.process_time()
        _ = x @ w.T, g @ w, g.T @ x
        seconds.append(time.process_time() - began)
    return [3 * 2 * 1024 * 512 * 1408 / s for s in seconds[1:]]


def bf16_is_faster() -> bool:
    """On this machine, by the median of several rounds; says both."""
    fp32, bf16 = (statistics.median(rates(dtype)) for dtype in ("float32", "bfloat16"))
    said = f"products of fp32 {fp32 / 1e9:.0f} GFLOP/s a core, of bf16 {bf16 / 1e9:.0f}"
    print(f"{said}: {'bf16' if bf16 > fp32 else 'fp32'} for all", file=sys.stderr)
    return bf16 > fp32


# --- the parent -----------------------------------------------------------------------------------


@contextmanager
def started(name: str, shape: str, options: argparse.Namespace, bf16: bool) -> Iterator[Any]:
    python = options.litgpt if name == "litgpt" else sys.executable
    arguments = ["--child", name, "--shapes", shape, "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(
        [python, str(Path(__file__).resolve()), *arguments, *["--bf16"] * bf16],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()


def take(process: Any, steps: int) -> list[float]:
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a contender ended; see above")
    found: list[float] = json.loads(line)
    return found


def measure(shape_name: str, options: argparse.Namespace, bf16: bool) -> dict[str, Any]:
    shape = SHAPES[shape_name]
    names = [n for n in CONTENDERS if n != "litgpt" or options.litgpt]
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(started(name, shape_name, options, bf16)) for name in names
        }
        for process in running.values():
            take(process, 2)  # compiles, and makes the optimizer's state
        for _ in range(options.rounds):
            for name, process in running.items():
                times[name].append(take(process, options.steps))
    limit = shape.flops / max(rates("bfloat16" if bf16 else "float32"))
    rows = {}
    for name, rounds in times.items():
        cpu = statistics.median(r[1] for r in rounds)
        wall = statistics.median(r[2] for r in rounds)
        per_cpu_s = shape.batch * shape.length / cpu
        rows[name] = {"cpu_s": cpu, "wall_s": wall, "tokens_per_cpu_s": per_cpu_s}
        rows[name] |= {"gib": rounds[-1][3], "of_limit": limit / cpu, "loss": rounds[-1][0]}
    ours = rows["bevatron"]["cpu_s"]
    for row in rows.values():
        row["ours_is_faster_by"] = row["cpu_s"] / ours
    return {"shape": shape_name, **asdict(shape), "bf16": bf16, "limit_s": limit, "rows": rows}


def show(found: dict[str, Any]) -> None:
    precision = "bf16" if found["bf16"] else "fp32"
    print(
        f"\n{found['shape']}: hidden {found['hidden']}, {found['layers']} layers, vocabulary "
        f"{found['vocab']}, {found['batch']} x {found['length']} tokens, {precision}; products "
        f"alone {found['limit_s']:.2f} CPU-s"
    )
    print(f"{'':<22} CPU-s/step  wall-s  tokens/CPU-s  of limit  peak GiB  ours is faster by")
    for name, r in found["rows"].items():
        print(
            f"{name:<22} {r['cpu_s']:>10.3f}  {r['wall_s']:>6.2f}  {r['tokens_per_cpu_s']:>12.0f}  "
            f"{r['of_limit']:>8.0%}  {r['gib']:>8.2f}  {r['ours_is_faster_by']:>8.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--litgpt", help="a python that has litgpt; default: left out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, SHAPES[options.shapes], options.bf16, options.threads)
        return
    bf16 = bf16_is_faster() if options.precision == "auto" else options.precision == "bf16"
    for shape in options.shapes.split(","):
        found = measure(shape, options, bf16)
        print(json.dumps(found)) if options.json else show(found)


if __name__ == "__main__":
    main()
