"""On-policy distillation draws a student to its teacher where the student's own answers lead, at
every layout in the same way; its loss is that of TRL's GKDTrainer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bevatron.align.on_policy_distill import OnPolicyDistill
from bevatron.compress.logit_divergence import Divergence
from bevatron.errors import BevatronError
from bevatron.nn.rank_communication import LOCAL
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.parallel.companion import Companion
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.spec.json import to_json
from bevatron.train.config_file import load_config
from tests.align.rl_run import SPEC, lines, prepare_rl
from tests.processes import Pool
from tests.train.tiny_run import train

# Wider than the student (SPEC, whose second layer has no attention), and of one layer.
TEACHER = ModelSpec(300, 48, (LayerSpec(Attention(6, 2, 8), MLP(96)),))
OBJECTIVE = "objective={name: on_policy_distill, teacher: teacher, max_completion_length: 6%s}"
COMMON = ("data.seq_len=16", "train.steps=4", "checkpoint.every=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    """With a teacher that has learned its text a little."""
    folder = prepare_rl(tmp_path_factory.mktemp("distil") / "run")
    (folder / "teacher.json").write_text(to_json(TEACHER))
    taught = ("objective={name: pretrain}", "data={train: [{path: tokens}], seq_len: 16}")
    taught += ("model={spec: teacher.json}", "train.steps=30", "train.global_batch=16")
    pool.run(1, train, folder, *taught, "optimizer.lr=1.0e-2", "run.dir=teacher")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> list[dict[str, Any]]:
    """The run in one process."""
    pool.run(1, train, folder, OBJECTIVE % "", *COMMON, "run.dir=alone")
    return lines(folder / "alone")


def sampled(temperature: float) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Two answers, and both models' last hidden states and heads."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (2, 9), generator=g)
    learned = torch.zeros(2, 9, dtype=torch.bool)
    learned[0, 3:7] = learned[1, 5:] = True
    student, teacher = torch.randn(2, 9, 8, generator=g), torch.randn(2, 9, 12, generator=g)
    heads = torch.randn(40, 8, generator=g), torch.randn(40, 12, generator=g)
    return {"tokens": tokens, "learned": learned}, student, teacher, *heads


class Said(Companion):
    """A teacher whose states are given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(TEACHER, None)
        self.weight = weight

    def head(self) -> Tensor:
        return self.weight


@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.2)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_that_of_trl_on_the_tokens_that_the_student_said(
    kind: Any, beta: float, temperature: float
) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL (pip install trl)")
    samples, student, teacher, own, theirs = sampled(temperature)
    own.requires_grad_()
    share = beta if kind == "jsd" else 0.5
    objective = OnPolicyDistill(Said(theirs), Divergence(kind, temperature, mixture=share))
    ids, batch = objective.batch(samples)
    assert torch.equal(ids, samples["tokens"])
    (count,) = objective.count(batch)
    assert count == int(samples["learned"].sum()) == 8
    spec = ModelSpec(40, 8, SPEC.layers)
    compute = objective.compute(LOCAL, spec, {**batch, "teacher": teacher})
    sums = compute(student, own)
    (gradient,) = torch.autograd.grad(sums[0] / count, own)

    # In fp64, on the logits that predict the tokens which were said.
    labels = torch.where(samples["learned"], samples["tokens"], IGNORE)[:, 1:]
    other = own.detach().double().requires_grad_()
    logits = (student.double() @ other.T, teacher.double() @ theirs.double().T)
    wanted = gkd.GKDTrainer.generalized_jsd_loss(
        *(x[:, :-1] for x in logits), labels, beta, temperature, num_items_in_batch=count
    )
    assert float(sums[1].detach()) / count == pytest.approx(float(wanted.detach()), rel=1e-6)
    # TRL leaves out temperature^2, which keeps the gradient's size.
    (slope,) = torch.autograd.grad(wanted * temperature**2, other)
    assert float((gradient - slope).norm() / slope.norm()) < 5e-6, "fp32 beside fp64"
    said = logits[0][:, :-1].flatten(0, 1).detach()
    wanted = F.cross_entropy(said, labels.flatten(), reduction="sum")
    assert float(sums[2].detach()) == pytest.approx(float(wanted))


def test_the_student_improves_where_its_own_answers_lead(folder: Path, pool: Pool) -> None:
    more = ("train.steps=40", "train.global_batch=16", "checkpoint.every=0", "optimizer.lr=1.0e-2")
    pool.run(1, train, folder, OBJECTIVE % "", "data.seq_len=16", *more, "run.dir=learns")
    found = [line["kl"] for line in lines(folder / "learns")]
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:3]), found
    answers = (folder / "learns/rollouts/step-00000040.jsonl").read_text("utf-8").splitlines()
    assert len(answers) == 16 and json.loads(answers[0])["rewards"] == {}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, "{tp: 2}"), (2, "{pp: 2}"), (4, "{tp: 2, pp: 2}"), (4, "{cp: 2, dp_shard: 2}")],
)
def test_it_is_the_same_at_every_layout_and_after_a_restart(
    folder: Path, pool: Pool, alone: list[dict[str, Any]], ranks: int, layout: str
) -> None:
    name = "-".join(re.findall(r"\w+", layout))
    for steps in (2, 4):
        more = (f"parallel={layout}", f"run.dir={name}", f"train.steps={steps}")
        pool.run(ranks, train, folder, OBJECTIVE % "", *COMMON, *more)
    for got, wanted in zip(lines(folder / name), alone, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_likeliest_tokens_rewards_and_a_validation(
    folder: Path, pool: Pool, alone: list[dict[str, Any]]
) -> None:
    """Few of the teacher's tokens are nearly all; rewards are told and nothing is learned of them;
    a validation reads greedy answers."""
    rewards = "rewards: [{name: python, path: reward.py, function: even}]"
    for name, more in (("some", ", teacher_top_k: 200"), ("told", f", {rewards}")):
        data = "data.validation=[{path: problems.jsonl}]"
        pool.run(1, train, folder, OBJECTIVE % more, *COMMON, data, f"run.dir={name}")
    some, told = (lines(folder / name) for name in ("some", "told"))
    of_some, of_told, of_all = ([x["loss"] for x in f if "loss" in x] for f in (some, told, alone))
    assert of_told == of_all
    assert of_some[0] == pytest.approx(of_all[0], rel=1e-2) and of_some[0] != of_all[0]
    assert "reward" in told[1] and "reward" not in some[1]
    assert [x["step"] for x in told if "val_kl" in x] == [0, 4]


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    for objective, says in (
        ("{name: on_policy_distill}", "needs a teacher"),
        (
            "{name: on_policy_distill, teacher: teacher, importance_sampling_clip_max: 3.0}",
            "nothing to",
        ),
        ("{name: on_policy_distill, teacher: teacher, ce: 0.5}", "means nothing to"),
        ("{name: on_policy_distill, teacher: teacher, mixture: 1.0}", "mixture"),
    ):
        with pytest.raises(BevatronError) as caught:
            load_config(folder / "run.yaml", [f"objective={objective}"])
        assert says in str(caught.value), caught.value
