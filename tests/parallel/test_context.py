"""Context parallel changes nothing but speed and memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.rank_tables import merge_tables
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.checkpoint.save_and_load import box_reader, write_rank
from bevatron.nn import attention_kernels, tiled_attention
from bevatron.parallel import compile_and_recompute
from bevatron.parallel.layout import Layout
from bevatron.parallel.on_all_ranks import on_all
from tests.processes import Pool
from tests.train_steps import Case, make_trainer, samples, train

LAYOUTS = {
    "cp2": Layout(cp=2),
    "cp4": Layout(cp=4),
    "cp2-tp2": Layout(cp=2, tp=2, sequence_parallel=False),
    "cp2-tp2-sp": Layout(cp=2, tp=2),
    "cp2-fsdp2": Layout(cp=2, dp_shard=2),
    "cp2-dp2": Layout(cp=2, dp_replicate=2),
    "cp2-pp2": Layout(cp=2, pp=2),
    "cp2-tp2-pp2": Layout(cp=2, tp=2, pp=2),
    "cp2-hsdp2x2": Layout(cp=2, dp_replicate=2, dp_shard=2),
}
_reference: dict[Case, list[tuple[float, float]]] = {}


def reference(pool: Pool, case: Case) -> list[tuple[float, float]]:
    if case not in _reference:
        _reference[case] = pool.run(1, train, case)[0]
    return _reference[case]


def check(pool: Pool, spec: str, layout: Layout, documents: bool) -> None:
    """Five AdamW steps in fp32, relative 1e-5: only the order of sums may differ."""
    expected = reference(pool, Case(spec, documents=documents))
    ranks = pool.run(layout.world_size, train, Case(spec, layout, documents=documents))
    assert all(r == ranks[0] for r in ranks), "ranks report different numbers"
    for step, (got, want) in enumerate(zip(ranks[0], expected, strict=True)):
        assert got == pytest.approx(want, rel=1e-5), f"step {step}"


@pytest.mark.parametrize(
    ("spec", "name", "documents"),
    [
        ("homogeneous", "cp4", False),
        ("heterogeneous", "cp2-tp2-sp", True),
    ],
)
def test_loss_and_gradient_norm_equal_one_process(
    pool: Pool, spec: str, name: str, documents: bool
) -> None:
    check(pool, spec, LAYOUTS[name], documents)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("spec", ["homogeneous", "heterogeneous", "nanochat", "nemotron"])
def test_every_spec_at_every_layout(pool: Pool, spec: str, name: str, documents: bool) -> None:
    check(pool, spec, LAYOUTS[name], documents)


def train_in_tiles(case: Case) -> list[tuple[float, float]]:
    """As long sequences are: several tiles in each of these short ones, no mask as a whole."""
    before = (
        attention_kernels.DENSE,
        tiled_attention.QUERIES,
        tiled_attention.KEYS,
        tiled_attention.SCORES,
    )
    (
        attention_kernels.DENSE,
        tiled_attention.QUERIES,
        tiled_attention.KEYS,
        tiled_attention.SCORES,
    ) = {"cpu": 0}, 3, 5, 1
    try:
        return train(case)
    finally:
        (
            attention_kernels.DENSE,
            tiled_attention.QUERIES,
            tiled_attention.KEYS,
            tiled_attention.SCORES,
        ) = before


@pytest.mark.slow
def test_in_tiles_too(pool: Pool) -> None:
    """With uneven KV heads, documents, sequence parallel."""
    expected = reference(pool, Case("heterogeneous", documents=True))
    case = Case("heterogeneous", Layout(cp=2, tp=2), documents=True)
    for got, want in zip(pool.run(4, train_in_tiles, case)[0], expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def validate(case: Case) -> tuple[float, float]:
    trainer = make_trainer(case)
    [total], [count] = trainer.evaluate(samples(trainer, 7, case.documents))
    return float(total), float(count)


def test_validation_counts_every_token_once(pool: Pool) -> None:
    [expected] = pool.run(1, validate, Case("nemotron", documents=True))
    layout = Layout(cp=2, pp=2)
    for total, count in pool.run(4, validate, Case("nemotron", layout, documents=True)):
        assert (total, count) == (pytest.approx(expected[0], rel=1e-5), expected[1])


def through_checkpoints(case: Case, path: Path, until: int) -> list[tuple[float, float]]:
    """Continue from the newest step below `path` if there is one, train, save."""
    trainer, run = make_trainer(case), RunFolder(path)
    begin, main = 0, dist.get_rank() == 0
    if (folder := run.newest()) is not None:
        begin = int(folder.name.removeprefix("step-"))
        manifest = read_manifest(folder)
        for prefix in ("model/", "optimizer/"):
            tensors = manifest.tensors.items()
            shapes = {n[len(prefix) :]: t.shape for n, t in tensors if n.startswith(prefix)}
            read = box_reader(folder, manifest, prefix)
            if prefix == "model/":
                trainer.load_weights(shapes, read)
            else:
                trainer.load_optimizer(shapes, read, begin)
    done = [trainer.step(samples(trainer, s), 1e-2) for s in range(begin, until)]
    on_all(lambda: run.begin(until) if main else None)
    temporary = path / f".step-{until:08d}.partial"
    on_all(lambda: write_rank(temporary, trainer.to_save(), dist.get_rank()))

    def commit() -> None:
        merged = merge_tables(temporary, dist.get_world_size(), "llama", until)
        run.commit(temporary, until, merged, {})

    on_all(lambda: commit() if main else None)
    return done


def test_a_run_goes_from_context_parallel_to_one_process_to_tensor_parallel(
    pool: Pool, tmp_path: Path
) -> None:
    expected = reference(pool, Case("homogeneous"))
    got = []
    for layout, until in ((Layout(cp=2), 2), (Layout(), 3), (Layout(tp=2), 4), (Layout(cp=2), 5)):
        case = Case("homogeneous", layout)
        got += pool.run(layout.world_size, through_checkpoints, case, tmp_path, until)[0]
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a == pytest.approx(b, rel=1e-5), f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"recompute": "full"}, {"micro_batch": 1}], ids=str)
def test_with_recomputing_and_other_micro_batches(pool: Pool, changes: dict[str, Any]) -> None:
    expected = reference(pool, Case("heterogeneous", documents=True))
    case = Case("heterogeneous", Layout(cp=2, tp=2), documents=True, **changes)
    for function in (train, train_in_tiles):
        for got, want in zip(pool.run(4, function, case)[0], expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)


def train_by_runs(case: Case) -> list[tuple[float, float]]:
    """As accelerators do without documents: a fused call for each run of positions."""
    with patch.object(attention_kernels, "NO_RUNS", set()):
        return train(case)


def train_traced(case: Case, way: Callable[[Case], list[Any]]) -> list[tuple[float, float]]:
    """With layers compiled as far as the gradient's graph; the C++ after it takes minutes."""
    with patch.object(compile_and_recompute, "BACKEND", "aot_eager"):
        return way(case)


@pytest.mark.slow
@pytest.mark.parametrize("way", [train, train_in_tiles], ids=["dense", "tiled"])
def test_with_compiled_layers(pool: Pool, way: Callable[[Case], list[Any]]) -> None:
    expected = reference(pool, Case("heterogeneous", documents=True))
    case = Case("heterogeneous", Layout(cp=2, tp=2), documents=True, compile=True)
    for got, want in zip(pool.run(4, train_traced, case, way)[0], expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_with_compiled_layers_as_accelerators_run_them(pool: Pool) -> None:
    case = Case("homogeneous", Layout(cp=2), compile=True)
    expected = reference(pool, Case("homogeneous"))
    for got, want in zip(pool.run(2, train_traced, case, train_by_runs)[0], expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_bf16_stays_near_fp32(pool: Pool) -> None:
    """bf16 has 8 bits of mantissa: losses within 2%."""
    expected = reference(pool, Case("heterogeneous", documents=True))
    case = Case("heterogeneous", Layout(cp=2, tp=2), documents=True, precision="bf16")
    for function in (train, train_in_tiles):
        for got, want in zip(pool.run(4, function, case)[0], expected, strict=True):
            assert got[0] == pytest.approx(want[0], rel=2e-2)
