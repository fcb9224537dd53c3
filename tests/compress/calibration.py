"""Calibration text of random tokens, and scores of random models at any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bevatron.compress.calibrate import Aggregation
from bevatron.compress.importance import Pass, Plan, loss_at_end, measure
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.data.token_store_writer import StoreWriter
from bevatron.parallel.layout import Layout
from bevatron.parallel.placement import place
from bevatron.parallel.process_groups import mesh
from bevatron.parallel.random_weights import fill
from tests.specs import ALL

SAMPLES, SEQ_LEN = 7, 16


def write_tokens(path: Path, vocab: int = 96, tokens: int = 400) -> Path:
    path.mkdir(parents=True)
    writer = StoreWriter(path, vocab, None)
    ids = np.random.default_rng(0).zipf(1.3, size=tokens) % vocab
    writer.add(ids.tolist(), ends=True)
    writer.finish(tokenizer="toy", fingerprint="xxh3:0")
    return path


def scores_at(spec: str, tokens: Path, aggregation: str, layout: Layout) -> dict[str, np.ndarray]:
    """As one of the ranks of a process group."""
    plan = Plan(SAMPLES, 4, SEQ_LEN, 0, Aggregation.parse(aggregation), (1, 2))
    device = torch.device("cpu")
    placed = place(
        ALL[spec],
        layout,
        mesh(layout, device),
        loss_at_end,
        device=device,
        precision="fp32",
        seq_len=SEQ_LEN,
    )
    known = {p.name: p for p in ALL[spec].parameters()}
    for name, parameter in placed.parameters.items():
        fill(parameter, known[name], ALL[spec], 0)
    sampler = Sampler([(TokenStore.open(tokens), 1.0)], SEQ_LEN, 0)
    tensors, loss = Pass(placed, sampler, plan).run()
    assert loss is not None and abs(loss) < 20
    return tensors


def measured_at(ckpt: Path, tokens: Path, layout: Layout) -> tuple[dict[str, np.ndarray], dict]:
    """The public function, as one of the ranks of a process group."""
    assert dist.is_initialized()
    scores = measure(ckpt, [tokens], samples=SAMPLES, seq_len=SEQ_LEN, layers="loss", layout=layout)
    return dict(scores.tensors), dict(scores.metadata)
