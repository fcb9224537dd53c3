"""A run of any size on paper: the same placement as a real one, the same refusals, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bevatron.cli.main import app
from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout
from bevatron.spec.json import to_json
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.dry_run import Plan, make_plan
from bevatron.train.launch import layout_of, train
from bevatron.train.objectives import Pretrain
from tests.processes import Pool
from tests.specs import HOMOGENEOUS
from tests.train_steps import SEQ_LEN, Case, make_trainer

CONFIG = """\
model: {spec: NAME}
data: {train: [{path: absent}], seq_len: 8192}
train: {steps: 10, global_batch: 2048, recompute: full}
optimizer: {lr: 1.0e-4}
run: {dir: run}
"""


def config_of(folder: Path, name: str, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(CONFIG.replace("NAME", name))
    return load_config(folder / "run.yaml", list(overrides))


def plan_of(folder: Path, name: str, world: int, *overrides: str) -> Plan:
    config = config_of(folder, name, *overrides)
    return make_plan(config, layout_of(config, world), Pretrain(), [])


@pytest.mark.parametrize(
    ("name", "parameters", "world", "sizes"),
    [
        ("llama3-70b", 70_553_706_496, 512, ("tp=8", "pp=4")),
        ("llama-nemotron-super-49b", 49_867_145_216, 4096, ("tp=4", "pp=4", "dp_replicate=8")),
        ("llama-nemotron-ultra-253b", 253_401_268_224, 16384, ("tp=8", "pp=8")),
    ],
)  # fmt: skip
def test_published_models_at_512_to_16384_ranks(
    tmp_path: Path, name: str, parameters: int, world: int, sizes: tuple[str, ...]
) -> None:
    """All shards of all ranks together are the model: norms once per tensor rank, and no more than
    the padding of uneven cuts besides."""
    plan = plan_of(tmp_path, name, world, *(f"parallel.{s}" for s in sizes))
    assert (plan.parameters, plan.ranks) == (parameters, world)
    tp = int(sizes[0][3:])
    over = world // len(plan.stages) // next((int(s[13:]) for s in sizes if "repl" in s), 1)
    held = over * sum(s.parameters_per_rank for s in plan.stages)
    norms = sum(s.parameters for s in plan.stages) - parameters
    assert norms == 0, "every parameter is on one stage"
    hidden = 16384 if "253b" in name else 8192
    copies = (tp - 1) * hidden * (2 * plan.layers + 1)
    assert parameters <= held <= parameters + copies + 0.001 * parameters
    assert sorted(i for s in plan.stages for i in s.layers) == list(range(plan.layers))
    assert sum(s.flops for s in plan.stages) == pytest.approx(1.0)
    for stage in plan.stages:
        assert stage.weights == 4 * stage.parameters_per_rank
        assert stage.optimizer == 2 * stage.weights, "two fp32 moments"


def _really(case: Case) -> tuple[int, int, int, int]:
    trainer = make_trainer(case)
    mine = [p.to_local() for p in trainer.placed.parameters.values()]
    states = {id(s): s for _, s in trainer.optimizer.states().values()}
    coordinates = trainer.mesh.get_coordinate()
    first = coordinates is not None and not any(coordinates[1:])
    return (
        trainer.mesh.get_local_rank("pp") if first else -1,
        sum(p.numel() for p in mine),
        sum(p.numel() * p.element_size() for p in mine),
        sum(s.numel() * s.element_size() for s in states.values()),
    )


def test_the_numbers_are_those_of_real_processes(tmp_path: Path, pool: Pool) -> None:
    """Counted by 4 gloo ranks of a model with an odd vocabulary, and on paper."""
    layout = Layout(pp=2, tp=2)
    real = {r[0]: r[1:] for r in pool.run(4, _really, Case("homogeneous", layout))}
    (tmp_path / "spec.json").write_text(to_json(HOMOGENEOUS))
    plan = plan_of(
        tmp_path, str(tmp_path / "spec.json"), 4, "parallel.pp=2", "parallel.tp=2",
        f"data.seq_len={SEQ_LEN}",
        "train.global_batch=8", "train.micro_batch=2", "train.precision=fp32",
    )  # fmt: skip
    for stage in plan.stages:
        assert real[stage.stage] == (stage.parameters_per_rank, stage.weights, stage.optimizer)


@pytest.mark.parametrize(
    ("world", "override", "says"),
    [
        (512, "parallel.tp=7", "processes cannot be divided"),
        (512, "parallel.tp=256", "layers.0.attention has 64 query heads"),
        (512, "train.global_batch=100", "train.global_batch=100 is not a multiple"),
        (512, "parallel.split=[40,41]", "parallel.split"),
        (512, "data.seq_len=8191", "data.seq_len=8191 is not a multiple of tp=8"),
    ],
)
def test_refuses_with_the_words_of_a_real_start(
    tmp_path: Path, world: int, override: str, says: str
) -> None:
    config_of(tmp_path, "llama3-70b")
    overrides = ["parallel.tp=8", "parallel.pp=2", override]
    messages = []
    for options in ({"dry_run": True, "paper_ranks": world}, {"nproc": world}):
        with pytest.raises(BevatronError) as caught:
            train(tmp_path / "run.yaml", overrides, **options)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    assert says in messages[0]
    assert messages[0] == messages[1]


def test_one_object_as_json_and_a_warning_for_data_that_is_not_there_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(tmp_path, "nanochat-d20")
    path = str(tmp_path / "run.yaml")
    app(["train", path, "--dry-run", "--world", "64", "--json", "parallel.tp=2"],
        standalone_mode=False)  # fmt: skip
    plan = json.loads(capsys.readouterr().out)
    assert plan["ranks"] == 64
    assert plan["stages"][0]["peak"] >= plan["stages"][0]["state"] > 0
    assert plan["warnings"] == ["absent: does not exist; make it with `bevatron tokenize`"]
    app(["train", path, "--dry-run", "--world", "64"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "560,988,160 parameters" in text and "warning: absent: does not exist" in text
    assert not torch.distributed.is_initialized()


def test_a_damaged_token_store_is_an_error(tmp_path: Path) -> None:
    config_of(tmp_path, "nanochat-d20")
    store = tmp_path / "store"
    store.mkdir()
    (store / "store.json").write_text("{}")
    with pytest.raises(BevatronError, match="version"):
        train(tmp_path / "run.yaml", [f"data.train=[{{path: {store}}}]"], dry_run=True,
              paper_ranks=64)  # fmt: skip


def test_options_of_a_dry_run_without_one_are_refused(tmp_path: Path) -> None:
    config_of(tmp_path, "nanochat-d20")
    with pytest.raises(BevatronError, match="--dry-run"):
        train(tmp_path / "run.yaml", [], paper_ranks=64)
