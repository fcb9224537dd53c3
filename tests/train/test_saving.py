"""Saving beside training: what is written is the moment of the save, the work is shared, and what
goes wrong in the background is known to all ranks."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import GenerationConfig

from bevatron.bridge.convert import export_checkpoint
from bevatron.bridge.open_weights import open_weights
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.rank_boxes import local
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.checkpoint.save_and_load import box_reader
from bevatron.errors import BevatronError
from bevatron.generate.sampling_options import defaults_of
from bevatron.parallel.layout import Layout
from bevatron.parallel.on_all_ranks import on_all
from bevatron.train.config import RunConfig
from bevatron.train.run_start import Start
from bevatron.train.save_steps import Saver
from bevatron.train.trainer import Trainer
from tests.faults.refusal import contents
from tests.processes import Pool
from tests.specs import ALL
from tests.train.tiny_run import check_steps, prepare, train
from tests.train_steps import Case, make_trainer, samples


def make_saver(trainer: Trainer, run: Path, **checkpoint: Any) -> Saver:
    config = RunConfig.model_validate(
        {
            "model": {"spec": "s"},
            "data": {"train": [{"path": "t"}], "seq_len": 16},
            "train": {"steps": 9, "global_batch": 8},
            "optimizer": {"lr": 1.0},
            "checkpoint": checkpoint,
            "run": {"dir": str(run)},
        }
    )
    return Saver(config, Start(trainer.spec, None, None, "llama"), RunFolder(run), trainer)


def stepped(case: Case) -> Trainer:
    trainer = make_trainer(case)
    trainer.step(samples(trainer, 0), 1e-2)
    return trainer


def both_ways(case: Case, run: Path) -> int:
    """Save asynchronously and spoil all values at once; and synchronously. Bytes of the buffers."""
    trainer = stepped(case)
    saver = make_saver(trainer, run / "async", **{"async": True})
    before = {saved.name: saved.values.clone() for saved in trainer.to_save()}
    for step in (1, 2):
        saver.save(step, 0)
        saver.wait()
    buffers = {name: held.data_ptr() for name, held in saver.snapshot.buffers.items()}
    saver.save(3, 0)
    for saved in trainer.to_save():
        saved.values.fill_(float("nan"))
    saver.finish(3, 0)
    assert buffers == {name: held.data_ptr() for name, held in saver.snapshot.buffers.items()}
    for saved in trainer.to_save():
        saved.values.copy_(before[saved.name])
    make_saver(trainer, run / "sync", **{"async": False}).save(3, 0)
    return sum(held.nbytes for held in saver.snapshot.buffers.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_written_is_the_moment_of_the_save(
    pool: Pool, precision: str, tmp_path: Path
) -> None:
    """Equal bytes, in the background or not; the buffers are one copy, used again."""
    case = Case("heterogeneous", Layout(dp_shard=2), precision=precision)
    sizes = pool.run(2, both_ways, case, tmp_path)
    one, other = (tmp_path / name / "step-00000003" for name in ("async", "sync"))
    texts = ("config.yaml", "manifest.json")  # they say async: true or false, or its hash
    found = [{k: v for k, v in contents(p).items() if k not in texts} for p in (one, other)]
    assert found[0] == found[1]
    assert read_manifest(one).tensors == read_manifest(other).tensors
    parameters = sum(p.numel for p in ALL[case.spec].parameters())
    assert sum(sizes) == 12 * parameters, "weights and two moments"


def save_once(case: Case, run: Path) -> None:
    make_saver(stepped(case), run).save(1, 0)


@pytest.mark.parametrize("layout", [Layout(dp_replicate=4), Layout(dp_replicate=2, tp=2)], ids=str)
def test_copies_are_shared_out(pool: Pool, layout: Layout, tmp_path: Path) -> None:
    """Each of 4 ranks writes about a quarter, of weights and of moments."""
    pool.run(4, save_once, Case("homogeneous", layout), tmp_path)
    check_steps(tmp_path)
    manifest = read_manifest(tmp_path / "step-00000001")
    written = dict.fromkeys(range(4), 0)
    for tensor in manifest.tensors.values():
        for chunk in tensor.chunks:
            rank = int(chunk.file[-17:-12])
            written[rank] += 4 * torch.Size(chunk.shape).numel()
    whole = sum(t.nbytes for t in manifest.tensors.values())
    assert sum(written.values()) == whole, "nothing twice"
    assert max(written.values()) < 1.1 * whole / 4


def fail_on_one(run: Path, is_async: bool) -> list[str]:
    """Rank 1 cannot write in the second of three saves; what both ranks are told."""
    trainer = stepped(Case("homogeneous", Layout(dp_shard=2)))
    saver = make_saver(trainer, run, **{"async": is_async, "keep": 1})
    saver.save(1, 0)
    saver.wait()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    try:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
        try:
            saver.save(2, 0)
            while is_async and not saver.in_flight.writing.done(1.0):  # type: ignore[union-attr]
                pass
            saver.save(3, 0)
        except BevatronError as error:
            messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    left = on_all(lambda: sorted(p.name for p in run.iterdir()))[0]
    assert left == ["latest", "step-00000001"], left
    again = make_saver(trainer, run, keep=1)
    again.save(4, 0)
    return messages


@pytest.mark.parametrize("is_async", [True, False])
def test_fault_55_what_fails_on_one_rank_is_raised_on_all(
    pool: Pool, is_async: bool, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk. The step before stays whole."""
    ranks = pool.run(2, fail_on_one, tmp_path, is_async)
    assert ranks[0] == ranks[1] and len(ranks[0]) == 1
    for word in ("step 2 failed: rank 1: ", "rank-00001.safetensors", "File too large"):
        assert word in ranks[0][0]
    assert check_steps(tmp_path) == [4]


def leave_early(run: Path) -> list[str]:
    saver = make_saver(stepped(Case("homogeneous", Layout(dp_shard=2))), run, **{"async": True})
    saver.save(1, 0)
    saver.leave()
    return [p.name for p in RunFolder(run).step_folders()]


def test_an_error_elsewhere_lets_the_save_in_flight_be_completed(
    pool: Pool, tmp_path: Path
) -> None:
    assert pool.run(2, leave_early, tmp_path) == [["step-00000001"]] * 2
    assert check_steps(tmp_path) == [1]


def weights_alone(case: Case, run: Path) -> dict[str, torch.Tensor]:
    trainer = stepped(case)
    saver = make_saver(trainer, run, **{"weights_every": 2, "every": 4, "async": True})
    for step in range(1, 5):
        saver.save_if_due(step, 0)
    saver.wait()
    return {n: local(p.detach()).bfloat16().clone() for n, p in trainer.placed.parameters.items()}


def test_weights_alone_are_saved_more_often_than_full_steps(pool: Pool, tmp_path: Path) -> None:
    """In the dtype of the run, without optimizer state, beside a full step of the same number."""
    values = pool.run(1, weights_alone, Case("homogeneous", precision="bf16"), tmp_path)[0]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["latest", "step-00000004", "weights-00000002", "weights-00000004"]
    folder = tmp_path / "weights-00000002"
    manifest = read_manifest(folder)
    assert {t.dtype for t in manifest.tensors.values()} == {"BF16"}
    assert set(manifest.tensors) == {f"model/{name}" for name in values}
    assert not (folder / "train_state.json").exists()
    read = box_reader(folder, manifest, "model/")
    for name, expected in values.items():
        assert torch.equal(read(name, (0,) * expected.ndim, tuple(expected.shape)), expected)
    assert check_steps(tmp_path) == [4]


def test_a_random_model_ends_where_its_tokenizer_says(pool: Pool, tmp_path: Path) -> None:
    """Here and in transformers, of a tokenizer without a generation_config.json."""
    prepare(tmp_path)
    pool.run(1, train, tmp_path, "train.steps=2")
    assert defaults_of(open_weights(tmp_path / "run")).stop_tokens == {2}
    export_checkpoint(tmp_path / "run", tmp_path / "out", show_progress=False)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
