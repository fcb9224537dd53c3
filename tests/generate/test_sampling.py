"""Filters and penalties are transformers'; draws follow the distribution and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bevatron.generate import sampling as module
from bevatron.generate.request import Sampling
from bevatron.generate.sampling import Chooser, choose, left_over, penalise, uniform

V = 500


def logits(rows: int = 6, width: float = 3.0, vocab: int = V) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * width


def theirs(scores: Tensor, s: Sampling) -> Tensor:
    ids = torch.zeros(len(scores), 1, dtype=torch.long)
    steps: list[Any] = [TemperatureLogitsWarper(s.temperature)]
    steps += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    for step in steps:
        scores = step(ids, scores)
    return scores


def ours(scores: Tensor, samplings: list[Sampling]) -> Tensor:
    kept, ids = left_over(scores, samplings)
    if ids is None:
        return kept
    return torch.full_like(scores, float("-inf")).scatter(1, ids, kept)


CASES = [
    Sampling(0.7),
    Sampling(1.5, top_k=1),
    Sampling(1.0, top_k=50),
    Sampling(1.0, top_k=V + 7),
    Sampling(1.0, top_p=0.9),
    Sampling(1.0, top_p=0.3),
    Sampling(2.0, top_p=0.999),
    Sampling(0.8, top_k=40, top_p=0.8),
    Sampling(1.0, min_p=0.05),
    Sampling(1.3, top_k=100, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("candidates", [2, 64, 256])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_filter_keeps_what_transformers_keeps(
    case: Sampling, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    scores = logits()
    expected, got = theirs(scores, case), ours(scores, [case] * len(scores))
    assert ((expected > float("-inf")) == (got > float("-inf"))).all()
    torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-4)


def test_rows_with_other_settings_do_not_disturb_each_other() -> None:
    scores = logits(len(CASES))
    together = ours(scores, CASES)
    for i, case in enumerate(CASES):
        expected = theirs(scores[i : i + 1], case)[0]
        torch.testing.assert_close(
            together[i].softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-4
        )


def test_top_k_keeps_all_that_are_equal() -> None:
    scores = torch.zeros(1, V)
    scores[0, :400] = 1.0
    case = Sampling(1.0, top_k=3)
    kept = (ours(scores, [case]) > float("-inf")).sum()
    assert kept == (theirs(scores, case) > float("-inf")).sum() == 400


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    prompt, new = [5, 5, 9, 400], [7, 9]
    chooser = Chooser(Sampling(repetition_penalty=1.7), prompt, V)
    for token in new:
        chooser.chose(token)
    scores = logits(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + new]), scores.clone())
    torch.testing.assert_close(penalise(scores.clone(), [chooser]), expected)


def test_frequency_presence_and_bias_are_those_of_openai() -> None:
    sampling = Sampling(frequency_penalty=0.3, presence_penalty=-0.2, logit_bias={9: 2.0, 11: -3.0})
    chooser = Chooser(sampling, [5, 7], V)
    for token in (7, 9, 7):
        chooser.chose(token)
    scores = logits(1)
    expected = scores.clone()
    expected[0, 7] -= 2 * 0.3 - 0.2
    expected[0, 9] -= 0.3 - 0.2
    expected[0, 9] += 2.0
    expected[0, 11] -= 3.0
    torch.testing.assert_close(penalise(scores.clone(), [chooser]), expected)


def test_draws_follow_the_distribution() -> None:
    scores = logits(1, 1.0, 12)
    for case in (Sampling(1.0, seed=1), Sampling(1.0, top_k=5, seed=2)):
        choosers = [Chooser(case, [0] * n, 12) for n in range(1, 4001)]
        seen = Counter(choose(scores.expand(4000, -1), choosers))
        expected = theirs(scores, case).softmax(-1)[0]
        for token in range(12):
            assert seen[token] / 4000 == pytest.approx(float(expected[token]), abs=0.03)
            assert expected[token] > 0 or seen[token] == 0


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    numbers = [uniform(seed, position) for seed in (0, 1, -1, 2**62) for position in range(500)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= u < 1 for u in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures_still_choose(temperature: float) -> None:
    scores = logits(1, 100.0)
    for sampling in (Sampling(temperature), Sampling(temperature, top_p=0.9, min_p=0.1)):
        token = choose(scores, [Chooser(sampling, [1], V)])[0]
        assert 0 <= token < V
        if temperature < 1:
            assert token == int(scores.argmax())
