"""Frozen parameters: what is held still costs nothing, stays bit for bit, at every layout."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from bevatron.bridge.convert import import_checkpoint
from bevatron.bridge.open_weights import open_weights
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.rank_boxes import local
from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout
from bevatron.parallel.placed_weights import stream
from bevatron.parallel.process_groups import mesh
from bevatron.spec.count import flops_per_token
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.config_file import load_config
from bevatron.train.freezing import first_trained_layer, frozen_parameters, training_flops
from bevatron.train.launch import layout_of
from bevatron.train.launch import work as train_
from bevatron.train.objectives import Pretrain
from bevatron.train.report import report
from bevatron.train.trainer import Trainer
from tests.commands import bevatron as command
from tests.labelled_data import save_llama
from tests.processes import Pool
from tests.specs import ALL
from tests.train.tiny_run import SPEC, metrics, prepare
from tests.train_steps import STEPS, Case, make_trainer, samples

EARLY = ("embed.*", "layers.0.*", "layers.1.*", "layers.2.*", "layers.3.*")


def frozen_run(case: Case) -> tuple[list[tuple[float, float]], list[str]]:
    """(loss, gradient norm) of every step, and what is wrong on this rank afterwards."""
    trainer = make_trainer(case)
    placed, frozen = trainer.placed, trainer.frozen
    before = {n: local(p.detach()).clone() for n, p in placed.parameters.items()}
    steps = [trainer.step(samples(trainer, s), 3e-3) for s in range(STEPS)]
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    wrong = []
    for name, p in placed.parameters.items():
        held, now = name in frozen, local(p.detach())
        same: Tensor = torch.equal(now, before[name]) or not now.numel()
        if held and (not same or p.grad is not None or p.dtype != dtype):
            wrong.append(f"{name} is not held still in {dtype}")
        if not held and p.dtype != torch.float32:
            wrong.append(f"{name} has no fp32 master")
    kept = {s.name.rpartition("/")[2] for s in trainer.to_save() if s.name.startswith("optimizer/")}
    wrong += [f"{name} has an optimizer's state" for name in kept & frozen]
    saved = [s.name for s in trainer.to_save()]
    wrong += [name for name in frozen & set(placed.parameters) if f"model/{name}" not in saved]
    return steps, wrong


CASES = [
    ("homogeneous", ("embed.*", "layers.0.*"), Layout(tp=2, pp=2, dp_shard=2)),
    # The first stage has nothing to train; the embedding is tied to the last stage's head.
    ("heterogeneous", EARLY, Layout(pp=2, dp_shard=2)),
    ("heterogeneous", EARLY, Layout(pp=2, schedule="zbv")),
    ("heterogeneous", EARLY[1:], Layout(pp=2, dp_shard=2, schedule="interleaved_zero_bubble")),
    ("heterogeneous", ("layers.[56].*", "final_norm.*"), Layout(pp=2, schedule="gpipe")),
    ("nanochat", ("layers.*.qkv.weight", "head.*"), Layout(tp=2, dp_replicate=2)),
]


@pytest.mark.parametrize(("spec", "freeze", "layout"), CASES)
def test_a_frozen_run_equals_one_process_and_moves_nothing_that_is_frozen(
    pool: Pool, spec: str, freeze: tuple[str, ...], layout: Layout
) -> None:
    ((alone, wrong),) = pool.run(1, frozen_run, Case(spec, freeze=freeze))
    assert not wrong
    for steps, wrong in pool.run(
        layout.world_size, frozen_run, Case(spec, layout, 1, freeze=freeze)
    ):
        assert not wrong
        for found, expected in zip(steps, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("spec", "freeze", "layout"), [CASES[1], CASES[5]])
def test_a_bf16_run_holds_what_is_frozen_in_bf16(
    pool: Pool, spec: str, freeze: tuple[str, ...], layout: Layout
) -> None:
    """Layouts differ by rounding, as those of a run without it (`test_layouts.py`)."""
    case = Case(spec, precision="bf16", freeze=freeze)
    ((alone, wrong),) = pool.run(1, frozen_run, case)
    assert not wrong
    case = Case(spec, layout, 1, "bf16", freeze=freeze)
    for steps, wrong in pool.run(layout.world_size, frozen_run, case):
        assert not wrong
        for found, expected in zip(steps, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-2)


def changed(case: Case) -> list[tuple[float, float]]:
    return frozen_run(case)[0]


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputing_frozen_layers_changes_nothing(pool: Pool, recompute: str) -> None:
    freeze = ("embed.*", "layers.0.*", "layers.2.*")
    expected = pool.run(1, changed, Case("homogeneous", freeze=freeze))
    assert pool.run(1, changed, Case("homogeneous", recompute=recompute, freeze=freeze)) == expected


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_left_is_updated_by_either_optimizer(pool: Pool, optimizer: str) -> None:
    """And a first step has the same loss whatever is frozen."""
    case = Case("homogeneous", optimizer=optimizer, freeze=("layers.0.*", "layers.1.mlp*"))
    ((steps, wrong),) = pool.run(1, frozen_run, case)
    ((free, _),) = pool.run(1, frozen_run, Case("homogeneous", optimizer=optimizer))
    assert not wrong and steps[0][0] == free[0][0] and steps[0][1] < free[0][1]
    assert steps[1:] != free[1:]


# --- against plain PyTorch ------------------------------------------------------------------------


def ours(native: Path, freeze: list[str]) -> list[tuple[float, float]]:
    opened, device = open_weights(native), torch.device("cpu")
    train = TrainConfig(steps=4, global_batch=4, micro_batch=2, precision="fp32", freeze=freeze)
    optimizer = OptimizerConfig(lr=1e-3, no_decay=[], weight_decay=0.1)
    trainer = Trainer(opened.spec, Layout(), mesh(Layout(), device), Pretrain(), seq_len=16,
                      train=train, optimizer=optimizer, device=device)  # fmt: skip
    stream(trainer.placed, opened)
    return [trainer.step({"tokens": batch}, 1e-3) or (0, 0) for batch in _batches(opened.spec)]


def _batches(spec: object) -> list[Tensor]:
    vocabulary = spec.vocab_size  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (4, 17), generator=generator) for _ in range(4)]


def theirs(folder: Path, spec: object, freeze: tuple[str, ...]) -> list[tuple[float, float]]:
    """A loop over transformers' model, as anyone would write it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(freeze))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    out = []
    for tokens in _batches(spec):
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        out.append((float(loss.detach()), float(norm)))
    return out


def test_losses_are_those_of_a_loop_over_transformers_with_requires_grad_off(
    pool: Pool, tmp_path: Path
) -> None:
    save_llama(tmp_path / "hf")
    import_checkpoint(str(tmp_path / "hf"), tmp_path / "native")
    spec = open_weights(tmp_path / "native").spec
    there = ("model.embed_tokens", "model.layers.0.", "model.layers.1.mlp")
    expected = theirs(tmp_path / "hf", spec, there)
    found = pool.run(1, ours, tmp_path / "native", ["embed.*", "layers.0.*", "layers.1.mlp.*"])[0]
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=2e-5)


# --- which, and what they save ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "pattern", "says"),
    [
        ("homogeneous", "embd.weight", "near it are embed.weight"),
        ("homogeneous", "layer.0.attention.o.weight", "layers.0.attention.o.weight"),
        ("homogeneous", "layer.2.*", "near it are layers.2.*"),
        ("heterogeneous", "head.*", "the head is tied to embed.weight"),
        ("homogeneous", "*", "leaves no parameter to train"),
        ("homogeneous", "layers.[0-11].*", "[0-11] in layers.[0-11].* stands for one character"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(spec: str, pattern: str, says: str) -> None:
    with pytest.raises(BevatronError, match=r"train\.freeze") as caught:
        frozen_parameters(ALL[spec], [pattern])
    assert says in str(caught.value)


def test_flops_are_those_of_what_is_computed() -> None:
    spec = ALL["homogeneous"]
    everything = flops_per_token(spec, 16, True)
    assert sum(training_flops(spec, 16, True, ())) == everything
    early = frozen_parameters(spec, ["embed.*", "layers.0.*"])
    assert first_trained_layer(spec, early) == 1
    first, *_ = training_flops(spec, 16, True, early)
    assert 3 * first == training_flops(spec, 16, True, ())[0]  # a forward alone
    late = frozen_parameters(spec, ["layers.0.*"])
    assert training_flops(spec, 16, True, late)[0] < 3 * first
    assert first_trained_layer(spec, late) == 0


# --- restarts -----------------------------------------------------------------------------------


def starts(
    folder: Path, cases: list[list[str]]
) -> list[tuple[str, list[tuple[int, float, float]]]]:
    """Of one run after the other: what was said, and its steps."""
    out = []
    for options in cases:
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stderr(said):
            config = load_config(Path("run.yaml"), options)
            try:
                layout = layout_of(config, torch.distributed.get_world_size())
                train_(config, layout, config.log.name == "allowed")
            except BevatronError as error:
                print(f"error: {error}", file=said)
        out.append((said.getvalue(), metrics(folder / config.run.dir)))
    return out


FROZEN, BF16 = "train.freeze=[embed.*, layers.0.*]", "train.precision=bf16"


def test_a_frozen_run_is_saved_once_and_goes_on_at_another_layout(
    pool: Pool, tmp_path: Path
) -> None:
    folder = prepare(tmp_path)
    whole, first = ["run.dir=whole", BF16, FROZEN], ["run.dir=parts", BF16, FROZEN, "train.steps=2"]
    (_, expected), _ = pool.run(1, starts, folder, [whole, first])[0]
    step = folder / "parts/step-00000002"
    frozen = frozen_parameters(SPEC, ["embed.*", "layers.0.*"])
    tensors = read_manifest(step).tensors
    assert {f"model/{p.name}" for p in SPEC.parameters()} <= set(tensors)
    kept = {name.split("/", 2)[2] for name in tensors if name.startswith("optimizer/")}
    assert kept == {p.name for p in SPEC.parameters()} - frozen
    again = ["run.dir=parts", BF16, FROZEN]
    ((said, steps),) = pool.run(1, starts, folder, [again])[0]
    assert steps == expected and "bit for bit the same numbers" in said
    cut = ["run.dir=parts", BF16, FROZEN, "train.steps=8", "parallel.pp=2", "parallel.tp=2"]
    ((said, steps),) = pool.run(4, starts, folder, [[*cut, "train.micro_batch=1"]])[0]
    assert "error" not in said and steps[:6] == expected and len(steps) == 8
    assert "7 of 15 tensors" in report([folder / "parts"]).read_text(encoding="utf-8")


def test_a_list_that_changed_is_said_and_asked_for(pool: Pool, tmp_path: Path) -> None:
    """What is frozen goes on as it is rounded; what is trained again begins with its first update,
    and is saved and continued as such."""
    folder = prepare(tmp_path)
    base = ["run.dir=run", BF16, FROZEN]
    other = ["run.dir=run", BF16, "train.freeze=[embed.*, layers.1.*]"]
    found = pool.run(1, starts, folder, [
        [*base, "train.steps=2"],
        [*base[:2], "train.freeze=[embed.weight, 'layers.0*']", "train.steps=3"],
        [*other, "train.steps=4"],
        [*other, "train.steps=4", "log.name=allowed"],
        [*other, "train.steps=5", "log.name=allowed"],
    ])[0]  # fmt: skip
    assert "bit for bit the same numbers" in found[1][0], "the same parameters in other words"
    assert "--allow-changed=train.freeze" in found[2][0]
    assert "6 more tensors are held still" in found[3][0], found[3][0]
    assert "6 are trained from here on, with moments as before their first" in found[3][0]
    state = json.loads((folder / "run/step-00000004/train_state.json").read_text())
    assert state["trained_since"] == {
        p.name: 3 for p in SPEC.parameters() if p.name.startswith("layers.0.")
    }
    step = read_manifest(folder / "run/step-00000004")
    assert "optimizer/master/layers.0.mlp.down.weight" in step.tensors
    assert "optimizer/master/layers.1.mlp.down.weight" not in step.tensors
    assert "error" not in found[4][0] and len(found[4][1]) == 5


def test_the_command_counts_and_refuses(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    status, said = command(folder, "train", "run.yaml", "--dry-run", FROZEN)
    assert status == 0 and "frozen      7 of 15 tensors" in said, said
    status, said = command(folder, "train", "run.yaml", "train.freeze=[layer.0.*]")
    assert status == 2 and said.startswith("error: train.freeze: layer.0.* is not a parameter"), (
        said
    )
    assert not (folder / "run").exists()
