"""Policy losses and advantages are those of TRL's own trainers, term by term, in fp64."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bevatron.align.policy_losses import (
    RULES,
    Clip,
    Correction,
    Rule,
    advantages,
    importance_weights,
    k3,
    mean_count,
    mean_sum,
    policy_terms,
)

B, T, LONGEST = 6, 7, 9
CLIP = Clip(0.2, 0.3)


def batch() -> dict[str, Tensor]:
    """Six answers, one of which is masked altogether, with ratios far inside and outside."""
    g = torch.Generator().manual_seed(0)

    def noise(width: float) -> Tensor:
        return width * torch.randn(B, T, generator=g, dtype=torch.float64)

    ours = -noise(1.0).abs()
    lengths = torch.tensor([7, 3, 5, 0, 1, 7])
    mask = torch.arange(T) < lengths[:, None]
    ours = torch.where(mask, ours, 0.0)

    def near(width: float) -> Tensor:
        return torch.where(mask, ours + noise(width), 0.0)

    return {
        "ours": ours.requires_grad_(),
        "old": near(0.3).detach(),
        "reference": near(0.5).detach(),
        "sampled": near(0.7).detach(),
        "mask": mask,
        "lengths": lengths,
        "advantage": torch.tensor([1.5, -0.5, -2.0, 1.0, 0.7, -0.1], dtype=torch.float64),
    }


def our_loss(rule: Rule, given: dict[str, Tensor], **options: Any) -> Tensor:
    ours, old, mask, lengths = (given[k] for k in ("ours", "old", "mask", "lengths"))
    terms = policy_terms(rule, ours, old, mask, given["advantage"], lengths, **options)
    return mean_sum(rule, terms.losses, mask, lengths) / mean_count(rule, lengths, LONGEST)


def trl_loss(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, list[float]]]:
    """What GRPOTrainer's own code makes of the same numbers, and what it reports."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = {"delta": None, "steps_per_generation": 1, "use_bias_correction_kl": True}
    trainer = {"beta": 0.0, "loss_type": "dapo", "importance_sampling_level": "token"}
    trainer |= {"epsilon_low": CLIP.low, "epsilon_high": CLIP.high, "use_vllm": False}
    args |= {k: options.pop(k) for k in list(options) if k in args}
    trainer |= options
    entropies = torch.zeros(B, T, dtype=torch.float64)
    metrics: Any = {"train": defaultdict(list)}
    stand_in: Any = SimpleNamespace(
        **trainer,
        args=SimpleNamespace(**args),
        accelerator=SimpleNamespace(
            reduce=lambda x, reduction: x, gather=lambda x: x, num_processes=1
        ),
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *a, **k: (given["ours"], entropies, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    mask = given["mask"].to(torch.int64)
    inputs: Any = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(B, T, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": given["advantage"],
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["reference"],
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": given.get("importance"),
    }
    return GRPOTrainer._compute_loss(stand_in, None, inputs), metrics["train"]


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("grpo", {}, {"loss_type": "grpo"}),
    ("dapo", {}, {"loss_type": "dapo"}),
    ("bnpo", {}, {"loss_type": "bnpo"}),
    ("dr_grpo", {}, {"loss_type": "dr_grpo"}),
    ("cispo", {"clip": Clip(0.2, 1.1)}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    ("gspo", {}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("dapo", {"clip": Clip(0.2, 0.3, dual=1.35)}, {"loss_type": "dapo", "delta": 1.35}),
    ("grpo", {"beta": 0.04}, {"loss_type": "grpo", "beta": 0.04}),
    (
        "dapo",
        {"beta": 0.04, "unbiased_kl": False},
        {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    ("gspo", {"beta": 0.04}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("dapo", {"importance": True, "beta": 0.1}, {"beta": 0.1, "use_vllm": True}),
]


@pytest.mark.parametrize(("name", "options", "theirs"), CASES)
def test_losses_and_gradients_are_trls(
    name: str, options: dict[str, Any], theirs: dict[str, Any]
) -> None:
    given = batch()
    options, theirs = dict(options), dict(theirs)
    if options.get("beta"):
        options["reference"] = given["reference"]
        theirs["beta"] = options["beta"]
    if options.pop("importance", False):
        weights = importance_weights(
            given["old"], given["sampled"], given["mask"], "token_truncate", 2.0
        )
        options["importance"] = given["importance"] = weights
    ours = our_loss(RULES[name], given, **{"clip": CLIP, **options})
    wanted, reported = trl_loss(given, **theirs)
    (mine,), (other,) = (torch.autograd.grad(x, given["ours"]) for x in (ours, wanted))
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    if name in ("grpo", "dapo") and "clip" not in options:
        mask, n = given["mask"], given["mask"].sum()
        arguments = (given[k] for k in ("ours", "old", "mask", "advantage", "lengths"))
        terms = policy_terms(RULES[name], *arguments, **{"clip": CLIP, **options})
        assert reported["clip_ratio/low_mean"] == [pytest.approx(float(terms.low.sum() / n))]
        assert reported["clip_ratio/high_mean"] == [pytest.approx(float(terms.high.sum() / n))]
        assert float(terms.low.sum()) and float(terms.high.sum()), "or nothing is compared"
        if "beta" in options:
            kl = float(torch.where(mask, terms.kl, 0.0).sum() / n)
            assert reported["kl"] == [pytest.approx(kl)]


def test_rloo_is_trls() -> None:
    from trl.trainer.rloo_trainer import RLOOTrainer

    given = batch()
    given["lengths"][3] = 2  # TRL's has no sequence without tokens
    given["mask"] = torch.arange(T) < given["lengths"][:, None]
    mask = given["mask"].to(torch.int64)
    stand_in: Any = SimpleNamespace(
        epsilon_low=CLIP.low,
        epsilon_high=CLIP.high,
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *a, **k: (given["ours"], mask, None),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs: Any = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "old_logps": (given["old"] * mask).sum(1),
        "advantages": given["advantage"],
    }
    wanted = RLOOTrainer._compute_loss(stand_in, None, inputs)
    ours = our_loss(RULES["rloo"], given, clip=CLIP)
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
    (mine,), (other,) = (torch.autograd.grad(x, given["ours"]) for x in (ours, wanted))
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_finite_differences(name: str) -> None:
    given = batch()
    # CISPO's weights have no gradient by definition: at the same ratio they are constants.
    old = given["old"] if name != "cispo" else given["ours"].detach()
    options: dict[str, Any] = {"beta": 0.1, "reference": given["reference"], "unbiased_kl": False}

    def loss(ours: Tensor) -> Tensor:
        return our_loss(RULES[name], {**given, "ours": ours, "old": old}, **options)

    if name == "cispo":
        weights = torch.ones_like(old)

        def loss(ours: Tensor) -> Tensor:
            plain = {**given, "ours": ours, "old": old}
            return our_loss(Rule(clip="none"), plain, importance=weights, **options)

        a = torch.autograd.grad(loss(given["ours"]), given["ours"])[0]
        full = our_loss(RULES[name], {**given, "old": old}, clip=Clip(0.2, 5.0), **options)
        torch.testing.assert_close(torch.autograd.grad(full, given["ours"])[0], a)
    assert torch.autograd.gradcheck(loss, (given["ours"],), atol=1e-7)


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("reinforce", "cispo")])
def test_the_first_loss_is_zero_and_its_gradient_is_not(name: str) -> None:
    """A ratio of 1 and advantages that add up to 0: users of all libraries ask about it."""
    given = batch()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    given["advantage"] = advantages(rewards, 3, RULES[name])
    given["old"] = given["ours"].detach()
    given["lengths"] = torch.full((B,), T)
    given["mask"] = torch.ones(B, T, dtype=torch.bool)
    loss = our_loss(RULES[name], given)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, given["ours"])[0].norm() > 0.01


@pytest.mark.parametrize("name", RULES)
def test_equal_rewards_have_no_gradient_at_all(name: str) -> None:
    given = batch()
    rewards = torch.tensor([0.1] * 3 + [0.7] * 3, dtype=torch.float64)
    given["advantage"] = advantages(rewards, 3, RULES[name])
    loss = our_loss(RULES[name], given)
    assert not torch.autograd.grad(loss, given["ours"])[0].any()


def trl_advantages(rewards: Tensor, size: int, scale: str) -> Tensor:
    """What GRPOTrainer makes of rewards [n], by its own code behind a generation that is none."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    n = len(rewards)
    anything: Any = defaultdict(list)
    anything["rewards"] = defaultdict(list)
    stand_in: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", process_index=0, gather=lambda x: x),
        model=SimpleNamespace(training=True),
        environment_factories=None,
        environments=None,
        tools=[],
        _generate=lambda prompts: ([[1]] * n, [[2]] * n, None, ["a"] * n, None, {}, None, None),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        args=SimpleNamespace(
            per_device_train_batch_size=n,
            gradient_checkpointing_kwargs=None,
            gradient_checkpointing=False,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        num_iterations=1,
        num_generations=size,
        use_vllm=False,
        beta=0.0,
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["r"],
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        _calculate_rewards=lambda *a: rewards[:, None],
        _metrics={"train": defaultdict(list)},
        _logs=anything,
        _pending_extra_logs={},
        _pending_metrics={},
        log_multimodal=False,
    )
    patches = pytest.MonkeyPatch()
    place = "trl.trainer.grpo_trainer."
    patches.setattr(f"{place}gather_object", lambda x: x)
    patches.setattr(f"{place}disable_gradient_checkpointing", lambda *a: torch.no_grad())
    with patches.context():
        inputs: Any = [{"prompt": "p"}] * n
        found = GRPOTrainer._generate_and_score_completions(stand_in, inputs)
    patches.undo()
    return found["advantages"]  # type: ignore[return-value]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale: Any) -> None:
    nan = math.nan
    rewards = torch.tensor([1, 0, 0, 1, 0.5, 0.5, 0.5, 0.5, nan, 2, 1, nan, nan, nan, nan, 1.0])
    rewards = rewards.double()
    wanted = trl_advantages(rewards, 4, scale)
    got = advantages(rewards, 4, RULES["grpo"], scale)
    # TRL's n / (n - 1) is an fp32 number.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)
    assert got[:4].abs().min() > 0.4 and not got[4:8].any() and not got[12:].any()


def test_the_baseline_of_rloo_is_the_others_mean() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 2.0, math.nan], dtype=torch.float64)
    got = advantages(rewards, 3, RULES["rloo"])
    wanted = [1.0, -0.5, -0.5, 3.0, -3.0, 0.0]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_importance_weights_are_bounded(mode: Correction) -> None:
    given, most = batch(), 1.4
    old, sampled, mask = given["old"], given["sampled"], given["mask"]
    got = importance_weights(old, sampled, mask, mode, most)
    raw = importance_weights(old, sampled, mask, mode, None)
    difference = (old - sampled) * mask
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True).expand(B, T)
    torch.testing.assert_close(raw[mask], difference.exp()[mask])
    beyond = raw > most
    assert beyond.any() and torch.equal(got[~beyond], raw[~beyond])
    assert set(got[beyond].tolist()) == {most if mode.endswith("truncate") else 0.0}


def test_k3_estimates_the_kl() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(20, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    assert float((p.exp() * k3(q, p)).sum()) == pytest.approx(float(exact), rel=1e-12)
    assert (k3(q, p) >= 0).all()
