"""What is asked of a placed model is what transformers says, at every layout, and nothing else
travels or stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

from bevatron.bridge.open_weights import open_weights
from bevatron.nn.output_heads import last_token
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.parallel.companion import Companion
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.parallel.forward_pass import (
    hidden_states,
    on_all_stages,
    sequence_scores,
    token_log_probabilities,
    token_scores,
)
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from tests.compress.test_distill_command import teacher
from tests.processes import Pool

N, T, H, VOCAB, MICRO = 4, 16, 32, 101, 2
ASKED = {
    "reference": ("LlamaForCausalLM", token_log_probabilities),
    "reward": ("LlamaForSequenceClassification", sequence_scores),
    "tagger": ("LlamaForTokenClassification", token_scores),
    "teacher": ("LlamaForCausalLM", hidden_states),
}


class Seen(NamedTuple):
    """Of one rank: what it found, the shapes it sent and broadcast, the layers it ran, and how many
    modules were still gathered."""

    found: dict[str, torch.Tensor]
    sent: list[tuple[int, ...]]
    ran: int
    gathered: int
    runs: tuple[tuple[int, int], ...]


def inputs() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ids [N, T] that end in padding (0), labels some of which count for nothing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (N, T), generator=generator)
    for row in range(N):
        ids[row, T - 3 * row :] = 0
    labels = torch.randint(VOCAB, (N, T), generator=generator)
    labels[torch.rand(N, T, generator=generator) < 0.3] = IGNORE
    return ids, {"labels": labels, "last": last_token(ids, 0)}


def ask(folder: Path, layout: Layout, asked: str, pairs: dict[int, int]) -> Seen:
    """As one of the ranks of a process group. `blocks` asks for layers alone."""
    opened = open_weights(folder)
    at_end = None if asked == "blocks" else ASKED[asked][1]
    companion, device = Companion(opened.spec, opened, 0, pairs, at_end), torch.device("cpu")
    grid = mesh(layout, device)
    companion.place(
        layout,
        grid,
        device=device,
        precision="fp32",
        seq_len=T,
        micro_batch=MICRO,
        compile_layers=False,
        stages=[range(1), range(1, 2)] if layout.pp > 1 else [range(2)],
    )
    companion.fill()
    placed, ran = companion.placed, 0
    ids, batch = inputs()
    if layout.cp > 1:
        ids, batch = ContextParallel(grid["cp"]).take(ids, batch)

    def count(*_: Any) -> None:
        nonlocal ran
        ran += 1

    for stage in placed.mine.values():
        for layer in stage.decoder.layers.values():
            layer.register_forward_hook(count)
    sent: list[tuple[int, ...]] = []
    real = dist.send, dist.broadcast
    dist.send = lambda x, *a, **k: (sent.append(tuple(x.shape)), real[0](x, *a, **k))[1]
    dist.broadcast = lambda x, *a, **k: (sent.append(tuple(x.shape)), real[1](x, *a, **k))[1]
    try:
        found = companion.run(ids, batch, "it")
        if asked == "reference":
            whole = on_all_stages(placed, found.get("it"), tuple(ids.shape), torch.float32)
            found = {**found, "everywhere": whole}
    finally:
        dist.send, dist.broadcast = real
    gathered = sum(
        isinstance(m, FSDPModule) and (g := m._get_fsdp_state()._fsdp_param_group) is not None
        and g.is_unsharded
        for stage in placed.mine.values()
        for m in stage.modules()
    )  # fmt: skip
    context = placed.stage.decoder.comm.context
    return Seen(found, sent, ran, gathered, context.runs(ids.shape[1]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    for name, (maker, _) in ASKED.items():
        teacher(folder / name, maker=maker)
    return folder


@torch.no_grad()
def theirs(folder: Path, asked: str) -> torch.Tensor:
    """What transformers' own class says of the same weights."""
    ids, batch = inputs()
    model = getattr(transformers, ASKED[asked][0]).from_pretrained(folder / asked)
    if asked == "teacher":
        return model(ids, output_hidden_states=True).hidden_states[-1]
    logits = model(ids).logits
    if asked != "reference":
        return logits
    labels = batch["labels"]
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(labels == IGNORE, 0.0)


LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(cp=2)]
MORE = [Layout(tp=2, sequence_parallel=False), Layout(tp=2, pp=2), Layout(pp=2, schedule="zbv")]
MORE += [Layout(dp_shard=2), Layout(cp=2, pp=2)]


def ask_all(folder: Path, layout: Layout) -> dict[str, Seen]:
    return {asked: ask(folder / asked, layout, asked, {}) for asked in ASKED}


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(x, marks=pytest.mark.slow) for x in MORE)], ids=str
)
def test_it_is_what_transformers_says_at_every_layout(
    pool: Pool, models: Path, layout: Layout
) -> None:
    ranks = pool.run(layout.world_size, ask_all, models, layout)
    for asked in ASKED:
        expected, ends = theirs(models, asked), 0
        for rank, seen in enumerate(r[asked] for r in ranks):
            wanted = expected if asked == "reward" else mine(expected, seen)
            if asked == "reference":
                assert_near(seen.found["everywhere"], wanted)
            if asked == "teacher" and layout.tp > 1 and layout.sequence_parallel:
                wanted = wanted.chunk(layout.tp, 1)[rank % layout.tp]
            if "it" in seen.found:
                assert_near(seen.found["it"], wanted)
                ends += 1
        assert ends == layout.world_size // layout.pp


def assert_near(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """Two implementations of one model in fp32 differ by rounding."""
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)


def mine(whole: torch.Tensor, seen: Seen) -> torch.Tensor:
    """A context-parallel rank's tokens."""
    return torch.cat([whole[:, a:b] for a, b in seen.runs], 1)


def test_what_is_not_asked_for_neither_travels_nor_stays(pool: Pool, models: Path) -> None:
    layout = Layout(pp=2)
    between = [(MICRO, T, H)] * (N // MICRO)  # micro-batches on their way to the second stage
    first, last = pool.run(2, ask, models / "reference", layout, "reference", {})
    assert first.sent == [*between, (N, T)] and last.sent == [(N, T)]
    assert last.found["it"].shape == (N, T) and last.found["it"].dtype == torch.float32
    assert first.found.keys() == {"everywhere"}
    first, last = pool.run(2, ask, models / "reward", layout, "reward", {})
    assert first.sent == between and not last.sent and last.found["it"].shape == (N, 2)
    assert first.gathered == last.gathered == 0
    # A distillation's loss needs the head, and nothing but the head.
    first, last = pool.run(2, ask, models / "teacher", layout, "teacher", {})
    assert (first.gathered, last.gathered) == (0, 1)


def test_layers_alone_run_no_stage_beyond_them(pool: Pool, models: Path) -> None:
    """The teacher's first layer, for the second one of a student on the other stage."""
    first, last = pool.run(2, ask, models / "teacher", Layout(pp=2), "blocks", {1: 0})
    assert (first.ran, last.ran) == (N // MICRO, 0)
    assert first.sent == [(N, T, H)] and not first.found
    assert first.gathered == last.gathered == 0
    model = LlamaForCausalLM.from_pretrained(models / "teacher")
    with torch.no_grad():
        states = model(inputs()[0], output_hidden_states=True).hidden_states[1]
    assert_near(last.found["it.1"], states)
