"""From problems to answers to scores: what a run asks its model, and what the answers are worth.

Everything here is collective: all ranks of the run call it together and get the same. Rank 0 alone
has the problems, scores the answers and hears of what went wrong, but for reward models, which all
ranks compute.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bevatron.align.environments import Environment
from bevatron.align.policy_losses import group_std
from bevatron.align.problems import Problem, Problems
from bevatron.align.reward_model import Found, Judge, elsewhere
from bevatron.align.rewards import Answer, Rewards, weighted
from bevatron.align.rollout_kind import RolloutKind
from bevatron.align.rollouts import Ask, Ends, Roll, Rollout, single_turn
from bevatron.align.turns import Turns
from bevatron.bridge.open_weights import Opened
from bevatron.chat.answer_parts import marker_tokens
from bevatron.checkpoint.manifest import Manifest
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from bevatron.generate.live_engine import LiveEngine
from bevatron.generate.request import Sampling
from bevatron.generate.sampling_options import defaults_of
from bevatron.parallel.on_all_ranks import on_all
from bevatron.train.config import RunConfig
from bevatron.train.run_start import Start, tokenizer_of
from bevatron.train.trainer import Trainer

PATIENCE = 1000  # problems without room for an answer that are passed over for one batch


@dataclass
class Group:
    """The answers to one prompt. `problem`: on rank 0 alone; `scores`: [answers, rewards]."""

    position: int
    problem: Problem | None
    rollouts: list[Rollout]
    scores: NDArray[np.float64]


class Answering:
    """A run's engine, its rewards and what answers back. Raises BevatronError, on all ranks, if
    one cannot be opened.

    Attributes:
        engine: it answers with the weights of its last `refresh`.
        names: of the rewards, each one once.
    """

    def __init__(
        self, config: RunConfig, start: Start, kind: RolloutKind, trainer: Trainer
    ) -> None:
        self.config, self.start, self.kind = config, start, kind
        self.is_main = dist.get_rank() == 0
        self.names = reward_names(kind)
        self.rewards: Rewards | None = None  # on rank 0, like the environment
        self.environment: Environment | None = None
        self.roll: Roll = single_turn
        self.judged: dict[int, Found] = {}  # what reward models say of the answers being scored
        engine = kind.answers_on
        self.engine = LiveEngine(
            trainer.placed,
            tp=engine.tp,
            pp=engine.pp,
            replicas=engine.replicas,
            origin=self._origin,
            max_batch=engine.max_batch,
            max_tokens=engine.max_batch * config.data.seq_len,
        )
        self.judges = {
            self.names.index(name): companion
            for name, companion in trainer.objective.companions.items()
            if isinstance(companion, Judge)
        }
        on_all(self._open_rewards)
        if kind.environment is not None:
            self.roll = Turns(kind.environment, self._chats, self.environment)

    def close(self) -> None:
        self.engine.close()
        if self.rewards is not None:
            self.rewards.close()
        if self.environment is not None:
            self.environment.close()

    def ask(self, source: Problems, first: int, count: int) -> tuple[list[Problem], list[Ask], int]:
        """`count` problems from position `first` on, on rank 0; their prompts as tokens, on all
        ranks; and the position behind them. Problems that leave no room for an answer are passed
        over, which is said."""
        problems: list[Problem] = []

        def prompts_of() -> tuple[list[tuple[int, list[int]]], int] | None:
            if not self.is_main:
                return None
            found: list[tuple[int, list[int]]] = []
            at, long = first, 0
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
                self.say(
                    f"{long} problems are passed over: their prompts have data.seq_len "
                    f"{self.config.data.seq_len} tokens or more"
                )
            return found, at

        prompts, behind = on_all(prompts_of)[0]  # type: ignore[misc]
        known: list[Problem | None] = [*problems] if problems else [None] * len(prompts)
        asks = [
            Ask(at, tuple(ids), Sampling(), problem)
            for (at, ids), problem in zip(prompts, known, strict=True)
        ]
        return problems, asks, behind

    def answer(self, asks: Sequence[Ask]) -> list[Rollout]:
        """The model's answers, in their order."""
        longest, seq_len = self.kind.max_completion_length, self.config.data.seq_len
        return self.roll(self.engine, asks, self._ends, longest, seq_len)

    def score(
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

        def here() -> NDArray[np.float64] | None:
            if not self.is_main:
                return None
            assert self.rewards is not None
            found = self.rewards.score(answers)
            for note in [*self.rewards.notes(), *self._environments_notes()]:
                self.say(note)
            return found

        scores = on_all(here)[0]
        assert scores is not None
        return scores

    def weighted(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each answer [n] is worth; NaN where nothing could score it."""
        return weighted(scores, np.array([c.weight for c in self.kind.rewards]))

    def statistics(
        self, rollouts: Sequence[Rollout], scores: NDArray[np.float64], total: torch.Tensor
    ) -> dict[str, float]:
        """Of a batch of answers and their scores [n, rewards] and worth [n], under TRL's names."""
        lengths = np.array([len(one.said) for one in rollouts])
        ended = np.array([one.finished for one in rollouts])
        out = {"completions/mean_length": float(lengths.mean())}
        out |= {"completions/min_length": float(lengths.min())}
        out |= {"completions/max_length": float(lengths.max())}
        out["completions/clipped_ratio"] = 1 - float(ended.mean())
        if ended.any():
            out["completions/mean_terminated_length"] = float(lengths[ended].mean())
        for name, column in zip(self.names, scores.T, strict=True):
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

    def say(self, text: str) -> None:
        """A line from the first rank."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

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


def reward_names(kind: RolloutKind) -> list[str]:
    """Of a run's rewards, each one once."""
    return Rewards(kind.rewards, elsewhere(kind.rewards)).names
