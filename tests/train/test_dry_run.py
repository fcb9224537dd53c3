"""A run of any size on paper: the same placement as a real one, the same refusals, in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from bevatron.checkpoint.rank_boxes import local
from bevatron.cli.main import app
from bevatron.errors import BevatronError
from bevatron.families import by_name
from bevatron.parallel.layout import Layout
from bevatron.spec.json import to_json
from bevatron.train import run_start as start_module
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.dry_run import Plan, make_plan
from bevatron.train.launch import layout_of, train
from bevatron.train.objectives import Pretrain
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import ALL
from tests.train_steps import GLOBAL_BATCH, OPTIMIZERS, SEQ_LEN, Case, make_trainer, samples

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


class Census(TorchDispatchMode):
    """Looks at every operation of a step which gradients and gathered weights there are.

    Attributes:
        gradients, gathered: bytes at the worst moment."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        modules = [m for stage in trainer.placed.mine.values() for m in stage.modules()]
        states = [m._get_fsdp_state() for m in modules if isinstance(m, FSDPModule)]
        groups = [group for state in states for group in state._fsdp_param_groups]
        self.parameters: list[Any] = [p for group in groups for p in group.fsdp_params]
        self.gradients = self.gathered = 0
        self.looks = False

    def _look(self) -> None:
        gradients, gathered = {}, {}
        for p in self.parameters:
            whole = getattr(p, "_unsharded_param", None)
            found = [p.unsharded_accumulated_grad, p.sharded_param.grad]
            for grad in [*found, whole.grad if whole is not None else None]:
                if grad is not None:
                    gradients[local(grad).data_ptr()] = local(grad).nbytes
            if whole is not None and local(whole.detach()).untyped_storage().nbytes():
                gathered[local(whole.detach()).data_ptr()] = local(whole.detach()).nbytes
        self.gradients = max(self.gradients, sum(gradients.values()))
        self.gathered = max(self.gathered, sum(gathered.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not self.looks:
            self.looks = True
            self._look()
            self.looks = False
        return out


def _really(case: Case) -> dict[str, int] | None:
    """What a rank holds in its second step; None on ranks that a plan does not look at."""
    trainer = make_trainer(case)
    trainer.step(samples(trainer, 0), 1e-2)
    with Census(trainer) as census:
        trainer.step(samples(trainer, 1), 1e-2)
    placed, coordinates = trainer.placed, trainer.mesh.get_coordinate()
    mine = [local(p.detach()) for p in placed.parameters.values()]
    if placed.tied is not None and placed.tied.head is not None:
        mine.append(local(placed.tied.head.detach()))
    states = {id(s): s for _, s in trainer.optimizer.states().values()}
    if coordinates is None or any(coordinates[1:]):
        return None
    return {
        "stage": coordinates[0],
        "parameters_per_rank": sum(p.numel() for p in mine),
        "weights": sum(p.nbytes for p in mine),
        "optimizer": sum(s.nbytes for s in states.values()),
        "gradients": census.gradients,
        "gathered": census.gathered,
    }


SHARDED = Layout(dp_shard=2)
CASES = [
    Case("homogeneous"),
    Case("nanochat", precision="bf16", optimizer="muon"),
    Case("homogeneous", SHARDED, precision="bf16"),
    Case("heterogeneous", SHARDED, micro_batch=1),
    Case("nemotron", SHARDED, precision="bf16", micro_batch=4),
    Case("heterogeneous", Layout(dp_shard=2, shard="gradients"), precision="bf16"),
    Case("homogeneous", Layout(dp_replicate=2), precision="bf16", optimizer="muon"),
    Case("heterogeneous", Layout(pp=2, tp=2), precision="bf16"),
    # the same layout again; fp32 is counted in the first and the fourth
    pytest.param(Case("homogeneous", Layout(pp=2, tp=2)), marks=pytest.mark.slow),
    Case("nanochat", Layout(pp=2, dp_shard=2), precision="bf16", optimizer="muon"),
    Case("homogeneous", Layout(cp=2), precision="bf16"),
    Case(
        "homogeneous",
        Layout(pp=2, schedule="interleaved_zero_bubble", virtual_stages=2),
        precision="bf16",
    ),
    Case("homogeneous", SHARDED, precision="bf16", freeze=("embed.*", "layers.[01].*", "*norm*")),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.spec}, {c.layout}, {c.precision}, {c.optimizer}"
)
def test_the_numbers_are_those_of_real_processes(
    tmp_path: Path, pool: Pool, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them counted in a step of gloo ranks, and on paper. What there is between steps is
    exact; gradients too, but for those of a layer that is on its way in a pipeline and of a single
    micro-batch; gathered weights too unless they are dropped after use, of which a CPU does not
    gather the next ones ahead."""
    layout, optimizer, spec = case.layout, OPTIMIZERS[case.optimizer], ALL[case.spec]
    found = pool.run(layout.world_size, _really, case)
    real = {rank["stage"]: rank for rank in found if rank is not None}
    (tmp_path / "spec.json").write_text(to_json(spec))
    # One of the specs has more kinds of layers than any family; a plan only says the name.
    monkeypatch.setattr(start_module, "for_spec", lambda spec: by_name("llama"))
    config = config_of(tmp_path, str(tmp_path / "spec.json"), f"data.seq_len={SEQ_LEN}")
    train = config.train.model_copy(
        update={
            "global_batch": GLOBAL_BATCH,
            "micro_batch": case.micro_batch,
            "precision": case.precision,
            "recompute": "none",
            "freeze": list(case.freeze),
        }
    )
    config = config.model_copy(update={"train": train, "optimizer": optimizer})
    plan = make_plan(config, layout, Pretrain(), [])
    itemsize = 4 if case.precision == "fp32" else 2
    for stage in plan.stages:
        own = real[stage.stage]
        for name in ("parameters_per_rank", "weights", "optimizer"):
            assert getattr(stage, name) == own[name], name
        if layout.pp == 1 and plan.micro_batches > 1:
            # The head's share of a tied matrix's gradient waits within autograd, out of sight.
            out_of_sight = spec.vocab_size * spec.hidden_size * itemsize if spec.tied else 0
            assert stage.gradients == own["gradients"] + out_of_sight
        else:
            most = itemsize * stage.parameters
            assert own["gradients"] <= stage.gradients <= own["gradients"] + most
        if layout.regathers:
            assert own["gathered"] <= stage.gathered <= 2 * own["gathered"]
        else:
            assert stage.gathered == own["gathered"]


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
    short = "data.seq_len=2048"  # within its context
    app(["train", path, "--dry-run", "--world", "64", "--json", "parallel.tp=2", short],
        standalone_mode=False)  # fmt: skip
    plan = json.loads(capsys.readouterr().out)
    assert plan["ranks"] == 64
    assert plan["stages"][0]["peak"] >= plan["stages"][0]["state"] > 0
    assert plan["warnings"] == ["absent: does not exist; make it with `bevatron tokenize`"]
    app(["train", path, "--dry-run", "--world", "64", short], standalone_mode=False)
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
