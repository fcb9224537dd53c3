"""Adapters: the base is held still, what is trained is small, and the layout changes nothing."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bevatron.checkpoint.rank_boxes import local
from bevatron.generate.live_engine import LiveEngine
from bevatron.parallel import compile_and_recompute
from bevatron.parallel.adapter_off import AdapterOff
from bevatron.parallel.forward_pass import forward, token_log_probabilities
from bevatron.parallel.layout import Layout
from bevatron.parallel.replica_check import check_replicas
from bevatron.spec import Adapter
from tests.processes import Pool
from tests.train_steps import Case, make_trainer, samples

LORA = Adapter("lora", 3, 6.0, ("qkv", "o", "gate_up", "down"))
DORA = Adapter("dora", 2, 4.0, ("qkv", "o", "gate_up", "down", "linear"))
BOTH = Adapter("dora", 2, 4.0, ("qkv", "gate_up"), fused=True)
SOME = Adapter("dora", 2, 4.0, ("q", "v", "up", "o"), rslora=True, layers=(0, 2, 3, 6))


def adapted_run(case: Case) -> tuple[list[tuple[float, float]], list[str]]:
    """(loss, gradient norm) of every step, and what is wrong on this rank afterwards."""
    trainer = make_trainer(case)
    placed, adapter = trainer.placed, trainer.spec.adapter
    assert adapter is not None
    before = {n: local(p.detach()).clone() for n, p in placed.parameters.items()}
    steps = [trainer.step(samples(trainer, s), 3e-3) or (0.0, 0.0) for s in range(3)]
    wrong = []
    for name, p in placed.parameters.items():
        now = local(p.detach())
        if not now.numel():
            continue
        moved = not torch.equal(now, before[name])
        if moved != adapter.owns(name):
            wrong.append(f"{name}: moved is {moved}")
    saved = {s.name.split("/", 1)[1] for s in trainer.to_save() if s.name.startswith("model/")}
    wrong += [f"{name} is saved" for name in saved if not adapter.owns(name)]
    states = {n.rpartition("/")[2] for n in trainer.optimizer.states()}
    wrong += [f"{name} has moments" for name in states if not adapter.owns(name)]
    check_replicas(placed)
    return steps, wrong


CASES = [
    ("homogeneous", LORA, Layout(tp=2, pp=2)),
    ("homogeneous", LORA, Layout(tp=2, sequence_parallel=False)),
    ("heterogeneous", DORA, Layout(tp=2, pp=2)),
    ("heterogeneous", SOME, Layout(tp=2, cp=2)),
    ("heterogeneous", LORA, Layout(dp_replicate=2, dp_shard=2)),
    ("nemotron", BOTH, Layout(tp=2, dp_shard=2)),
]


def adapted_runs(cases: list[Case]) -> list[tuple[list[tuple[float, float]], list[str]]]:
    return [adapted_run(case) for case in cases]


def test_an_adapter_run_equals_one_process_and_moves_the_adapter_alone(pool: Pool) -> None:
    (alone,) = pool.run(1, adapted_runs, [Case(spec, adapter=a) for spec, a, _ in CASES])
    for ranks in (2, 4):
        which = [i for i, (_, _, layout) in enumerate(CASES) if layout.world_size == ranks]
        cases = [Case(CASES[i][0], CASES[i][2], 1, adapter=CASES[i][1]) for i in which]
        for found in pool.run(ranks, adapted_runs, cases):
            for i, (steps, wrong) in zip(which, found, strict=True):
                assert not wrong and not alone[i][1], CASES[i]
                for got, expected in zip(steps, alone[i][0], strict=True):
                    assert got == pytest.approx(expected, rel=1e-5), CASES[i]


def off(case: Case) -> tuple[Tensor | None, Tensor | None, list[float]]:
    """log p of a batch's tokens from the base, and with a trained adapter that is switched off, on
    ranks that have them; and the losses."""
    with patch.object(compile_and_recompute, "BACKEND", "aot_eager"):
        trainer = make_trainer(case)
    ids = samples(trainer, 9)["tokens"]
    ids, batch = ids[:, :-1], {"labels": ids[:, 1:]}
    companion = AdapterOff(trainer.spec)
    companion.place(
        case.layout, trainer.mesh, device=trainer.device, precision="fp32", seq_len=16,
        micro_batch=2, compile_layers=False, beside=trainer.placed,
    )  # fmt: skip
    before = companion.run(ids, batch, "reference").get("reference")
    losses = [(trainer.step(samples(trainer, s), 3e-2) or (0.0,))[0] for s in range(3)]
    after = companion.run(ids, batch, "reference").get("reference")
    companion.release()
    losses.append((trainer.step(samples(trainer, 3), 3e-2) or (0.0,))[0])
    return before, after, losses


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_switched_off_it_is_the_base_and_training_goes_on_as_it_was(
    pool: Pool, compiled: bool
) -> None:
    spec = "homogeneous" if compiled else "heterogeneous"
    adapter = LORA if compiled else DORA
    ((before, after, losses),) = pool.run(1, off, Case(spec, adapter=adapter))
    assert before is not None and after is not None and torch.equal(before, after)
    assert losses[3] < losses[0]
    layout = Layout(tp=2, pp=2) if not compiled else Layout()
    case = Case(spec, layout, adapter=adapter, compile=compiled)
    # New processes: torch keeps meshes of earlier process groups, and here takes one of those.
    pool.close()
    for first, second, others in pool.run(layout.world_size, off, case):
        assert others == pytest.approx(losses, rel=1e-5)
        if first is not None and second is not None:
            assert torch.equal(first, second)
            torch.testing.assert_close(first, before, rtol=1e-4, atol=1e-5)


def live(case: Case) -> tuple[list[list[float]], Tensor | None]:
    """After two steps, log p of some sequences' tokens from the engine inside the run, and from the
    trained model on ranks that have its end."""
    trainer = make_trainer(case)
    engine = LiveEngine(trainer.placed, tp=2, max_batch=1, max_tokens=64)
    for number in range(2):
        trainer.step(samples(trainer, number), 3e-2)
    engine.refresh()
    tokens = torch.randint(90, (2, 17), generator=torch.Generator().manual_seed(3))
    found = engine.loglikelihoods([row.tolist() for row in tokens])
    parts = [(tokens[:, :-1], {"labels": tokens[:, 1:]})]
    (end,) = forward(trainer.placed, parts, token_log_probabilities)
    engine.close()
    return [one.logprobs for one in found], end.end


@pytest.mark.parametrize(
    ("spec", "adapter", "layout"),
    [("heterogeneous", DORA, Layout(tp=2, pp=2)), ("homogeneous", SOME, Layout(dp_shard=2, tp=2))],
)
def test_the_engine_inside_the_run_has_the_adapter_merged_in(
    pool: Pool, spec: str, adapter: Adapter, layout: Layout
) -> None:
    adapter = replace(adapter, layers=None)
    for found, end in pool.run(4, live, Case(spec, layout, 1, adapter=adapter)):
        if end is not None:
            torch.testing.assert_close(torch.tensor(found), end, rtol=1e-5, atol=1e-5)


def test_recomputing_changes_nothing(pool: Pool) -> None:
    case = Case("heterogeneous", adapter=DORA)
    again = [replace(case, recompute=which) for which in ("none", "full", "selective")]
    ((expected, *found),) = pool.run(1, adapted_runs, again)
    assert found == [expected, expected]


def compiled(case: Case) -> list[tuple[float, float]]:
    with patch.object(compile_and_recompute, "BACKEND", "aot_eager"):
        return adapted_run(case)[0]


@pytest.mark.slow
def test_compiled_layers_with_an_adapter_train_as_eager_ones(pool: Pool) -> None:
    """One layer has an adapter and the others have not; ranks add up the lengths of rows."""
    adapter = replace(DORA, targets=("qkv", "o", "down"), layers=(1, 2))
    case = Case("homogeneous", Layout(tp=2), 1, adapter=adapter)
    expected = pool.run(2, adapted_run, case)
    for found, (steps, _) in zip(
        pool.run(2, compiled, replace(case, compile=True)), expected, strict=True
    ):
        for got, wanted in zip(found, steps, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)


def half(case: Case) -> tuple[list[tuple[float, float]], list[str]]:
    """The same, in bf16, and which parameters are held in another dtype than they should be."""
    trainer = make_trainer(case)
    adapter = trainer.spec.adapter
    assert adapter is not None
    dtypes = {n: p.dtype for n, p in trainer.placed.parameters.items()}
    wanted = {n: torch.float32 if adapter.owns(n) else torch.bfloat16 for n in dtypes}
    steps = [trainer.step(samples(trainer, s), 3e-3) or (0.0, 0.0) for s in range(2)]
    return steps, [n for n in dtypes if dtypes[n] != wanted[n]]


def test_in_bf16_the_base_is_held_in_bf16_and_the_adapter_has_masters(pool: Pool) -> None:
    case = Case("heterogeneous", precision="bf16", adapter=DORA)
    ((alone, wrong),) = pool.run(1, half, case)
    assert not wrong
    layout = Layout(tp=2, pp=2, schedule="zbv")
    for steps, wrong in pool.run(4, half, replace(case, layout=layout, micro_batch=1)):
        assert not wrong
        for got, expected in zip(steps, alone, strict=True):
            assert got == pytest.approx(expected, rel=2e-2)
