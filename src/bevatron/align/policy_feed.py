"""The feed of reinforcement learning: answers with their advantages and old log-probabilities.

Old log-probabilities are of the weights that answered, whatever the updates since then: they are
computed when the rollouts are made, unless the only update that these serve computes them itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bevatron.align.answering import Group
from bevatron.align.policy import APART, RATIO, tries
from bevatron.align.policy_losses import RULES, advantages, group_std, importance_weights
from bevatron.align.reference import NAME as REFERENCE
from bevatron.align.rollout_feed import RolloutFeed, Timer
from bevatron.align.rollout_kind import PolicyKind
from bevatron.align.rollouts import Sequences, differences, log_probabilities_of, sampled
from bevatron.errors import CheckFailed
from bevatron.train.feed import Batch


class PolicyFeed(RolloutFeed):
    """Samples: `tokens`, `learned` [n, T]; `advantages`, `rewards` [n]; and [n, T] either `old` and
    `importance`, or `sampled`, the engine's log-probabilities."""

    def _make(self, step: int) -> dict[str, NDArray[Any]]:
        timer = Timer()
        self.answering.engine.refresh()
        timer.lap("rollout")
        groups = self._informative(timer)
        rollouts = [one for group in groups for one in group.rollouts]
        sequences = self._sequences(rollouts)
        kind, rule = self.kind, RULES["grpo"]
        scores = np.concatenate([group.scores for group in groups])
        total = torch.from_numpy(self.answering.weighted(scores))
        reported = self.answering.statistics(rollouts, scores, total)
        old, policy = None, {"sampled": sequences.sampled}
        if not (isinstance(kind, PolicyKind) and kind.answered_by_update):
            timer.lap("rest")
            old = log_probabilities_of(self.trainer, self.trainer, sequences, kind.temperature)
            timer.lap("logps")
            weights, apart = self._compared(old, sequences)
            self.check_step(step, apart)
            reported |= apart
            policy = {"old": old, "importance": weights}
        scale, worth = None, total
        if isinstance(kind, PolicyKind):
            rule, scale = RULES[kind.loss], kind.scale_rewards
            if kind.loss == "rloo" and kind.beta:
                assert old is not None
                worth = total - kind.beta * self._log_ratios(old, sequences)
        found = advantages(worth, kind.num_generations, rule, scale)
        learned = sequences.learned
        if kind.mask_truncated_completions:
            learned = learned & np.array([one.finished for one in rollouts])[:, None]
        self._write(step, groups, total.tolist(), found.tolist())
        timer.lap("rest")
        reported |= {f"time/{k}_s": v for k, v in timer.spent.items() if k != "rest"}
        self.reported = reported
        return {
            "tokens": sequences.tokens,
            "learned": learned,
            "advantages": found.float().numpy(),
            "rewards": total.float().numpy(),
            **policy,
        }

    def _compared(
        self, old: NDArray[np.float32], sequences: Sequences
    ) -> tuple[NDArray[np.float32], dict[str, float]]:
        """Importance weights [n, T], and how engine and trainer differ."""
        apart, mine, theirs = differences(old, sequences)
        mask = torch.from_numpy(sequences.mask)
        weights = mask.float()
        if self.kind.importance_sampling_correction:
            mode, most = self.kind.importance_sampling_mode, self.kind.importance_sampling_clip_max
            weights = importance_weights(mine, theirs, mask, mode, most)
            inside = weights[mask] if mask.any() else torch.zeros(1)
            ends = {"min": inside.min(), "mean": inside.mean(), "max": inside.max()}
            apart |= {f"{RATIO}/{k}": float(v) for k, v in ends.items()}
        return weights.float().numpy(), apart

    def _informative(self, timer: Timer) -> list[Group]:
        """So many groups, in the order of their problems: if so configured, other problems in place
        of those whose answers all have the same reward."""
        wanted, good, flat = self._groups, list[Group](), list[Group]()
        for number in range(1 + self.kind.dynamic_sampling):
            for group in self._answered(wanted - len(good), timer):
                total = torch.from_numpy(self.answering.weighted(group.scores))
                varies = bool(group_std(total, len(total)) > 0)
                (good if varies or not self.kind.dynamic_sampling else flat).append(group)
            if len(good) == wanted:
                break
            if number < self.kind.dynamic_sampling:
                continue
            self.answering.say(
                f"dynamic sampling: {len(good)} of {wanted} prompts have answers with different "
                f"rewards after {number + 1} batches; the others teach nothing in this one"
            )
        groups = good + flat[-(wanted - len(good)) :] if len(good) < wanted else good
        return sorted(groups, key=lambda group: group.position)

    def _log_ratios(self, old: NDArray[np.float32], sequences: Sequences) -> torch.Tensor:
        """log p - log p_reference [n] of the answers, under the policy that gave them."""
        reference = self.trainer.objective.companions[REFERENCE]
        theirs = log_probabilities_of(
            reference, self.trainer, sequences, self.kind.temperature
        ).astype(np.float64)
        return torch.from_numpy((old - theirs).sum(1))

    def check_step(self, step: int, reported: Mapping[str, float]) -> None:
        """Raise CheckFailed if the engine and the trainer do not compute the same model."""
        most, mean = self.kind.max_logp_difference, reported.get(f"{APART}/mean")
        if most is not None and mean is not None and not mean <= most:
            raise CheckFailed(
                f"step {step + 1}: the engine's and the trainer's log-probabilities of the sampled "
                f"tokens differ by {mean:.3g} on average (at most "
                f"{reported[f'{APART}/max']:.3g}), more than "
                f"objective.max_logp_difference {most:g}; one of them computes another model. "
                "Try train.precision: fp32; if they still differ, please report it"
            )

    def read_validation(self, positions: range) -> Batch:
        """A greedy answer to each problem, and sampled ones beside it for pass@k."""
        k, answering = self.kind.num_generations_eval, self.answering
        problems, asks = self._held_out(positions)
        rollouts = answering.answer(asks)
        scores = answering.score(problems, rollouts, 1)
        passes = (scores[:, :1] >= self.kind.solved_at).astype(np.float64)
        if k > 1:
            many = [
                replace(ask, sampling=sampled(self.kind, self.seed, ask.position, -1 - i))
                for ask in asks
                for i in range(k)
            ]
            drawn = answering.score(problems, answering.answer(many), k)[:, 0].reshape(-1, k)
            solved = (drawn >= self.kind.solved_at).sum(1)
            passes = np.stack([passes[:, 0], *(pass_at(j, solved, k) for j in tries(k)[1:])], 1)
        sequences = self._sequences(rollouts)
        rewards = np.nan_to_num(answering.weighted(scores))
        rows: Batch = {
            "tokens": sequences.tokens,
            "learned": sequences.learned,
            "reward": rewards.astype(np.float32),
            "passes": passes.astype(np.float32),
        }
        return self._own(rows, positions)


def pass_at(k: int, solved: NDArray[Any], n: int) -> NDArray[np.float64]:
    """Of problems of which `solved` [m] of n answers are right, the chance that one of k drawn ones
    is: 1 - C(n - solved, k) / C(n, k) (Chen et al., arXiv 2107.03374, equation 1)."""
    wrong = n - np.asarray(solved, dtype=np.float64)
    failed = np.ones_like(wrong)
    for i in range(k):
        failed *= np.clip(wrong - i, 0, None) / (n - i)
    return 1 - failed
