"""How important each head, neuron, channel and layer is, by one pass over calibration text.

All ranks of a process group compute the scores together and all get the same ones. Any layout
without context parallelism will do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.checkpoint.dtypes import parse_dtype
from bevatron.checkpoint.save_and_load import DTYPES
from bevatron.compress.calibrate import Aggregation, Calibration
from bevatron.compress.importance_scores import (
    LOSS,
    LOSS_WITHOUT,
    Floats,
    Scores,
    span_name,
    spec_hash,
    weights_hash,
)
from bevatron.compress.verb_options import Measuring
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.data.tokenizer import check_made_with
from bevatron.errors import BevatronError
from bevatron.nn.decoder import LEFT_OUT, NO_CHOICES, Choices
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.parallel.forward_pass import MicroBatch, forward
from bevatron.parallel.layout import Layout, LayoutError, check
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placed_weights import stream
from bevatron.parallel.placement import PRECISION, Placed, place
from bevatron.parallel.process_groups import default_device, mesh, world
from bevatron.progress import Advance, progress
from bevatron.spec import ModelSpec
from bevatron.train.objectives import Pretrain

SEQ_LEN = 2048  # unless the model's context is shorter
TOGETHER = 4096  # tokens of a micro-batch
LAYERS = ("bi", "loss", "spans")
ONE_PROCESS = Layout()


@dataclass(frozen=True)
class Plan:
    """What is measured on which text. `spans`: of how many layers; 1 for single ones."""

    samples: int
    loss_samples: int
    seq_len: int
    seed: int
    aggregation: Aggregation
    spans: tuple[int, ...]


def measure(
    ckpt: str | Path,
    data: Sequence[str | Path],
    *,
    layout: Layout = ONE_PROCESS,
    **options: Any,
) -> Scores:
    """The scores of a model, the same on every rank of the process group; without one, in this
    process.

    Args:
        ckpt: native checkpoint, run (its newest step), HF folder or Hub id.
        data: token stores; samples are drawn from all of them in proportion to their tokens.
        options: of `Measuring`.
    Raises BevatronError, with one message on all ranks if it fails on one of them.
    """
    measuring = Measuring(**options)
    device = default_device()
    with world(device):
        ready: list[tuple[Opened, Plan, Sampler]] = []

        def prepare() -> None:
            opened = open_weights(ckpt, copies=dist.get_rank() == 0)
            plan = make_plan(opened.spec, measuring)
            ready.append((opened, plan, open_sampler(opened, data, plan, layout)))

        on_all(prepare)
        opened, plan, sampler = ready[0]
        precision = precision_of(opened, measuring.dtype)
        placed = place(
            opened.spec,
            layout,
            mesh(layout, device),
            loss_at_end,
            device=device,
            precision=precision,
            seq_len=plan.seq_len,
        )
        stream(placed, opened)
        tensors, loss = Pass(placed, sampler, plan).run()
    metadata = {
        "spec": spec_hash(opened.spec),
        "weights": weights_hash(opened.folder, opened.manifest),
        "family": opened.manifest.family,
        "model": str(ckpt),
        "aggregation": str(plan.aggregation),
        "samples": str(plan.samples),
        "seq_len": str(plan.seq_len),
        "tokens": str(plan.samples * plan.seq_len),
        "seed": str(plan.seed),
        "data": ",".join(store.info.hash for store in sampler.stores),
        "dtype": precision,
    }
    if loss is not None:
        metadata["loss"] = repr(loss)
    if plan.spans:
        metadata["loss_samples"] = str(plan.loss_samples)
    scores = Scores(tensors, metadata)
    scores.check_finite(
        str(ckpt), "look for NaN in the weights, or compute in bf16 or fp32 (--dtype)"
    )
    return scores


def make_plan(spec: ModelSpec, asked: Measuring) -> Plan:
    """Raises BevatronError for what cannot be measured of this model."""
    count, context = len(spec.layers), spec.max_position_embeddings
    samples, loss_samples, seq_len = asked.samples, asked.loss_samples, asked.seq_len
    layers, spans = asked.layers, asked.spans
    if layers not in LAYERS:
        raise BevatronError(f"layers is {layers!r}, expected one of {', '.join(LAYERS)}")
    if samples < 1 or loss_samples < 1:
        raise BevatronError(
            f"{samples} samples, {loss_samples} for losses: expected at least 1 of each"
        )
    if layers != "bi" and spec.head.kind != "causal_lm":
        raise BevatronError(
            f"layers {layers} needs the loss of a language model; this model has the head "
            f"{spec.head.kind}: use layers bi"
        )
    if spans and layers != "spans":
        raise BevatronError(f"spans of {spans[0]} layers go with layers spans, not {layers}")
    if layers == "spans" and not spans:
        spans = tuple(sorted({max(1, count // 4), max(1, count // 2)}))
    if wrong := [n for n in spans if not 1 <= n < max(2, count)]:
        raise BevatronError(
            f"a span of {wrong[0]} layers cannot be left out of {count}; expected 1 to {count - 1}"
        )
    if seq_len is not None and not 1 <= seq_len <= context:
        raise BevatronError(
            f"the sequence length is {seq_len}, the model's context has {context} tokens "
            "(max_position_embeddings); expected 1 to that"
        )
    return Plan(
        samples,
        min(samples, loss_samples),
        seq_len or min(SEQ_LEN, context),
        asked.seed,
        Aggregation.parse(asked.aggregation),
        (1,) if layers == "loss" else tuple(sorted(set(spans))),
    )


def open_sampler(opened: Opened, data: Sequence[str | Path], plan: Plan, layout: Layout) -> Sampler:
    """The calibration text, checked against the model, and the layout too. Raises BevatronError."""
    if layout.cp > 1:
        raise LayoutError(f"importance has no context parallelism (cp {layout.cp}); use cp 1")
    check(layout, opened.spec, seq_len=plan.seq_len, global_batch=layout.dp * layout.pp, micro=1)
    stores = [TokenStore.open(Path(path)) for path in data]
    for store in stores:
        store.check_vocab(opened.spec.vocab_size)
        check_made_with(store, opened.tokenizer, opened.folder)
    sampler = Sampler([(s, float(s.tokens)) for s in stores], plan.seq_len, plan.seed)
    if plan.samples > sampler.epoch_length:
        raise BevatronError(
            f"{stores[0].path}{' and others' if len(stores) > 1 else ''}: has "
            f"{sampler.epoch_length} samples of {plan.seq_len} tokens, {plan.samples} were asked "
            f"for; use --samples {sampler.epoch_length}, a smaller --seq-len, or more text"
        )
    return sampler


def precision_of(opened: Opened, dtype: str | None) -> str:
    """As `place` spells it."""
    stored = opened.dtype if dtype is None else parse_dtype(dtype)
    return PRECISION.get(DTYPES[stored], "fp32")


def loss_at_end(comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
    """At the end: the sum of the losses; nothing for a head that is not a language model's."""
    if spec.head.kind == "causal_lm":
        return Pretrain().compute(comm, spec, batch)
    return lambda scores, weight: scores.new_zeros(1)


class Pass:
    """Forwards over the samples, a part of which is every data-parallel rank's."""

    def __init__(self, placed: Placed, sampler: Sampler, plan: Plan) -> None:
        self.placed, self.sampler, self.plan = placed, sampler, plan

    def run(self) -> tuple[dict[str, Floats], float | None]:
        """All tensors of the scores, and the loss over all samples."""
        plan, spec = self.plan, self.placed.spec
        calibration = Calibration(self.placed, plan.aggregation, plan.seq_len)
        with calibration.tapped(), self._shown("calibrating", plan.samples) as advance:
            loss = self._forwards(plan.samples, advance, calibration)
        tensors = calibration.scores(plan.samples)
        if plan.spans:
            tensors |= self._losses()
        return tensors, loss if spec.head.kind == "causal_lm" else None

    def _losses(self) -> dict[str, Floats]:
        plan, layers = self.plan, len(self.placed.spec.layers)
        passes = 1 + sum(layers - n + 1 for n in plan.spans)
        with self._shown("leaving out layers", passes * plan.loss_samples) as advance:
            found = {LOSS: [self._loss_without((), advance)]}
            for n in plan.spans:
                spans = (range(i, i + n) for i in range(layers - n + 1))
                losses = [self._loss_without(span, advance) for span in spans]
                found[LOSS_WITHOUT if n == 1 else span_name(n)] = losses
        return {name: np.array(losses, dtype=np.float32) for name, losses in found.items()}

    def _loss_without(self, layers: Collection[int], advance: Advance) -> float:
        choices = dict.fromkeys(layers, LEFT_OUT)
        return self._forwards(self.plan.loss_samples, advance, choices=choices)

    def _forwards(
        self,
        samples: int,
        advance: Advance,
        calibration: Calibration | None = None,
        choices: Choices = NO_CHOICES,
    ) -> float:
        """Pass the first `samples` of them through; their loss in nats per token, on all ranks.

        All ranks make as many micro-batches, for they share parameters; rows beyond the samples
        only fill the last one."""
        plan, placed = self.plan, self.placed
        dp, device = placed.layout.dp, placed.device
        rows = min(max(1, TOGETHER // plan.seq_len), -(-samples // dp))
        begins = range(0, samples, rows * dp)

        def micro_batches() -> Iterator[MicroBatch]:
            for begin in begins:
                at = np.arange(rows, dtype=np.int64) * dp + begin + placed.dp_rank
                tokens = torch.from_numpy(self.sampler.samples(np.where(at < samples, at, 0)))
                tokens, valid = tokens.to(device), torch.from_numpy(at < samples).to(device)
                if calibration is not None:
                    calibration.begin_batch(valid)
                labels = tokens[:, 1:].masked_fill(~valid[:, None], IGNORE)
                yield tokens[:, :-1], {"labels": labels}

        total = torch.zeros(1, dtype=torch.float64, device=device)
        for begin, found in zip(
            begins, forward(placed, micro_batches(), choices=choices), strict=True
        ):
            if calibration is not None:
                calibration.end_batch()
            if placed.reports and placed.spec.head.kind == "causal_lm":
                total += found.end
            advance(min(rows * dp, samples - begin))
        dist.all_reduce(total)
        return float(total) / (samples * plan.seq_len)

    def _shown(self, what: str, total: int) -> AbstractContextManager[Any]:
        """The progress, on the first rank."""
        return progress(what, total, "samples", show=dist.get_rank() == 0)
