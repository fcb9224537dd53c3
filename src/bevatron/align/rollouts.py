"""Rollouts: prompts, the engine's answers to them, and what the trainer thinks of these.

Everything here is collective: all ranks of the run call it together and get the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from bevatron.align.problems import Problem
from bevatron.align.rollout_kind import RolloutKind
from bevatron.align.sequences import labels_of
from bevatron.data.permutation import derive
from bevatron.generate.live_engine import LiveEngine
from bevatron.generate.request import LARGEST_SEED, Request, Sampling
from bevatron.parallel.companion import Companion
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.parallel.forward_pass import forward, log_probabilities_at, micro_batches
from bevatron.parallel.layout import Layout
from bevatron.train.trainer import Trainer

ANSWER = 5  # tells these draws from others of the same seed


@dataclass(frozen=True)
class Ask:
    """A prompt, as token ids, for one answer.

    Attributes:
        position: of the problem in its order.
        problem: on rank 0.
    """

    position: int
    ids: tuple[int, ...]
    sampling: Sampling
    problem: Problem | None = None


@dataclass(frozen=True)
class Rollout:
    """What became of an `Ask`.

    Attributes:
        ids: the prompt and all that follows it.
        learned: which of them the model itself said.
        logprobs: of what it said, by the engine, at the temperature; elsewhere 0.
        said: the tokens of the answer.
        text: of the answer, of several turns the last one's; finished: whether it ended by itself.
        messages: of several turns, all that follows the prompt.
    """

    ids: list[int]
    learned: list[bool]
    logprobs: list[float]
    said: list[int]
    text: str
    finished: bool
    messages: Sequence[Mapping[str, Any]] | None = None


class Ends(NamedTuple):
    """What ends an answer, and which special tokens stay in its text."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    kept: frozenset[int]


# (engine, asks, what ends an answer, most tokens of an answer, of a sequence) -> their rollouts
Roll = Callable[[LiveEngine, Sequence[Ask], Ends, int, int], list[Rollout]]


def sampled(kind: RolloutKind, seed: int, position: int, number: int) -> Sampling:
    """How answer `number` to the problem at this position is drawn: always in the same way."""
    drawn = derive(seed, ANSWER, position, number) & LARGEST_SEED
    return Sampling(kind.temperature, kind.top_k, kind.top_p, kind.min_p, seed=drawn)


def single_turn(
    engine: LiveEngine, asks: Sequence[Ask], ends: Ends, longest: int, seq_len: int
) -> list[Rollout]:
    """One answer to each prompt."""
    requests = [
        Request(
            ask.ids,
            min(longest, seq_len - len(ask.ids)),
            ask.sampling,
            ends.tokens,
            ends.strings,
            logprobs=0,
            tempered=True,
            kept_tokens=ends.kept,
        )
        for ask in asks
    ]
    out = []
    for ask, found in zip(asks, engine.complete(requests), strict=True):
        n, before = len(found.tokens), len(ask.ids)
        assert found.logprobs is not None
        out.append(
            Rollout(
                [*ask.ids, *found.tokens],
                [False] * before + [True] * n,
                [0.0] * before + [one.logprob for one in found.logprobs],
                found.tokens,
                found.text,
                found.finish_reason == "stop",
            )
        )
    return out


def length_of(rollouts: Sequence[Rollout], seq_len: int, layout: Layout, compiled: bool) -> int:
    """Of the samples that hold these: as long as the longest one, in steps of about a 64th of
    `seq_len` that the layout divides; of an eighth where a pipeline or compiled layers are made
    anew for each length."""
    unit = 2 * layout.cp * layout.tp  # each context-parallel rank has two runs of tokens
    lengths = 8 if layout.pp > 1 or compiled else 64
    step = unit * -(-seq_len // (lengths * unit))
    longest = max(len(one.ids) for one in rollouts)
    return min(seq_len, step * -(-longest // step))


class Sequences(NamedTuple):
    """Rollouts as arrays [n, T], padded at the end. `sampled`: the engine's log-probability of the
    token after each one, where that is learned, else 0."""

    tokens: NDArray[np.int64]
    learned: NDArray[np.bool_]
    sampled: NDArray[np.float32]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], seq_len: int) -> Sequences:
        shape = len(rollouts), seq_len
        tokens, learned = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        logprobs = np.zeros(shape, np.float32)
        for i, one in enumerate(rollouts):
            n = len(one.ids)
            tokens[i, :n], learned[i, :n] = one.ids, one.learned
            logprobs[i, : n - 1] = one.logprobs[1:]
        return cls(tokens, learned, logprobs)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Where `sampled` is of a token that is learned."""
        out = np.roll(self.learned, -1, axis=1)
        out[:, -1] = False
        return out


def log_probabilities_of(
    model: Trainer | Companion, trainer: Trainer, sequences: Sequences, temperature: float
) -> NDArray[np.float32]:
    """[n, T]: of the token after each one, where that is learned, else 0, under the trained model
    as it is now, by the forward that training has (in its dtype and at its layout), or under a
    companion that was placed to give them. Every data-parallel rank computes its part of the n."""
    placed, layout = trainer.placed, trainer.layout
    n = len(sequences.tokens) // layout.dp
    mine = slice(placed.dp_rank * n, (placed.dp_rank + 1) * n)
    tokens = torch.from_numpy(sequences.tokens[mine]).to(trainer.device)
    learned = torch.from_numpy(sequences.learned[mine]).to(trainer.device)
    at = torch.arange(tokens.shape[1], device=trainer.device).expand(tokens.shape)
    batch = {"labels": labels_of(tokens, learned), "at": at}
    if layout.cp > 1:
        tokens, batch = ContextParallel(trainer.mesh["cp"]).take(tokens, batch)
    places = batch.pop("at")[0]
    found: Tensor | None = None
    if isinstance(model, Companion):
        found = model.run(tokens, batch, "it").get("it")
        model.release()
    else:
        parts = micro_batches(tokens, batch, trainer.runner.micro_batch)
        ends = [one.end for one in forward(placed, parts, log_probabilities_at(temperature))]
        found = torch.cat(ends) if placed.is_last else None
    whole = torch.zeros(sequences.tokens.shape, device=trainer.device)
    if placed.reports:  # one rank for each token
        assert found is not None
        whole[mine, places] = found
    dist.all_reduce(whole)
    out: NDArray[np.float32] = whole.cpu().numpy()
    return out


def differences(
    old: NDArray[np.float32], sequences: Sequences
) -> tuple[dict[str, float], Tensor, Tensor]:
    """What the engine's and the trainer's log-probabilities of the same tokens differ by, under
    TRL's names and with an estimate (k3) of their KL; and both as tensors."""
    mask = sequences.mask
    apart = (old.astype(np.float64) - sequences.sampled)[mask]
    size = np.abs(apart) if apart.size else np.zeros(1)
    kl = np.expm1(apart) - apart if apart.size else np.zeros(1)
    found = {
        "sampling/sampling_logp_difference/mean": float(size.mean()),
        "sampling/sampling_logp_difference/max": float(size.max()),
        "sampling/kl": float(kl.mean()),
    }
    return found, torch.from_numpy(old), torch.from_numpy(sequences.sampled)
