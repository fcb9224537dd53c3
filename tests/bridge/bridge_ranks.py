"""What the tests of AutoBridge run on every rank; in a module, so that ranks find it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bevatron import AutoBridge
from bevatron.errors import BevatronError

IDS = (torch.arange(2 * 16) * 7 % 89).view(2, 16)


def build(hf: Path, fields: dict[str, Any]) -> tuple[AutoBridge, list[Any]]:
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return bridge, provider.provide_distributed_model(wrap_with_ddp=False)


def round_trip(hf: Path, out: Path, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Logits on every rank, every exported tensor on every rank, and a saved folder at `out`."""
    bridge, model = build(hf, fields)
    with torch.no_grad():
        logits = model[0](IDS)
    weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
    bridge.save_hf_pretrained(model, out, show_progress=False)
    return logits.float().numpy(), {name: (str(w.dtype), _bytes(w)) for name, w in weights}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def bytes_read(hf: Path, fields: dict[str, Any]) -> int:
    """Bytes of the folder's files that this rank read, all positional reads counted."""
    total, real = 0, os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        nonlocal total
        count = real(fd, buffers, offset)
        total += count
        return count

    os.preadv = counted
    try:
        build(hf, fields)
    finally:
        os.preadv = real
    return total


def plain_training(hf: Path, out: Path | None, fields: dict[str, Any]) -> list[float]:
    """Three steps of torch's own AdamW on [4, 16] tokens: the global losses. Saves to `out`."""
    bridge, model = build(hf, fields)
    placed = model[0].placed
    dp, rank = placed.layout.dp, placed.mesh.get_local_rank("dp_shard")
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2, foreach=False)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        whole = torch.randint(80, (4, 17), generator=generator)
        mine = whole.chunk(dp)[rank]
        logits = model[0](mine[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="sum") / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / (torch.distributed.get_world_size() / dp))
    if out is not None:
        bridge.save_hf_pretrained(model, out, show_progress=False)
    return losses


def native_round_trip(hf: Path, native: Path, save: dict[str, Any], load: dict[str, Any]) -> bool:
    """Save natively at one layout, load at another: whether all tensors are the same."""
    bridge, model = build(hf, save)
    bridge.save_megatron_model(model, native)
    again = bridge.load_megatron_model(native, mp_overrides=load, wrap_with_ddp=False)
    one = bridge.export_hf_weights(model, show_progress=False)
    two = bridge.export_hf_weights(again, show_progress=False)
    return (
        all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, two, strict=True))
        and again[0].placed.layout.tp == load["tensor_model_parallel_size"]
    )


def layout_of_loaded(hf: Path, native: Path) -> tuple[int, int]:
    """tp and pp of a loaded model where only the bridge's provider was told."""
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = 2
    provider.initialize_model_parallel(seed=0)
    layout = bridge.load_megatron_model(native, wrap_with_ddp=False)[0].placed.layout
    return layout.tp, layout.pp


def random_tensors(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, bytes]:
    provider = AutoBridge.from_hf_config(config).to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.initialize_model_parallel(seed=7)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge = AutoBridge.from_hf_config(config)
    return {n: _bytes(w) for n, w in bridge.export_hf_weights(model, show_progress=False)}


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except BevatronError as error:
        return str(error)
    return "no error"


def load_from(hf: Path, others: list[Path]) -> str:
    """What this rank says if every rank loads weights from its own path of `others`."""
    bridge, model = build(hf, {"tensor_model_parallel_size": 2})
    other = others[torch.distributed.get_rank()]
    return said(lambda: bridge.load_hf_weights(model, other))


def save_over(hf: Path, out: Path) -> str:
    bridge, model = build(hf, {"tensor_model_parallel_size": 2})
    return said(lambda: bridge.save_hf_pretrained(model, out))


def pipeline_with_gradients(hf: Path) -> str:
    _, model = build(hf, {"pipeline_model_parallel_size": 2})
    return said(lambda: model[0](IDS))


def in_one_process(hf: Path, folder: Path) -> dict[str, Any]:
    """Odds and ends that need a model but no second rank."""
    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.float16, device_map="auto")
    found: dict[str, Any] = {}
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    with torch.no_grad():
        found["computes in"] = str(model[0](IDS).dtype)
    found["exports"] = {str(w.dtype) for _, w in bridge.export_hf_weights(model[0])}
    bridge.save_hf_weights(model, folder / "weights", show_progress=False)
    found["files"] = sorted(p.name for p in (folder / "weights").iterdir())
    tasks = bridge.get_conversion_tasks(model)
    qkv = [task for task in tasks if task.param_name == "layers.0.attention.qkv.weight"]
    found["task"] = qkv[0].mapping.hf_param
    found["some"] = [n for n, _ in bridge.export_hf_weights(model, conversion_tasks=qkv)]
    wrong = torch.ones_like(IDS)
    wrong[0, 0] = 0
    found["mask"] = said(lambda: model[0](IDS, attention_mask=wrong))
    with torch.no_grad():
        plain = model[0](IDS)
        full = model[0](IDS, torch.arange(16)[None], torch.ones_like(IDS))
        found["positions"] = torch.equal(plain, full)
        found["shifted"] = torch.equal(plain, model[0](IDS, torch.arange(16)[None] * 2))
    smaller = bridge.to_megatron_provider()
    smaller.num_layers = 1
    found["smaller"] = said(smaller.provide_distributed_model)
    return found
