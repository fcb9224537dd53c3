"""The feed of a run on its model's own answers: batches of rollouts, made between two steps.

All ranks make a batch of rollouts together. It serves one update, or several: a batch of
`steps_per_generation` times the global batch, every answer `num_iterations` times. What was
computed when it was made stays with it, whatever the updates since then. A batch that is not used
up is saved with the step.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bevatron.align.answering import Answering, Group, reward_names
from bevatron.align.environments import Environment
from bevatron.align.problems import Problem, Problems
from bevatron.align.reward_model import elsewhere
from bevatron.align.rewards import Rewards
from bevatron.align.rollout_files import write_rollouts
from bevatron.align.rollout_kind import RolloutKind
from bevatron.align.rollouts import Ask, Rollout, Sequences, length_of, sampled
from bevatron.align.turns import Turns
from bevatron.data.chat_examples import ChatExamples
from bevatron.data.permutation import Permutation, derive
from bevatron.errors import BevatronError
from bevatron.generate.live_engine import engine_bytes
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.feed import Batch, Batches, Feed, Memory
from bevatron.train.objectives import BLANK, Stored
from bevatron.train.run_start import Start, tokenizer_of
from bevatron.train.trainer import Trainer

SHUFFLE = 6  # tells the order of rollouts within a batch from other permutations


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
        self._answering: Answering | None = None

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
        rewards = ", ".join(reward_names(kind))
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
        self._answering = Answering(self.config, self.start, self.kind, trainer)

    @property
    def answering(self) -> Answering:
        assert self._answering is not None, "it is not bound"
        return self._answering

    def close(self) -> None:
        super().close()
        if self._answering is not None:
            self._answering.close()
        self._answering = None

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

    @abstractmethod
    def _make(self, step: int) -> dict[str, NDArray[Any]]:
        """A batch of rollouts as samples, `tokens` among them; it sets `reported` too."""

    def _answered(self, count: int, timer: Timer) -> list[Group]:
        """The next `count` problems with their answers and scores."""
        n = self.kind.num_generations
        problems, asks, self.cursor = self.answering.ask(self.training, self.cursor, count)
        many = [
            replace(ask, sampling=sampled(self.kind, self.seed, ask.position, i))
            for ask in asks
            for i in range(n)
        ]
        rollouts = self.answering.answer(many)
        timer.lap("rollout")
        scores = self.answering.score(problems, rollouts, n)
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

    def _sequences(self, rollouts: Sequence[Rollout]) -> Sequences:
        """As samples, which are as long as the longest of them needs."""
        longest, compiled = self.config.data.seq_len, self.config.train.compile
        length = length_of(rollouts, longest, self.trainer.layout, compiled)
        return Sequences.of(rollouts, length)

    def _write(
        self, step: int, groups: Sequence[Group], worth: list[float], found: list[float]
    ) -> None:
        """Rollouts to read, with what each answer was worth and its advantage."""
        if dist.get_rank() == 0:
            folder = Path(self.config.run.dir) / "rollouts"
            write_rollouts(folder, step + 1, groups, self.answering.names, worth, found)

    # --- validation -------------------------------------------------------------------------------

    @property
    def validation_samples(self) -> int:
        return len(self.validation)

    def _first(self, positions: range) -> int:
        """The position of the whole batch's first sample, of which these are this rank's."""
        return positions.start - self.dp_rank * len(positions)

    def _held_out(self, positions: range) -> tuple[list[Problem], list[Ask]]:
        """The problems of the whole batch, to be answered greedily by the model as it is now."""
        first, count = self._first(positions), len(positions) * self.dp
        self.answering.engine.refresh()
        count = min(count, len(self.validation) - first)
        problems, asks, _ = self.answering.ask(self.validation, first, count)
        return problems, asks

    def _own(self, rows: Batch, positions: range) -> Batch:
        """This rank's of a whole batch's samples; those behind the last problem are blank."""
        at, last = np.array(positions), len(self.validation) - 1
        mine = np.minimum(at, last) - self._first(positions)
        blank = at > last
        own = {name: array[mine] for name, array in rows.items()}
        return own | ({BLANK: blank} if blank.any() else {})

    # --- sizes ------------------------------------------------------------------------------------

    @property
    def _groups(self) -> int:
        answers = self.kind.steps_per_generation * self.global_batch * self.kind.sequences
        return answers // self.kind.num_generations

    def _rounds(self, steps: int) -> int:
        return -(-steps // self.kind.updates)


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
