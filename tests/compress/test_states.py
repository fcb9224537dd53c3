"""A student's hidden states are drawn to its teacher's as plain torch has it, at every layout."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.save_and_load import box_reader
from bevatron.compress.distill import Distill
from bevatron.compress.distill_states import EMBEDDING, PROJECTION, States, StatesLoss, states_sum
from bevatron.compress.logit_divergence import Divergence
from bevatron.errors import BevatronError
from bevatron.parallel.companion import Companion
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from bevatron.spec import MLP, Attention, LayerSpec
from bevatron.spec.json import to_json
from bevatron.spec.model import Norm
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.config_file import load_config, to_yaml
from bevatron.train.launch import layout_of, prepared, work
from bevatron.train.launch import train as launch
from bevatron.train.trainer import Trainer
from tests.compress.test_distill import STUDENT, TEACHERS, WIDER
from tests.compress.test_distill_command import CONFIG, teacher
from tests.data.test_store import write_store
from tests.processes import Pool
from tests.train.small_run import lines
from tests.train.test_head_objectives import theirs
from tests.train_steps import SEQ_LEN, samples

# As deep and as wide as the homogeneous teacher, as in Puzzle.
ALIKE = replace(WIDER, layers=(LayerSpec(Attention(4, 2, 8), MLP(20)),) * 4)
STUDENTS = {"smaller": STUDENT, "alike": ALIKE}
LOSSES = {
    "dynamic": StatesLoss({1: 2, EMBEDDING: EMBEDDING}, project=True),
    "mse": StatesLoss({2: 3, 0: 1}, "mse", 0.5, project=True),
    "gkd": StatesLoss({i: i for i in range(4)}, weight=1.0),
    "capped": StatesLoss({2: 2, EMBEDDING: EMBEDDING}, "mse", project=True),
}


@dataclass(frozen=True)
class Case:
    layout: Layout = field(default_factory=Layout)
    loss: str = "dynamic"
    teacher: str = "homogeneous"
    precision: str = "fp32"
    micro_batch: int = 2
    options: Divergence = field(default_factory=lambda: Divergence(temperature=1.5))


def make(case: Case) -> Trainer:
    device, loss = torch.device("cpu"), LOSSES[case.loss]
    student = STUDENTS["alike" if case.loss == "gkd" else "smaller"]
    spec = TEACHERS[case.teacher]
    states = States(loss, student, spec)
    trainer = Trainer(
        student,
        case.layout,
        mesh(case.layout, device),
        Distill(Companion(spec, None, seed=7, pairs=loss.pairs), case.options, states),
        seq_len=SEQ_LEN,
        train=TrainConfig(
            steps=3, global_batch=8, micro_batch=case.micro_batch, precision=case.precision
        ),
        optimizer=OptimizerConfig(lr=1e-2),
        device=device,
    )
    trainer.fill_random(seed=0)
    trainer.fill_companions()
    return trainer


def train(case: Case) -> list[list[float]]:
    """Loss, gradient norm and metrics of three updates, then of a validation batch."""
    trainer = make(case)
    out = []
    for step in range(3):
        loss, norm = trainer.step(samples(trainer, step), 3e-3, replay=step == 1)
        out.append([loss, norm, *trainer.reported.values()])
    for parameter in trainer.placed.added.values():
        copies = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, parameter.detach())
        assert all(torch.equal(copy, parameter) for copy in copies)
    sums, counts = trainer.evaluate(samples(trainer, 9))
    return [*out, list(trainer.objective.report(sums, counts).values())]


LAYOUTS = [
    Case(Layout(tp=2, pp=2), teacher="heterogeneous"),
    Case(Layout(dp_shard=2), "mse"),
    Case(Layout(pp=2, schedule="zbv"), "mse"),
]
MORE = [
    Case(Layout(tp=2)),
    Case(Layout(pp=2), "gkd"),
    Case(Layout(tp=2, pp=2, dp_shard=2), "gkd"),
    Case(Layout(tp=2, pp=2, dp_shard=2, split=(1, 2)), "dynamic", "heterogeneous"),
    Case(Layout(pp=2, schedule="gpipe"), "mse"),
    Case(Layout(pp=2, schedule="interleaved_1f1b"), "gkd"),
    Case(Layout(pp=2, schedule="interleaved_zero_bubble"), "gkd"),
    Case(Layout(pp=2, dp_shard=2, schedule="zbv"), "gkd"),
    Case(Layout(tp=2, sequence_parallel=False), "mse"),
    Case(Layout(dp_replicate=2, dp_shard=2, shard="gradients")),
    Case(Layout(cp=2), "capped", "capped"),
    Case(Layout(cp=2, pp=2), "dynamic"),
    Case(micro_batch=4),
]


@pytest.mark.parametrize(
    "case", [*LAYOUTS, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str
)
def test_every_layout_equals_one_process(pool: Pool, case: Case) -> None:
    expected = pool.run(1, train, replace(case, layout=Layout(), micro_batch=2))[0]
    loss, _, reported, kl, _, states, weight = expected[0]
    assert loss == reported == pytest.approx(1.5**2 * kl + weight * states) and states > 0.1
    if LOSSES[case.loss].weight is None:  # of the step before; of the first step, its own
        assert weight * states == pytest.approx(1.5**2 * kl, rel=1e-6)
        assert expected[1][-1] == weight
        assert expected[2][-1] == pytest.approx(1.5**2 * expected[1][3] / expected[1][5])
    for got in pool.run(case.layout.world_size, train, case):
        for step, (ours, wanted) in enumerate(zip(got, expected, strict=True)):
            # AdamW follows the sign of gradients that are noise, so later steps part a little.
            assert ours == pytest.approx(wanted, rel=5e-5 if step else 1e-5)


def beside_transformers(case: Case) -> list[tuple[float, float]]:
    """Ours and theirs: the loss, the gradient's norm, and the distance of the projection's
    gradient, of a step in our trainer and of a plain fp64 loop with two models of transformers."""
    trainer, loss = make(case), LOSSES[case.loss]
    teacher_placed = trainer.objective.companions["teacher"].placed

    def model(placed: object) -> torch.nn.Module:
        named = placed.stage.decoder.named_parameters()  # type: ignore[attr-defined]
        weights = {n: p.full_tensor().detach().clone() for n, p in named}
        return theirs(placed.spec, weights)[0].double()  # type: ignore[attr-defined]

    student, taught = model(trainer.placed), model(teacher_placed)
    batch = samples(trainer, 0)
    ids, eps = batch["tokens"][:, :-1], trainer.spec.norm.eps
    ours = student(ids, output_hidden_states=True)
    with torch.no_grad():
        theirs_ = taught(ids, output_hidden_states=True)
    tau = case.options.temperature
    s, t = ((x.logits / tau).flatten(0, 1).log_softmax(-1) for x in (ours, theirs_))
    logits = tau**2 * F.kl_div(s, t, log_target=True, reduction="batchmean")

    projection = trainer.taps.parameters.get(PROJECTION)
    matrix = None if projection is None else projection.detach().double().requires_grad_()
    states = torch.zeros((), dtype=torch.float64)
    for mine, other in loss.pairs.items():
        # The last of transformers' hidden states is behind the final norm: not one of the pairs.
        x, y = ours.hidden_states[mine + 1], theirs_.hidden_states[other + 1]
        x, y = (z / (z.square().mean(-1, keepdim=True) + eps).sqrt() for z in (x, y))
        x = x if matrix is None else x @ matrix.T
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        states += (1 - cosine).mean() if loss.kind == "cosine" else (x - y).square().mean()
    weight = loss.weight if loss.weight is not None else float(logits / states)
    whole = logits + weight * states
    whole.backward()
    grads = [p.grad for p in student.parameters()] + ([] if matrix is None else [matrix.grad])
    norm = torch.cat([g.flatten() for g in grads]).norm()

    seen: list[float] = []

    def look(loss: float, norm: float) -> bool:
        if projection is not None:
            seen.append(float((projection.grad - matrix.grad).norm() / matrix.grad.norm()))
        return False

    found, our_norm = trainer.step(batch, 0.0, look)
    return [(found, float(whole.detach())), (our_norm, float(norm)), *((x, 0.0) for x in seen)]


@pytest.mark.parametrize("loss", ["dynamic", "gkd", "mse"])
def test_loss_and_gradients_are_those_of_a_plain_loop_with_transformers(
    pool: Pool, loss: str
) -> None:
    """The states of all layers but the last, which transformers does not show."""
    found = pool.run(1, shown_by_transformers, loss)[0]
    assert len(found) == (2 if loss == "gkd" else 3)
    for ours, wanted in found:
        assert ours == pytest.approx(wanted, rel=2e-5, abs=1e-5)


def shown_by_transformers(loss: str) -> list[tuple[float, float]]:
    before = LOSSES[loss]
    shown = {a: b for a, b in before.pairs.items() if b < 3 and not (loss == "mse" and a == 2)}
    LOSSES[loss] = replace(before, pairs=shown)
    try:
        return beside_transformers(Case(loss=loss))
    finally:
        LOSSES[loss] = before


def in_bf16(case: Case) -> list[float]:
    trainer = make(case)
    loss, _ = trainer.step(samples(trainer, 0), 1e-3)
    assert all(p.dtype == torch.float32 for p in trainer.placed.added.values())
    return [loss, trainer.reported["states"]]


@pytest.mark.slow
def test_bf16_is_near(pool: Pool) -> None:
    exact = pool.run(1, in_bf16, Case())[0]
    for found in pool.run(2, in_bf16, Case(Layout(pp=2), precision="bf16")):
        assert found == pytest.approx(exact, rel=0.03)


def test_the_loss_knows_no_length_and_no_offset_of_a_layernorm() -> None:
    """A cosine is of directions; a LayerNorm takes the mean away besides."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 8, generator=g) for _ in range(2))
    rms, layer = Norm(), Norm("layernorm1p", 1e-5)
    alone = states_sum(x, y, None, "cosine", (rms, rms))
    near = {"rtol": 1e-4, "atol": 1e-4}
    found = states_sum(7 * x, 2 * y, None, "cosine", (rms, rms))
    torch.testing.assert_close(found, alone, **near)
    assert abs(states_sum(x + 3, y, None, "cosine", (rms, rms)) - alone) > 0.01
    alone = states_sum(x, y, None, "mse", (layer, layer))
    found = states_sum(5 * x + 3, y - 1, None, "mse", (layer, layer))
    torch.testing.assert_close(found, alone, **near)
    assert float(states_sum(x, 4 * x, None, "cosine", (rms, rms)).abs()) < 1e-5
    assert float(states_sum(x, 4 * x, None, "mse", (rms, rms)).abs()) < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("states")
    (made / "spec.json").write_text(to_json(STUDENT))
    source = random.Random(0)
    documents = [[source.randrange(101) for _ in range(40)] for _ in range(100)]
    write_store(made / "tokens", documents, 101)
    teacher(made / "teacher", num_hidden_layers=4)
    (made / "run.yaml").write_text(CONFIG.format(folder=made))
    return made


STATES = "objective.states={layers: {1: 2}, embedding: true}"


def run(folder: Path, name: str, *overrides: str) -> None:
    said = [STATES, f"run.dir={folder}/{name}", *overrides]
    config = load_config(folder / "run.yaml", said)
    work(config, layout_of(config, dist.get_world_size()), allow_changed=False)


def measured(folder: Path) -> list[list[float]]:
    names = ("loss", "kl", "states", "states_weight", "grad_norm", "val_loss", "val_states")
    return [[line[n] for n in names if n in line] for line in lines(folder)]


def test_a_run_resumes_with_its_projection_and_weight_at_any_layout(
    pool: Pool, folder: Path
) -> None:
    pool.run(1, run, folder, "whole")
    pool.run(1, run, folder, "same", "train.steps=2")
    pool.run(1, run, folder, "same")
    whole = measured(folder / "whole")
    assert len(whole) == 7 and measured(folder / "same") == whole
    pool.run(2, run, folder, "other", "train.steps=2", "parallel.pp=2")
    pool.run(2, run, folder, "other", "parallel.tp=2")
    for ours, wanted in zip(measured(folder / "other"), whole, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)

    step = folder / "other" / "step-00000004"
    manifest = read_manifest(step)
    added = sorted(name for name in manifest.tensors if "states" in name)
    assert added == [f"optimizer/{n}/{PROJECTION}" for n in ("exp_avg", "exp_avg_sq", "master")]
    assert all(len(manifest.tensors[name].chunks) == 1 for name in added)
    read = box_reader(step, manifest, "optimizer/")
    values = [
        box_reader(folder / n / step.name, read_manifest(folder / n / step.name), "optimizer/")(
            f"master/{PROJECTION}", (0, 0), (32, 16)
        )
        for n in ("whole", "other")
    ]
    torch.testing.assert_close(values[0], values[1], rtol=0.02, atol=2e-3)
    assert read(f"exp_avg_sq/{PROJECTION}", (0, 0), (32, 16)).count_nonzero() > 500
    state = json.loads((step / "train_state.json").read_text())
    assert state["objective"]["states_weight"] > 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.states={layers: all}", "the student has 3 layers and the teacher 4"),
        ("objective.states={layers: {3: 1}}", "names layer 3 of the student, which has layers 0"),
        ("objective.states={layers: {1: 4}}", "names layer 4 of the teacher, which has layers 0"),
        ("objective.states={loss: mse}", "names no states; give layers, as in {13: 29}"),
        ("objective.states={layers: {-1: 4}}", "objective.states.layers"),
        ("objective.states={embedding: true, project: false}", "states are 16 wide and the"),
        ("objective.states={embedding: true, weight: -1}", "objective.states.weight"),
        ("objective={name: pretrain, states: {embedding: true}}", "states means nothing to pretra"),
        ("objective={name: distill, logits: x, states: {embedding: true}}", "have no states"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_starts(
    folder: Path, override: str, said: str
) -> None:
    with pytest.raises(BevatronError) as refused:
        prepared(folder / "run.yaml", [override], 1)
    assert said in str(refused.value)


def test_pairs_of_layers_print_and_read_back(folder: Path) -> None:
    config = load_config(folder / "run.yaml", [STATES, "objective.states.weight=0.5"])
    assert config.objective.states is not None
    assert config.objective.states.layers == {"1": 2}
    (folder / "printed.yaml").write_text(to_yaml(config))
    assert load_config(folder / "printed.yaml", []) == config


def test_a_dry_run_has_room_for_the_projection(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its optimizer's state, on every rank."""
    sizes = []
    for overrides in ([], [STATES]):
        said = [*overrides, "parallel={tp: 2, pp: 2}"]
        launch(folder / "run.yaml", said, dry_run=True, paper_ranks=4, as_json=True)
        sizes.append([s["optimizer"] for s in json.loads(capsys.readouterr().out)["stages"]])
    assert [b - a for a, b in zip(*sizes, strict=True)] == [2 * 4 * 32 * 16] * 2


def test_a_validation_counts_every_state_once_whatever_the_batch(pool: Pool, folder: Path) -> None:
    """10 windows in batches of 8 (6 of 16 samples count for nothing) and of 2."""
    source = random.Random(1)
    write_store(folder / "ten", [[source.randrange(101) for _ in range(163)]], 101)
    held_out = [f"data.validation=[{{path: {folder}/ten}}]", "train.val_batches=null"]
    for batch in (8, 2):
        more = [*held_out, f"train.global_batch={batch}", "train.steps=1"]
        pool.run(1, run, folder, f"batch-{batch}", *more)
    eight, two = (lines(folder / f"batch-{batch}")[0] for batch in (8, 2))
    assert eight["step"] == two["step"] == 0 and eight["val_states"] > 0.1
    for name in ("val_loss", "val_kl", "val_states"):
        assert eight[name] == pytest.approx(two[name], rel=1e-5), name
