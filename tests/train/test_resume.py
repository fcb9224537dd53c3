"""A checkpoint knows no topology: any layout continues what any other saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.rank_tables import merge_tables
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.checkpoint.save_and_load import box_reader, write_rank
from bevatron.parallel.layout import Layout
from bevatron.parallel.on_all_ranks import on_all
from tests.parallel.layouts import case
from tests.processes import Pool
from tests.train_steps import STEPS, Case, make_trainer, samples

SAVED_AT = 3
LARGE = Layout(tp=2, pp=2, dp_shard=2)


def whole_run(case: Case) -> list[tuple[float, float]]:
    trainer = make_trainer(case)
    return [trainer.step(samples(trainer, s), 1e-2) for s in range(STEPS)]


def save_after(case: Case, path: Path) -> list[tuple[float, float]]:
    """Train to SAVED_AT, save, and go on as if nothing had happened."""
    trainer, run = make_trainer(case), RunFolder(path)
    for step in range(SAVED_AT):
        trainer.step(samples(trainer, step), 1e-2)
    main = dist.get_rank() == 0
    on_all(lambda: run.begin(SAVED_AT) if main else None)
    temporary = path / f".step-{SAVED_AT:08d}.partial"
    on_all(lambda: write_rank(temporary, trainer.to_save(), dist.get_rank()))

    def commit() -> None:
        merged = merge_tables(temporary, dist.get_world_size(), "llama", SAVED_AT)
        run.commit(temporary, SAVED_AT, merged, {})

    on_all(lambda: commit() if main else None)
    return [trainer.step(samples(trainer, s), 1e-2) for s in range(SAVED_AT, STEPS)]


def resume(case: Case, path: Path) -> list[tuple[float, float]]:
    trainer = make_trainer(case)
    for parameter in trainer.placed.parameters.values():
        parameter.data.fill_(7.0)  # what is not loaded shows
    folder = RunFolder(path).newest()
    assert folder is not None
    manifest = read_manifest(folder)
    for prefix, load in (("model/", None), ("optimizer/", SAVED_AT)):
        tensors = manifest.tensors.items()
        shapes = {n[len(prefix) :]: t.shape for n, t in tensors if n.startswith(prefix)}
        read = box_reader(folder, manifest, prefix)
        if load is None:
            trainer.load_weights(shapes, read)
        else:
            trainer.load_optimizer(shapes, read, load)
    return [trainer.step(samples(trainer, s), 1e-2) for s in range(SAVED_AT, STEPS)]


# Two of a kind never: sizes, order of stages, sharding and replication all differ.
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(dp_shard=2, dp_replicate=2),
    Layout(pp=2, dp_shard=2, schedule="interleaved_1f1b"),
    Layout(pp=2, tp=2, schedule="zbv"),
    Layout(tp=2, pp=2, dp_shard=2),
]
# (from, to): what each of the other tests does not do already
FEW = [(LARGE, Layout()), (LAYOUTS[4], Layout(dp_shard=2)), (Layout(), LAYOUTS[3])]
_uninterrupted: dict[str, list[tuple[float, float]]] = {}


def assert_continues(pool: Pool, spec: str, layout: Layout, folder: Path) -> None:
    """Like the run of one process that was never interrupted; fp32, relative 1e-5."""
    if spec not in _uninterrupted:
        _uninterrupted[spec] = pool.run(1, whole_run, Case(spec))[0][SAVED_AT:]
    for got in pool.run(layout.world_size, resume, case(spec, layout), folder):
        for a, b in zip(got, _uninterrupted[spec], strict=True):
            assert a == pytest.approx(b, rel=1e-5), str(layout)


@pytest.mark.parametrize(("before", "after"), FEW, ids=str)
def test_any_layout_continues_like_the_uninterrupted_run(
    pool: Pool, before: Layout, after: Layout, tmp_path: Path
) -> None:
    pool.run(before.world_size, save_after, case("heterogeneous", before), tmp_path)
    assert_continues(pool, "heterogeneous", after, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("before", LAYOUTS, ids=str)
@pytest.mark.parametrize("spec", ["heterogeneous", "homogeneous"])
def test_every_layout_continues_what_every_other_saved(
    pool: Pool, spec: str, before: Layout, tmp_path: Path
) -> None:
    """All ordered pairs, and bit-equal at the same layout."""
    saving = case(spec, before)
    expected = pool.run(before.world_size, save_after, saving, tmp_path)
    assert pool.run(before.world_size, resume, saving, tmp_path) == expected
    for after in LAYOUTS:
        if after != before:
            assert_continues(pool, spec, after, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, schedule="zbv")], ids=str)
def test_the_same_layout_continues_bit_equal(
    pool: Pool, layout: Layout, precision: str, tmp_path: Path
) -> None:
    same = replace(case("heterogeneous", layout), precision=precision)
    expected = pool.run(layout.world_size, save_after, same, tmp_path)
    assert pool.run(layout.world_size, resume, same, tmp_path) == expected


def test_a_checkpoint_is_the_same_whatever_layout_wrote_it(pool: Pool, tmp_path: Path) -> None:
    """Global names and shapes; every tensor tiled once, replicated ones and tied ones included."""
    layouts = [Layout(), LARGE, Layout(pp=2, dp_replicate=2, schedule="zbv")]
    manifests = []
    for i, layout in enumerate(layouts):
        at = case("heterogeneous", layout)
        pool.run(layout.world_size, save_after, at, tmp_path / str(i))
        manifests.append(read_manifest(tmp_path / str(i) / f"step-{SAVED_AT:08d}"))
    tables = [{n: (t.dtype, t.shape) for n, t in m.tensors.items()} for m in manifests]
    assert tables[0] == tables[1] == tables[2]
    assert not any("head" in name for name in tables[0])
    read = [box_reader(tmp_path / str(i) / "step-00000003", m, "") for i, m in enumerate(manifests)]
    for name, (_, shape) in tables[0].items():
        if name.endswith("qkv.bias"):
            continue  # a key's bias has no effect: its gradient is noise, whose sign AdamW follows
        parts = [r(name, (0,) * len(shape), shape) for r in read]
        torch.testing.assert_close(parts[0], parts[1], rtol=1e-3, atol=1e-4)
