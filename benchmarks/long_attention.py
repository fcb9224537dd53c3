"""One attention layer over a long sequence on context-parallel CPU ranks: time and memory.

    python benchmarks/long_attention.py --length 32768 --cp 2

Forward and backward of `Attention` (RoPE, grouped queries, the gather of keys and values, tiles) in
fp32, one thread per rank. Per rank: CPU seconds, the growth of the resident peak, and what the
formula of docs/long-sequences.md gives for it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bevatron.nn.attention import Attention
from bevatron.nn.attention_kernels import make_mask
from bevatron.nn.rank_communication import Comm
from bevatron.nn.rope import rotation
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.spec import Attention as AttentionSpec
from bevatron.spec import LayerSpec, ModelSpec, Rope


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def formula_mib(args: argparse.Namespace) -> float:
    """fp32 tensors that live at once in the middle of the backward, see docs/long-sequences.md."""
    width, kv = args.heads * args.head_dim, args.groups * args.head_dim
    own = 2 * args.hidden + 6 * width + 2 * kv  # per token of this rank
    gathered = 4 * kv  # per token of the sequence
    return 4 * args.length * (own / args.cp + gathered) / 2**20


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.cp)
    comm = Comm()
    if args.cp > 1:
        comm.context = ContextParallel(init_device_mesh("cpu", (args.cp,), mesh_dim_names=("cp",)))
    spec = AttentionSpec(args.heads, args.groups, args.head_dim)
    layer = Attention(spec, ModelSpec(1, args.hidden, (LayerSpec(spec),)), comm)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def once(length: int) -> None:
        mine = length // args.cp
        x = torch.randn(1, mine, args.hidden, requires_grad=True)
        positions = torch.cat([torch.arange(*run) for run in comm.context.runs(mine)])[None]
        documents: Tensor | None = None
        if args.document:
            documents = comm.context.starts(positions - positions % args.document)
        rotations = {args.head_dim: rotation(Rope(), args.head_dim, positions, x.dtype)}
        y = layer(x, rotations, make_mask(comm.context, x, mine, documents))
        y.backward(torch.ones_like(y))

    once(2048)  # code, threads, and buffers of the collectives
    dist.barrier()
    before, began = peak_mib(), time.process_time()
    wall = time.perf_counter()
    once(args.length)
    spent, took = time.process_time() - began, time.perf_counter() - wall
    print(
        f"rank {rank}: {args.length} tokens over cp {args.cp}: {spent:.1f} CPU-s, {took:.1f} s, "
        f"{peak_mib() - before:.0f} MiB more (formula {formula_mib(args):.0f})",
        flush=True,
    )
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--cp", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--document", type=int, default=0, help="tokens of each document; 0: one")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (arguments, str(Path(folder) / "store")), nprocs=arguments.cp)
    sys.exit(0)
