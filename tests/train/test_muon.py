"""Muon is NanoChat's on every matrix of the layers, whatever is fused and however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from bevatron.checkpoint.rank_boxes import box, is_first_copy, local
from bevatron.parallel.layout import Layout
from bevatron.parallel.whole_tensors import Owners
from bevatron.spec import Attention
from bevatron.train.config import MuonConfig, OptimizerConfig
from bevatron.train.muon import momentum_at
from bevatron.train.optimizer_and_schedule import MATRICES, make_optimizer
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import ALL
from tests.train.test_resume import LARGE, SAVED_AT, resume, save_after, whole_run
from tests.train_steps import STEPS, Case, make_trainer, samples

# Between them: QKV cut by groups and, where TP does not divide the KV heads, along h; gate and up
# cut along f and along h; replicas; stages.
LAYOUTS = {
    "tp2": ("heterogeneous", Layout(tp=2)),
    "tp2-fsdp2": ("heterogeneous", Layout(tp=2, dp_shard=2)),
    "pp2": ("heterogeneous", Layout(pp=2)),
}
LONG = {
    "hsdp2x2": ("heterogeneous", Layout(dp_replicate=2, dp_shard=2)),
    "fsdp4": ("heterogeneous", Layout(dp_shard=4)),
    "tp4": ("homogeneous", Layout(tp=4)),
    "fsdp2": ("heterogeneous", Layout(dp_shard=2)),
    "tp4-nanochat": ("nanochat", Layout(tp=4)),
    "tp2-nemotron": ("nemotron", Layout(tp=2)),
    "fsdp4-nanochat": ("nanochat", Layout(dp_shard=4)),
    "hsdp2x2-tp2": ("heterogeneous", Layout(dp_replicate=2, dp_shard=2, tp=2)),
    "tp2-pp2-fsdp2": ("heterogeneous", Layout(tp=2, pp=2, dp_shard=2)),
    "tp4-fsdp2": ("homogeneous", Layout(tp=4, dp_shard=2)),
}

Part = tuple[tuple[int, ...], Any]


def train_and_state(case: Case) -> tuple[list[tuple[float, float]], dict[str, Part]]:
    """Loss and gradient norm of every step, and this rank's boxes of all that a save would hold."""
    trainer = make_trainer(case)
    history = [trainer.step(samples(trainer, s), 1e-2) for s in range(STEPS)]
    parts = {}
    for saved in trainer.to_save():
        if is_first_copy(saved.placed) and saved.values.numel():
            parts[saved.name] = (box(saved.placed)[0], saved.values.detach().numpy().copy())
    return history, parts


_reference: dict[str, tuple[list[tuple[float, float]], dict[str, Part]]] = {}


def check_layout(pool: Pool, spec: str, layout: Layout) -> None:
    if spec not in _reference:
        _reference[spec] = pool.run(1, train_and_state, Case(spec, optimizer="muon"))[0]
    expected, whole = _reference[spec]
    ranks = pool.run(
        layout.world_size, train_and_state, Case(spec, layout, micro_batch=1, optimizer="muon")
    )
    for history, _ in ranks:
        for step, (got, want) in enumerate(zip(history, expected, strict=True)):
            assert got == pytest.approx(want, rel=1e-5), f"step {step}"
    assert {name for _, parts in ranks for name in parts} == set(whole)
    covered = dict.fromkeys(whole, 0)
    for _, parts in ranks:
        for name, (offset, values) in parts.items():
            where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            covered[name] += values.size
            if name.endswith("qkv.bias"):
                continue  # no effect: its gradient is noise, whose sign AdamW follows
            expected_part = torch.from_numpy(whole[name][1][where])
            difference = (torch.from_numpy(values) - expected_part).norm()
            size = torch.from_numpy(whole[name][1]).norm()
            assert difference <= 1e-4 * size, f"{name}: {difference / size:.1e}"
    assert covered == {name: values.size for name, (_, values) in whole.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_changes_nothing(pool: Pool, name: str) -> None:
    """fp32, five steps: loss and gradient norm to 1e-5, weights and optimizer state to 1e-4."""
    check_layout(pool, *LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_the_layout_changes_nothing_in_the_long_run(pool: Pool, name: str) -> None:
    check_layout(pool, *LONG[name])


@pytest.mark.slow
def test_another_layout_continues_the_momentum(pool: Pool, tmp_path: Path) -> None:
    """Saved at TP2 x PP2 x FSDP2 as `optimizer/momentum/...`; momentum is still warming up."""
    case = Case("heterogeneous", optimizer="muon")
    expected = pool.run(1, whole_run, case)[0][SAVED_AT:]
    large = Case("heterogeneous", LARGE, optimizer="muon")
    pool.run(LARGE.world_size, save_after, large, tmp_path)
    for layout in (Layout(), Layout(tp=2, dp_shard=2)):
        got = pool.run(
            layout.world_size, resume, Case("heterogeneous", layout, optimizer="muon"), tmp_path
        )[0]
        for a, b in zip(got, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-5), str(layout)
    names = (tmp_path / f"step-{SAVED_AT:08d}" / "manifest.json").read_text(encoding="utf-8")
    assert "optimizer/momentum/layers.0.attention.qkv.weight" in names
    assert "optimizer/exp_avg/embed.weight" in names
    assert "optimizer/exp_avg/layers.0.attention.qkv.weight" not in names


def unfused(trainer: Trainer, name: str, tensor: Tensor) -> Iterator[Tensor]:
    """The matrices as NanoChat holds them, picked out row by row."""
    if name.endswith("qkv.weight"):
        attention = trainer.spec.layers[int(name.split(".")[1])].attention
        assert isinstance(attention, Attention)
        d, q = attention.head_dim, attention.queries_per_group
        rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for group in range(attention.num_key_value_heads):
            for head in range(q + 2):
                kind = "q" if head < q else "k" if head == q else "v"
                first = (group * (q + 2) + head) * d
                rows[kind] += [tensor[first + i] for i in range(d)]
        for kind in "qkv":
            yield torch.stack(rows[kind])
    elif name.endswith("gate_up.weight"):
        yield tensor[0]
        yield tensor[1]
    else:
        yield tensor


def nanochat_update(grad: Tensor, buffer: Tensor, momentum: float) -> Tensor:
    """nanochat/muon.py (October 2025), one matrix, in fp32: what is taken from it, times lr."""
    buffer.lerp_(grad, 1 - momentum)
    g = grad.lerp(buffer, momentum)
    x = g
    if g.size(-2) > g.size(-1):
        x = x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    if g.size(-2) > g.size(-1):
        x = x.mT
    return x * max(1, g.size(-2) / g.size(-1)) ** 0.5


def beside_references(spec: str, dtype: str, scale: str) -> dict[str, float]:
    """Three steps of a real model beside plain matrices with the same gradients. Returns for each
    reference the largest relative difference of a matrix's whole change."""
    trainer = make_trainer(Case(spec))
    decay, lr = 0.1, 0.02
    muon = MuonConfig(dtype=dtype, scale=scale, momentum_warmup=2)  # type: ignore[arg-type]
    config = OptimizerConfig(name="muon", lr=lr, weight_decay=decay, muon=muon)
    optimizer = make_optimizer(trainer.placed, config, torch.float32)
    roles = {p.name: p.role for p in trainer.spec.parameters()}
    names = [n for n, role in roles.items() if role in MATRICES]
    own = {n: local(trainer.placed.parameters[n].detach()) for n in names}
    before = {n: own[n].clone() for n in names}
    plain = {n: [m.clone() for m in unfused(trainer, n, own[n])] for n in names}
    buffers = {n: [torch.zeros_like(m) for m in plain[n]] for n in names}
    theirs = {n: [nn.Parameter(m.clone()) for m in plain[n]] for n in names}
    adjust = {"nanochat": "original", "moonshot": "match_rms_adamw"}[scale]
    torch_muon = torch.optim.Muon(
        [p for n in names for p in theirs[n]], lr=lr, weight_decay=decay, adjust_lr_fn=adjust
    )
    for step in range(3):
        ids, batch = trainer.objective.batch(samples(trainer, step))
        trainer.runner.step(ids, batch, torch.tensor([1.0 / trainer.objective.count(batch)[0]]))
        momentum = min(step / 2, 1) * 0.95 + (1 - min(step / 2, 1)) * 0.85
        for name in names:
            grads = unfused(trainer, name, local(trainer.placed.parameters[name].grad))
            for i, grad in enumerate(grads):
                update = nanochat_update(grad, buffers[name][i], momentum)
                if scale == "moonshot":
                    rows, columns = grad.shape
                    update = update / max(1, rows / columns) ** 0.5
                    update = update * 0.2 * max(rows, columns) ** 0.5
                plain[name][i].mul_(1 - lr * decay).sub_(lr * update)
                theirs[name][i].grad = grad.clone()
        torch_muon.param_groups[0]["momentum"] = momentum
        torch_muon.step()
        optimizer.step(lr)
    worst = {"nanochat": 0.0, "torch": 0.0}
    for name in names:
        starts = unfused(trainer, name, before[name])
        ours = unfused(trainer, name, own[name])
        for i, (start, end) in enumerate(zip(starts, ours, strict=True)):
            change = (end - start).norm()
            for key, other in (("nanochat", plain), ("torch", theirs)):
                difference = float((end - other[name][i].detach()).norm() / change)
                worst[key] = max(worst[key], difference)
    return worst


@pytest.mark.parametrize("spec", ["heterogeneous", "nanochat"])
@pytest.mark.parametrize("scale", ["nanochat", "moonshot"])
def test_every_matrix_moves_as_nanochats_and_as_torchs(pool: Pool, spec: str, scale: str) -> None:
    """On gradients of a real model. In fp32 as NanoChat's lines; in bf16, in which torch's always
    iterates, as torch's, but for the scale's rounding. (In bf16 the two are 3% apart from each
    other: torch and we round after whole products, NanoChat also between.)"""
    exact = pool.run(1, beside_references, spec, "fp32", scale)[0]
    rough = pool.run(1, beside_references, spec, "bf16", scale)[0]
    assert exact["nanochat"] < 1e-4
    assert rough["torch"] < 5e-3


def test_momentum_warms_up_as_nanochats() -> None:
    config = MuonConfig()
    for done in (0, 1, 150, 299, 300, 301, 5000):
        share = min(done / 300, 1)
        expected = (1 - share) * 0.85 + share * 0.95
        assert momentum_at(done + 1, config) == pytest.approx(expected, abs=1e-12)
    assert momentum_at(1, MuonConfig(momentum_warmup=0)) == 0.95


class Weights(nn.Module):
    """Shapes that nothing divides; more ranks than rows; one that FSDP cuts along its last
    dimension. The second numbers say where tensor parallelism cuts."""

    SHAPES = (((7, 5), 0), ((5, 7), 1), ((2, 5, 6), 1), ((9, 4), 1), ((3, 3), 0))

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, (shape, _) in enumerate(self.SHAPES):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape, generator=generator)))


def there_and_back(sizes: tuple[int, int]) -> list[int]:
    """Gathered tensors are the global ones and come back as they went; returns what this rank
    owned."""
    grid = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_shard", "tp"))
    module, whole = Weights(0), dict(Weights(0).named_parameters())
    if sizes[1] > 1:
        for name, (_, dim) in zip(whole, Weights.SHAPES, strict=True):
            cut = distribute_tensor(getattr(module, name).data, grid["tp"], [Shard(dim)])
            setattr(module, name, nn.Parameter(cut))
    fully_shard(
        module,
        mesh=grid["dp_shard"],
        shard_placement_fn=lambda p: Shard(2) if p.ndim == 3 else Shard(0),
    )
    parameters = dict(module.named_parameters())
    owners = Owners(list(parameters.values()), [float(p.numel()) for p in whole.values()], grid)
    parts = [local(p.detach()) for p in parameters.values()]
    gathered = owners.gather(parts)
    for number, tensor in gathered.items():
        assert torch.equal(tensor, list(whole.values())[number])
    back = owners.scatter(gathered, parts[0])
    assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))
    return sorted(gathered)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 2), (2, 2), (3, 2)], ids=str)
def test_every_tensor_has_one_owner_who_sees_it_whole(pool: Pool, sizes: tuple[int, int]) -> None:
    world = sizes[0] * sizes[1]
    owned = pool.run(world, there_and_back, sizes)
    assert sorted(number for rank in owned for number in rank) == list(range(len(Weights.SHAPES)))
    assert max(map(len, owned)) < len(Weights.SHAPES) or world == 1, "the work is shared out"


def adamw_beside_unfused(fused_lr: float) -> float:
    """Largest difference of a parameter from torch's plain AdamW after three real gradients."""
    trainer = make_trainer(Case("heterogeneous"))
    own = trainer.placed.parameters
    plain = {n: nn.Parameter(local(p.detach()).clone()) for n, p in own.items()}
    roles = {p.name: p.role for p in trainer.spec.parameters()}
    still = [p for n, p in plain.items() if roles[n] in ("norm", "embedding", "bias")]
    decayed = [p for n, p in plain.items() if roles[n] not in ("norm", "embedding", "bias")]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": still, "weight_decay": 0.0}],
        lr=fused_lr,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    for step in range(3):
        ids, batch = trainer.objective.batch(samples(trainer, step))
        trainer.runner.step(ids, batch, torch.tensor([1.0 / trainer.objective.count(batch)[0]]))
        for name, parameter in own.items():
            plain[name].grad = local(parameter.grad).clone()
        reference.step()
        trainer.optimizer.step(fused_lr)
    return max(float((local(p) - plain[n]).abs().max()) for n, p in own.items())


def test_the_fused_kernel_is_adamw(pool: Pool) -> None:
    """Steps are of size lr = 1e-2; a difference of 1e-7 is rounding."""
    assert pool.run(1, adamw_beside_unfused, 1e-2)[0] < 2e-7


@pytest.mark.parametrize("spec", ALL)
def test_every_parameter_has_a_rule(spec: str) -> None:
    """Matrices of layers and nothing else by Muon; the roles that decay are those not listed."""
    from bevatron.train.optimizer_and_schedule import groups

    config = OptimizerConfig(name="muon", lr=0.02, no_decay=["norm", "score"])
    model = ALL[spec]
    found = groups(model, config)
    assert sum(g.parameters for g in found) == sum(p.numel for p in model.parameters())
    by_role = {role: g.rule for g in found for role in g.roles}
    assert set(by_role) == {p.role for p in model.parameters()}
    for role, how in by_role.items():
        assert how.algorithm == ("muon" if role in MATRICES else "adamw")
        assert how.weight_decay == (0.0 if role in ("norm", "score") else 0.1)
    assert by_role["embedding"].lr_scale == (0.2 if model.tied else 10.0)
    assert by_role["qkv"].lr_scale == 1.0
    plain = groups(model, OptimizerConfig(lr=1e-3, lr_scale={"embedding": 3.0}))
    by_role = {role: g.rule for g in plain for role in g.roles}
    assert {r: how.lr_scale for r, how in by_role.items() if how.lr_scale != 1} == {
        "embedding": 3.0
    }
    assert not any(by_role[r].weight_decay for r in by_role if r in ("norm", "embedding", "bias"))
