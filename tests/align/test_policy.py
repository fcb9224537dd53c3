"""The policy objective: every loss is the same at every layout, with a reference beside it, at a
temperature, and when it is weighed; and it is TRL's on a real forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bevatron.align.policy import Policy, tries
from bevatron.align.policy_feed import pass_at
from bevatron.align.policy_losses import RULES
from bevatron.align.rollout_kind import PolicyKind
from bevatron.nn.rank_communication import LOCAL
from bevatron.parallel.companion import Companion
from bevatron.parallel.forward_pass import log_probabilities_at
from bevatron.parallel.layout import Layout
from bevatron.spec import ModelSpec
from bevatron.train.config_objective import kind_of
from bevatron.train.objectives import BLANK, Samples
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import ALL
from tests.train_steps import GLOBAL_BATCH, SEQ_LEN, Case, make_trainer

SPEC, TEMPERATURE = "heterogeneous", 0.7
NEAR = 1e-6  # TRL's head computes logits in fp32, whatever the model is in
Found = dict[str, tuple[float, float, dict[str, float]]]


def kind(**keys: Any) -> PolicyKind:
    made = kind_of({"name": "grpo", "rewards": [{"name": "exact_match"}], **keys})
    assert isinstance(made, PolicyKind)
    return made


def policy_samples(trainer: Trainer) -> Samples:
    """Answers of different lengths, one of which teaches nothing; this rank's part."""
    g = torch.Generator().manual_seed(0)
    shape = (GLOBAL_BATCH, SEQ_LEN)
    begin = torch.tensor([2, 3, 4, 5, 2, 7, 3, 1])[:, None]
    end = torch.tensor([15, 16, 9, 5, 12, 16, 4, 16])[:, None]
    at = torch.arange(SEQ_LEN)
    learned = (at >= begin) & (at < end)
    whole = {
        "tokens": torch.randint(trainer.spec.vocab_size, shape, generator=g),
        "learned": learned,
        "advantages": torch.randn(GLOBAL_BATCH, generator=g),
        "old": -4.5 + 0.3 * torch.randn(shape, generator=g),
        "importance": torch.rand(shape, generator=g) + 0.5,
    }
    return {k: v.chunk(trainer.layout.dp)[trainer.placed.dp_rank] for k, v in whole.items()}


def every_loss(layout: Layout) -> Found:
    """The loss, the gradient's norm and the metrics of a first step of each loss."""
    out: Found = {}
    for name in RULES:
        beta = 0.0 if name == "reinforce" else 0.1
        settings = kind(loss=name, beta=beta, temperature=TEMPERATURE, epsilon_high=0.3)
        asked = log_probabilities_at(TEMPERATURE)
        beside = {"reference": Companion(ALL[SPEC], None, 1, at_end=asked)} if beta else {}
        trainer = make_trainer(Case(SPEC, layout), Policy(settings, beside))
        trainer.fill_companions()
        step = trainer.step(policy_samples(trainer), 0.0)
        assert step is not None
        out[name] = *step, trainer.reported
    return out


@pytest.fixture(scope="module")
def alone(pool: Pool) -> Found:
    found: Found = pool.run(1, every_loss, Layout())[0]
    return found


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(cp=2, dp_shard=2)], ids=str)
def test_every_loss_is_the_same_at_every_layout(layout: Layout, pool: Pool, alone: Found) -> None:
    for got in pool.run(layout.world_size, every_loss, layout):
        for name, (loss, norm, metrics) in got.items():
            wanted = alone[name]
            assert (loss, norm) == pytest.approx(wanted[:2], rel=1e-5, abs=1e-6), name
            assert metrics == pytest.approx(wanted[2], rel=1e-4, abs=1e-6), name


def test_losses_differ_and_say_what_they_clip(alone: Found) -> None:
    losses = {name: round(loss, 5) for name, (loss, _, _) in alone.items()}
    assert losses["dapo"] == losses["bnpo"], "by definition, over a global batch"
    assert len(set(losses.values())) == len(losses) - 1
    for name, (_, _, metrics) in alone.items():
        assert ("kl" in metrics) == (name != "reinforce")
        clipped = metrics["clip_ratio/region_mean"]
        assert (clipped > 0) == (name != "reinforce"), name


def test_a_validation_reports_what_was_solved() -> None:
    objective = Policy(kind(num_generations_eval=4))
    n = 4
    samples = {
        "tokens": torch.zeros(n, SEQ_LEN, dtype=torch.int64),
        "learned": torch.ones(n, SEQ_LEN, dtype=torch.bool),
        "reward": torch.tensor([1.0, 0.5, 0.0, 9.0]),
        "passes": torch.tensor([[1, 1, 1], [0, 0.5, 1], [0, 0, 0], [9, 9, 9]]),
        BLANK: torch.tensor([False, False, False, True]),
    }
    _, batch = objective.batch(samples)
    sums = torch.zeros(objective.entries)
    sums[-5 - objective.largest : -objective.largest] = batch["found"].sum(0)
    assert int(batch["lengths"][3]) == 0
    found = objective.report(sums.double().numpy(), torch.tensor([1.0]).numpy())
    assert found == pytest.approx(
        {"loss": -0.5, "reward": 0.5, "pass@1": 1 / 3, "pass@2": 0.5, "pass@4": 2 / 3}
    )


def test_pass_at_k_counts_draws_without_putting_back() -> None:
    """Against all ways to draw."""
    from itertools import combinations

    assert tries(1) == [1] and tries(8) == [1, 2, 4, 8] and tries(6) == [1, 2, 4]
    n = 6
    for solved in range(n + 1):
        right = [i < solved for i in range(n)]
        for k in (1, 2, 4, 6):
            ways = [any(some) for some in combinations(right, k)]
            got = pass_at(k, torch.tensor([solved]).numpy(), n)
            assert got.tolist() == pytest.approx([sum(ways) / len(ways)])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rewards": []}, "rewards is empty"),
        ({"num_generations": 1}, "is a difference to other answers"),
        ({"loss": "reinforce", "num_iterations": 2}, "uses each answer once"),
        ({"loss": "reinforce", "beta": 0.1}, "has no term for a KL"),
        ({"reference": "a"}, "beta is 0, so nothing is compared"),
        ({"loss": "reinforce", "num_generations": 1, "dynamic_sampling": 1}, "at least 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**keys)


def test_the_objective_is_trls_on_a_real_forward() -> None:
    """On transformers' own Llama with TRL's head at a temperature, in fp64: log-probabilities as
    GRPOTrainer has them, put into its formula; the entropy; and gradients of all parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=4, **sizes))
    model = model.double()
    tokens = torch.randint(96, (4, SEQ_LEN))
    learned = torch.arange(SEQ_LEN) >= torch.tensor([3, 3, 5, 9])[:, None]
    advantages = torch.randn(4, dtype=torch.float64)
    ones = torch.ones(tokens.shape, dtype=torch.float64)
    objective = Policy(kind(loss="dapo", temperature=TEMPERATURE))
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    labels = tokens.masked_fill(~learned, -100)
    out = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    theirs, entropies, mask = out.log_probs, out.entropy, learned[:, 1:]
    theirs, entropies = (x[:, -mask.shape[1] :] for x in (theirs, entropies))
    old = theirs.detach() + 0.1 * torch.randn(theirs.shape)
    ratio, a = ((theirs - old) * mask).exp(), advantages[:, None]
    wanted = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    wanted = (wanted * mask).sum() / mask.sum()

    samples = {"tokens": tokens, "learned": learned, "advantages": advantages}
    samples |= {"importance": ones, "old": torch.nn.functional.pad(old, (0, 1))}
    ids, batch = objective.batch(samples)
    spec = ModelSpec(96, 32, ALL["homogeneous"].layers)
    hidden = model.model(ids).last_hidden_state
    sums = objective.compute(LOCAL, spec, batch)(hidden, model.lm_head.weight)
    found = sums[0] / objective.count(batch)[0]
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), abs=NEAR)
    entropy = float((entropies * mask).sum().detach())
    assert float(sums[2].detach()) == pytest.approx(entropy, rel=NEAR)
    parameters = list(model.parameters())
    mine, other = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (found, wanted))
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=NEAR)
