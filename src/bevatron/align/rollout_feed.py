"""The feed of reinforcement learning: problems, answers of the model as it is, rewards, advantages.

All ranks make a batch of rollouts together, between two steps. It serves one update, or several: a
batch of `steps_per_generation` times the global batch, every answer `num_iterations` times. What
was computed when it was made stays with it: the old log-probabilities are of the weights that
answered, whatever the updates since then. A batch that is not used up is saved with the step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bevatron.align.environments import Environment
from bevatron.align.policy import APART, RATIO, tries
from bevatron.align.policy_losses import RULES, advantages, group_std, importance_weights
from bevatron.align.problems import Problem, Problems
from bevatron.align.reference import NAME as REFERENCE
from bevatron.align.reward_model import Found, Judge, elsewhere
from bevatron.align.rewards import Answer, Rewards, weighted
from bevatron.align.rollout_files import write_rollouts
from bevatron.align.rollout_kind import PolicyKind, RolloutKind
from bevatron.align.rollouts import (
    Ask,
    Ends,
    Roll,
    Rollout,
    Sequences,
    differences,
    length_of,
    log_probabilities_of,
    sampled,
    single_turn,
)
from bevatron.align.turns import Turns
from bevatron.bridge.open_weights import Opened
from bevatron.chat.answer_parts import marker_tokens
from bevatron.checkpoint.manifest import Manifest
from bevatron.data.chat_examples import ChatExamples
from bevatron.data.permutation import Permutation, derive
from bevatron.errors import BevatronError, CheckFailed
from bevatron.generate.live_engine import LiveEngine, engine_bytes
from bevatron.generate.request import Sampling
from bevatron.generate.sampling_options import defaults_of
from bevatron.parallel.on_all_ranks import on_all
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.feed import Batch, Batches, Feed, Memory
from bevatron.train.objectives import BLANK, Stored
from bevatron.train.run_start import Start, tokenizer_of
from bevatron.train.trainer import Trainer

PATIENCE = 1000  # problems without room for an answer that are passed over for one batch
SHUFFLE = 6  # tells the order of rollouts within a batch from other permutations


@dataclass
class Group:
    """The answers to one prompt. `problem`: on rank 0 alone; `scores`: [answers, rewards]."""

    position: int
    problem: Problem | None
    rollouts: list[Rollout]
    scores: NDArray[np.float64]


@dataclass
class Timer:
    """Seconds by what they were spent on."""

    spent: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - self.since
        self.since = now


class RolloutFeed(Feed):
    """Raises BevatronError for settings that do not fit each other."""

    collective = True

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        *,
        global_batch: int,
        seed: int,
        dp_rank: int,
        dp: int,
        device: torch.device,
        batches: Batches | None = None,
    ) -> None:
        super().__init__(
            global_batch=global_batch, dp_rank=dp_rank, dp=dp, device=device, batches=batches
        )
        self.config, self.start, self.seed = config, start, seed
        self.kind = _kind(config)
        self.training = Problems.open(config, start)
        self.validation = Problems.open(config, start, validation=True)
        self.is_main = dist.get_rank() == 0
        self.cursor = 0  # of the next problem
        self.first = self.last = -1  # the steps that the rollouts were made for, and last used by
        self.made: dict[str, NDArray[Any]] = {}
        self.engine: LiveEngine | None = None
        self.rewards: Rewards | None = None
        self.judges: dict[int, Judge] = {}
        self.judged: dict[int, Found] = {}  # what they say of the answers that are scored
        self.environment: Environment | None = None  # on rank 0
        self.roll: Roll = single_turn

    @classmethod
    def open(
        cls,
        config: RunConfig,
        start: Start,
        *,
        stored: Stored | None,
        rounded: bool,
        **options: Any,
    ) -> Self:
        return cls(config, start, **options)

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        kind = _kind(config)
        Problems.open(config, start)
        Problems.open(config, start, validation=True)
        chats = ChatExamples.open(tokenizer_of(config, start))
        Rewards.open(kind.rewards, elsewhere(kind.rewards)).close()
        if kind.environment is not None:
            with Environment(kind.environment) as environment:
                Turns(kind.environment, chats, environment)

    @classmethod
    def memory(cls, config: RunConfig, spec: ModelSpec, rank: int, ranks: int) -> tuple[int, int]:
        """The engine's weights, and its cache when it is full."""
        engine = _kind(config).answers_on
        dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
        positions = engine.max_batch * config.data.seq_len
        size = engine.tp * engine.pp
        replicas = ranks // size if engine.replicas is None else engine.replicas
        if rank >= replicas * size:
            return 0, 0
        return engine_bytes(spec.base, engine.tp, engine.pp, rank % size, positions, dtype)

    @staticmethod
    def hash_of(path: str) -> str:
        return Problems.hash_of(path)

    def fingerprints(self) -> dict[str, str]:
        return self.training.fingerprints()

    def summary(self, steps: int) -> list[str]:
        kind, prompts = self.kind, self._groups
        rewards = ", ".join(self._reward_names)
        lines = [
            f"rollouts: {prompts:,} prompts x {kind.num_generations} answers of at most "
            f"{kind.max_completion_length:,} tokens, for {kind.updates:,} "
            f"update{'s' * (kind.updates > 1)}" + (f"; rewards: {rewards}" if rewards else "")
        ]
        cut = [
            f"{k} {v:g}"
            for k in ("top_p", "top_k", "min_p")
            if (v := getattr(kind, k)) not in (0, 1)
        ]
        if cut:
            lines.append(
                f"{', '.join(cut)}: answers are drawn from a part of the distribution, while "
                "log-probabilities are of the whole one"
            )
        return lines + self.training.summary(self._rounds(steps) * prompts)

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        if self.made:
            self.made = self._widened(self.made)
        engine = self.kind.answers_on
        self.engine = LiveEngine(
            trainer.placed,
            tp=engine.tp,
            pp=engine.pp,
            replicas=engine.replicas,
            origin=self._origin,
            max_batch=engine.max_batch,
            max_tokens=engine.max_batch * self.config.data.seq_len,
        )
        for name, companion in trainer.objective.companions.items():
            if isinstance(companion, Judge):
                self.judges[self._reward_names.index(name)] = companion
        on_all(self._open_rewards)
        if self.kind.environment is not None:
            self.roll = Turns(self.kind.environment, self._chats, self.environment)

    def close(self) -> None:
        super().close()
        if self.engine is not None:
            self.engine.close()
        if self.rewards is not None:
            self.rewards.close()
        if self.environment is not None:
            self.environment.close()
        self.engine = self.rewards = self.environment = None

    # --- what a step reads ------------------------------------------------------------------------

    def read_step(self, step: int) -> Batch:
        if not self.first <= step < self.first + self.kind.updates or not self.made:
            self.made = self._make(step)
            self.first = step
        self.last = step
        number = (step - self.first) % self.kind.steps_per_generation
        begin = number * self.global_batch + self.dp_rank * (self.global_batch // self.dp)
        rows = self._order[begin : begin + self.global_batch // self.dp]
        return {name: array[rows] for name, array in self.made.items()}

    def read_training(self, positions: range) -> Batch:
        raise NotImplementedError("rollouts are made for a step")

    def snapshot(self) -> Memory:
        """The next problem; and the rollouts, if steps after this one use them."""
        state = {"problems": self.cursor, "first": self.first, "updates": self.kind.updates}
        used_up = self.last + 1 >= self.first + self.kind.updates
        return state if used_up else {**state, **self.made}

    def restore(self, memory: Memory) -> None:
        self.cursor = int(memory.get("problems", 0))
        arrays = {k: v for k, v in memory.items() if isinstance(v, np.ndarray)}
        if arrays and memory.get("updates") == self.kind.updates:
            size = self.kind.steps_per_generation * self.global_batch
            if all(len(array) == size for array in arrays.values()):
                self.made, self.first = arrays, int(memory["first"])

    def _widened(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Restored samples, filled up to `data.seq_len` where they were made at a layout with other
        lengths."""
        length, seq_len = arrays["tokens"].shape[-1], self.config.data.seq_len
        layout = self.trainer.layout
        if length == seq_len or length % (2 * layout.cp * layout.tp) == 0:
            return arrays
        return {
            name: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, seq_len - length)])
            if a.ndim == arrays["tokens"].ndim
            else a
            for name, a in arrays.items()
        }

    @property
    def _order(self) -> NDArray[np.int64]:
        """Of the rollouts: over several steps the answers to a prompt are spread."""
        size = self.kind.steps_per_generation * self.global_batch
        order = np.arange(size)
        if self.kind.steps_per_generation == 1:
            return order
        return Permutation(size, derive(self.seed, SHUFFLE, self.first))(order)

    # --- making rollouts --------------------------------------------------------------------------

    def _make(self, step: int) -> dict[str, NDArray[Any]]:
        timer = Timer()
        assert self.engine is not None
        self.engine.refresh()
        timer.lap("rollout")
        groups = self._informative(timer)
        rollouts = [one for group in groups for one in group.rollouts]
        sequences = self._sequences(rollouts)
        kind, rule = self.kind, RULES["grpo"]
        scores = np.concatenate([group.scores for group in groups])
        total = torch.from_numpy(self._weighted(scores))
        reported = self._statistics(rollouts, scores, total)
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
        if self.is_main:
            folder = Path(self.config.run.dir) / "rollouts"
            names, values = self._reward_names, found.tolist()
            write_rollouts(folder, step + 1, groups, names, total.tolist(), values)
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
                total = torch.from_numpy(self._weighted(group.scores))
                varies = bool(group_std(total, len(total)) > 0)
                (good if varies or not self.kind.dynamic_sampling else flat).append(group)
            if len(good) == wanted:
                break
            if number < self.kind.dynamic_sampling:
                continue
            self._say(
                f"dynamic sampling: {len(good)} of {wanted} prompts have answers with different "
                f"rewards after {number + 1} batches; the others teach nothing in this one"
            )
        groups = good + flat[-(wanted - len(good)) :] if len(good) < wanted else good
        return sorted(groups, key=lambda group: group.position)

    def _answered(self, count: int, timer: Timer) -> list[Group]:
        """The next `count` problems with their answers and scores."""
        n = self.kind.num_generations
        problems, asks = self._asked(self.training, count)
        many = [
            replace(ask, sampling=sampled(self.kind, self.seed, ask.position, i))
            for ask in asks
            for i in range(n)
        ]
        rollouts = self._rolled(many)
        timer.lap("rollout")
        scores = self._scored(problems, rollouts, n)
        timer.lap("rewards")
        return [
            Group(
                ask.position,
                problems[i] if problems else None,
                rollouts[i * n : (i + 1) * n],
                scores[i * n : (i + 1) * n],
            )
            for i, ask in enumerate(asks)
        ]

    def _asked(self, source: Problems, count: int) -> tuple[list[Problem], list[Ask]]:
        """The next problems, on rank 0, and their prompts as tokens, on all ranks. Problems that
        leave no room for an answer are passed over, which is said."""
        problems: list[Problem] = []

        def ask() -> tuple[list[tuple[int, list[int]]], int] | None:
            if not self.is_main:
                return None
            found: list[tuple[int, list[int]]] = []
            at, long = self.cursor, 0
            while len(found) < count:
                problem = source[at]
                tools = self.roll.tools if isinstance(self.roll, Turns) else None
                ids = self._chats.prompt(problem.prompt, tools)
                if len(ids) < self.config.data.seq_len:
                    problems.append(problem)
                    found.append((at, ids))
                else:
                    long += 1
                at += 1
                if long > max(len(source), PATIENCE):
                    raise BevatronError(
                        f"data.seq_len {self.config.data.seq_len}: no prompt leaves room for an "
                        "answer; raise it"
                    )
            if long:
                self._say(
                    f"{long} problems are passed over: their prompts have data.seq_len "
                    f"{self.config.data.seq_len} tokens or more"
                )
            return found, at

        prompts, self.cursor = on_all(ask)[0]  # type: ignore[misc]
        known: list[Problem | None] = [*problems] if problems else [None] * len(prompts)
        return problems, [
            Ask(at, tuple(ids), Sampling(), problem)
            for (at, ids), problem in zip(prompts, known, strict=True)
        ]

    def _sequences(self, rollouts: Sequence[Rollout]) -> Sequences:
        """As samples, which are as long as the longest of them needs."""
        longest, compiled = self.config.data.seq_len, self.config.train.compile
        length = length_of(rollouts, longest, self.trainer.layout, compiled)
        return Sequences.of(rollouts, length)

    def _rolled(self, asks: Sequence[Ask]) -> list[Rollout]:
        assert self.engine is not None
        longest, seq_len = self.kind.max_completion_length, self.config.data.seq_len
        return self.roll(self.engine, asks, self._ends, longest, seq_len)

    def _scored(
        self, problems: Sequence[Problem], rollouts: Sequence[Rollout], each: int
    ) -> NDArray[np.float64]:
        """[rollouts, rewards], on all ranks; rank 0 scores, but for reward models, which all ranks
        compute. Each problem has `each` answers."""
        answers = [
            Answer(problem.row, problem.prompt, one.text, one.said, one.finished, one.messages)
            for i, one in enumerate(rollouts if self.is_main else ())
            for problem in [problems[i // each]]
        ]
        self.judged = {number: judge.scores(answers) for number, judge in self.judges.items()}

        def score() -> NDArray[np.float64] | None:
            if not self.is_main:
                return None
            assert self.rewards is not None
            found = self.rewards.score(answers)
            for note in [*self.rewards.notes(), *self._environments_notes()]:
                self._say(note)
            return found

        scores = on_all(score)[0]
        assert scores is not None
        return scores

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

    def _statistics(
        self, rollouts: Sequence[Rollout], scores: NDArray[np.float64], total: torch.Tensor
    ) -> dict[str, float]:
        """Under TRL's names."""
        lengths = np.array([len(one.said) for one in rollouts])
        ended = np.array([one.finished for one in rollouts])
        out = {"completions/mean_length": float(lengths.mean())}
        out |= {"completions/min_length": float(lengths.min())}
        out |= {"completions/max_length": float(lengths.max())}
        out["completions/clipped_ratio"] = 1 - float(ended.mean())
        if ended.any():
            out["completions/mean_terminated_length"] = float(lengths[ended].mean())
        for name, column in zip(self._reward_names, scores.T, strict=True):
            known = column[~np.isnan(column)]
            if known.size:
                out[f"rewards/{name}/mean"] = float(known.mean())
                out[f"rewards/{name}/std"] = float(known.std(ddof=1)) if known.size > 1 else 0.0
        known = total[~total.isnan()]
        if len(known):
            out["reward"] = float(known.mean())
            out["reward_std"] = float(known.std()) if len(known) > 1 else 0.0
        zero = group_std(total, self.kind.num_generations) == 0
        out["frac_reward_zero_std"] = float(zero.double().mean())
        return out

    # --- validation -------------------------------------------------------------------------------

    @property
    def validation_samples(self) -> int:
        return len(self.validation)

    def read_validation(self, positions: range) -> Batch:
        """A greedy answer to each problem, and sampled ones beside it for pass@k."""
        assert self.engine is not None
        n, k = len(positions), self.kind.num_generations_eval
        first = positions.start - self.dp_rank * n
        real = range(first, min(first + n * self.dp, len(self.validation)))
        self.engine.refresh()
        before, self.cursor = self.cursor, first
        try:
            problems, asks = self._asked(self.validation, len(real))
        finally:
            self.cursor = before
        rollouts = self._rolled([replace(ask, sampling=Sampling()) for ask in asks])
        scores = self._scored(problems, rollouts, 1)
        passes = (scores[:, :1] >= self.kind.solved_at).astype(np.float64)
        if k > 1:
            many = [
                replace(ask, sampling=sampled(self.kind, self.seed, ask.position, -1 - i))
                for ask in asks
                for i in range(k)
            ]
            drawn = self._scored(problems, self._rolled(many), k)[:, 0].reshape(len(real), k)
            solved = (drawn >= self.kind.solved_at).sum(1)
            passes = np.stack([passes[:, 0], *(pass_at(j, solved, k) for j in tries(k)[1:])], 1)
        sequences = self._sequences(rollouts)
        rewards = np.nan_to_num(self._weighted(scores))
        rows: Batch = {
            "tokens": sequences.tokens,
            "learned": sequences.learned,
            "reward": rewards.astype(np.float32),
            "passes": passes.astype(np.float32),
        }
        at = np.array(positions)
        blank = at >= len(self.validation)
        mine = {name: array[np.minimum(at - first, len(real) - 1)] for name, array in rows.items()}
        return mine | ({BLANK: blank} if blank.any() else {})

    # --- small things -----------------------------------------------------------------------------

    @property
    def _groups(self) -> int:
        answers = self.kind.steps_per_generation * self.global_batch * self.kind.sequences
        return answers // self.kind.num_generations

    def _rounds(self, steps: int) -> int:
        return -(-steps // self.kind.updates)

    @cached_property
    def _reward_names(self) -> list[str]:
        return Rewards(self.kind.rewards, elsewhere(self.kind.rewards)).names

    def _weighted(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return weighted(scores, np.array([c.weight for c in self.kind.rewards]))

    def _open_rewards(self) -> None:
        if self.is_main:
            outside = {number: partial(self._said, number) for number in self.judges}
            self.rewards = Rewards.open(self.kind.rewards, outside)
            if self.kind.environment is not None:
                self.environment = Environment(self.kind.environment)

    def _said(self, number: int, answers: Sequence[Answer]) -> Found:
        """What a reward model has said of these answers."""
        return self.judged[number]

    def _environments_notes(self) -> list[str]:
        """What went wrong in it since the last call."""
        if self.environment is None:
            return []
        out, self.environment.notes = self.environment.notes, []
        return out

    @cached_property
    def _chats(self) -> ChatExamples:
        return ChatExamples.open(tokenizer_of(self.config, self.start))

    @cached_property
    def _origin(self) -> Opened:
        """What the engine's tokenizer and stop tokens are of."""
        weights = self.start.weights
        if weights is not None and weights.tokenizer is not None:
            return weights
        source = ChatExamples.open(tokenizer_of(self.config, self.start)).tokenizer.file.parent
        nowhere = Manifest("", 0, {})
        return Opened(source, self.start.spec, nowhere, source, None, False, None)

    @cached_property
    def _ends(self) -> Ends:
        tokenizer = self._chats.tokenizer
        stops = defaults_of(self._origin).stop_tokens | {tokenizer.eos_id}
        tokens = frozenset(token for token in stops if token is not None)
        return Ends(tokens, tuple(self.kind.stop_strings), marker_tokens(tokenizer.encoder))

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


def pass_at(k: int, solved: NDArray[Any], n: int) -> NDArray[np.float64]:
    """Of problems of which `solved` [m] of n answers are right, the chance that one of k drawn ones
    is: 1 - C(n - solved, k) / C(n, k) (Chen et al., arXiv 2107.03374, equation 1)."""
    wrong = n - np.asarray(solved, dtype=np.float64)
    failed = np.ones_like(wrong)
    for i in range(k):
        failed *= np.clip(wrong - i, 0, None) / (n - i)
    return 1 - failed


def _kind(config: RunConfig) -> RolloutKind:
    """The objective's settings, checked against the batch."""
    kind = config.objective
    assert isinstance(kind, RolloutKind)
    size = kind.steps_per_generation * config.train.global_batch * kind.sequences
    if size % kind.num_generations:
        raise BevatronError(
            f"objective.num_generations: {kind.num_generations} does not divide the {size} answers "
            "of a batch of rollouts (train.global_batch x objective.steps_per_generation), so "
            "prompts would be left with fewer; change one of them"
        )
    if kind.max_completion_length >= config.data.seq_len:
        raise BevatronError(
            f"objective.max_completion_length: {kind.max_completion_length} leaves no room for a "
            f"prompt in data.seq_len {config.data.seq_len}, which holds both"
        )
    return kind
