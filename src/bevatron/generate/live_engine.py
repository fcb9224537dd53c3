"""The engine inside a run: answers from the parameters that are being trained, between two steps.

Reinforcement learning with verifiable rewards needs this. All ranks of the run make one
`LiveEngine` together, at a layout of its own, and call every method together:

    rollouts = LiveEngine(trainer.placed, tp=2, origin=origin)
    for number in range(steps):
        rollouts.refresh()                     # the weights as the last step left them
        answers = rollouts.complete(requests)  # the same list on every rank, in their order
        trainer.step(samples_of(answers), lr)
    rollouts.close()

The run's processes, in the order of their ranks, form teams of tp * pp processes. Each team holds a
whole model and is one replica; a rank that is left over takes no part in answering. Weights move in
memory from the boxes that the trainer's ranks hold, at whatever layout, to the boxes that the
engine's ranks need (see `BoxExchange`). No files are written, and no rank holds more of the model
than its team's layout says. A rank receives the engine's weights into the same memory every time,
and this memory stays allocated beside the trained parameters; the KV cache is freed when answering
ends. The engine's weights have the run's dtype, in which a step's weights are saved. So the answers
are those of the checkpoint that the run would save now, opened by `Engine.open` at the same layout.

A request with `logprobs=0` reports the log-probability of each token of its answer, under the model
and before temperature. Other requests in the batch change this number by rounding alone. A training
forward rounds differently: its log-probabilities agree closely, not exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.manifest import Manifest
from bevatron.errors import BevatronError, failed, failure
from bevatron.generate.decoding_model import Model
from bevatron.generate.decoding_weights import Reader
from bevatron.generate.detokenize import Vocabulary
from bevatron.generate.engine import Engine, vocabulary_of
from bevatron.generate.engine_processes import (
    Group,
    LeadingGroup,
    check_layout,
    follow,
    lost_another,
    share_of,
)
from bevatron.generate.engine_ranks import LONG, share_world
from bevatron.generate.request import Generation, Loglikelihood, Request
from bevatron.parallel.adapter_weights import MergedWeights
from bevatron.parallel.box_exchange import BoxExchange, Want
from bevatron.parallel.placement import Placed
from bevatron.spec import ModelSpec

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Problem:
    """What went wrong on a rank. `effect`: because another one failed; `fatal`: to the engine."""

    message: str
    status: int
    effect: bool
    fatal: bool

    @staticmethod
    def of(error: BaseException, fatal: bool) -> Problem:
        found = failure(error)
        return Problem(str(found), found.exit_status, lost_another(error), fatal)


QUEUE = 4096  # requests that may wait in a team, where they are submitted one by one


class LiveEngine:
    """An engine on the ranks of a run. Collective to make; it begins with the weights as they are.

    Attributes:
        replicas: teams that answer; replica: this rank's, or None if it is left over.

    Args:
        placed: the model, trained or frozen.
        tp, pp: ranks that share the model, in each team.
        replicas: as many as the ranks are enough for, if absent.
        origin: where the run's model came from: its tokenizer, stop tokens and sampling. Without
            one, token ids go in and out, and nothing but a request's own stop tokens ends it.
        max_batch, max_tokens: of each team, as for `Engine.open`.
    Raises BevatronError, on all ranks, for a layout that the model or the ranks do not allow.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        tp: int = 1,
        pp: int = 1,
        replicas: int | None = None,
        origin: Opened | None = None,
        max_batch: int = 32,
        max_tokens: int | None = None,
    ) -> None:
        spec, dtype, device = placed.spec.base, placed.dtype, placed.device
        self.placed = placed
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for name, value in (("tp", tp), ("pp", pp), ("max_batch", max_batch)):
            if value < 1:
                raise BevatronError(f"the engine's {name} is {value}, expected at least 1")
        check_layout(spec, "the engine's model", tp, pp)
        self.team = tp * pp
        self.replicas = ranks // self.team if replicas is None else replicas
        if self.team > ranks:
            raise BevatronError(
                f"the engine's tp {tp} x pp {pp} needs {self.team} processes, the run has {ranks}; "
                "use a smaller tp or pp, or more processes"
            )
        if not 1 <= self.replicas <= ranks // self.team:
            raise BevatronError(
                f"the engine has {self.replicas} replicas of tp {tp} x pp {pp}, the run has "
                f"{ranks} processes; use from 1 to {ranks // self.team} replicas, or a smaller "
                "tp or pp"
            )
        nowhere = Opened(Path("this run"), spec, Manifest("", 0, {}), None, None, False, None)
        self.opened = replace(origin, spec=spec) if origin is not None else nowhere
        self.device, self.max_batch, self.max_tokens = device, max_batch, max_tokens
        self._meeting: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=LONG)
        self._ranks = share_world(tp, pp, self.replicas)
        self.replica = None if self._ranks is None else rank // self.team
        self._vocabulary: Vocabulary | None = None
        self._over: str | None = None
        self._model: Model | None = None
        wants: list[Want] = []
        self._reader: Reader | None = None
        if self._ranks is not None:
            share = share_of(spec, tp, pp, rank % self.team)

            def announced(*want: *Want) -> Tensor:
                wants.append(want)
                return torch.empty(want[2], dtype=dtype, device="meta")

            Reader(spec, share, announced, dtype, torch.device("meta"), batches=False).model()
        shapes = {p.name: p.shape for p in spec.parameters()}
        self._exchange = BoxExchange(placed.parameters, shapes, wants, dtype, device)
        if self._ranks is not None:
            batches = max_batch > 1
            self._reader = Reader(spec, share, self._exchange.read, dtype, device, batches=batches)
        self.refresh()

    def __enter__(self) -> LiveEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its team, which is the one that takes requests."""
        return self.replica is not None and dist.get_rank() % self.team == 0

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the parameters as they are now, with an adapter merged in. Collective; raises on all
        ranks if one fails."""
        self._check()
        if self.placed.spec.adapter is not None:
            self._exchange.held = MergedWeights(self.placed).values
        problem = None
        try:
            if self._reader is not None:
                weights = self._reader.model()
                if self._model is None:
                    assert self._ranks is not None
                    self._model = Model(self.opened.spec, weights, self._ranks, self.device)
                self._model.weights = weights
        except Exception as error:
            problem = Problem.of(error, fatal=True)
        self._exchange.finish()  # others may still be reading
        self._exchange.forget()
        self._agree(problem)

    def complete(self, requests: Sequence[Request]) -> list[Generation]:
        """The answers to these, in their order, on all ranks; all ranks pass the same requests. The
        teams share them out."""
        return self._shared(requests, lambda engine, mine: engine.complete(mine))

    def loglikelihoods(self, sequences: Sequence[Sequence[int]]) -> list[Loglikelihood]:
        """Of every next token of each sequence, as `complete` does it."""
        return self._shared(sequences, lambda engine, mine: engine.loglikelihoods(mine))

    def _shared(self, items: Sequence[T], act: Callable[[Engine, Sequence[T]], list[R]]) -> list[R]:
        n = self.replicas
        found = self.run(lambda engine, replica: act(engine, items[replica::n]))
        return [found[i % n][i // n] for i in range(len(items))]

    def run(self, act: Callable[[Engine, int], T]) -> list[T]:
        """Let the first rank of each team do something with its engine, such as streaming answers
        or asking again for what a tool said, while its other ranks compute along.

        Collective. `act` gets the engine, which ends with it, and the number of the replica. What
        it returns for each replica is returned on all ranks, so that must be small, and picklable.
        If it or anything else fails on one rank, all ranks raise that rank's message; after a
        failure of `act` alone the engine can go on."""
        self._check()
        result: list[T] = []
        problem: Problem | None = None
        group: Group | None = None
        try:
            if self.leads:
                group = self._group()
                result = [self._led(group, act)]
            elif self._model is not None:
                follow(self._model)
        except Exception as error:
            stopped = None if group is None else group.error
            problem = Problem.of(stopped or error, group is None or stopped is not None)
        if problem is not None and problem.fatal:
            self._break(problem)
        if self._model is not None:
            self._model.release()
        self._agree(problem)
        out = []
        for replica in range(self.replicas):
            parcel = [result[0] if result and self.replica == replica else None]
            dist.broadcast_object_list(parcel, replica * self.team, group=self._meeting)
            out.append(parcel[0])
        return out  # type: ignore[return-value]

    def close(self) -> None:
        """Give back all memory and connections; the run goes on. Every rank calls it."""
        self._over = self._over or "the engine is closed"
        if self._ranks is not None:
            self._ranks.abandon()
        if self._meeting is not None:
            dist.destroy_process_group(self._meeting)
        self._model = self._reader = self._meeting = None

    def _group(self) -> Group:
        assert self._model is not None
        return Group(self._model) if self.team == 1 else LeadingGroup(self._model)

    def _led(self, group: Group, act: Callable[[Engine, int], T]) -> T:
        assert self.replica is not None
        try:
            if self._vocabulary is None:
                self._vocabulary = vocabulary_of(self.opened)
            engine = Engine(
                self.opened,
                group,
                max_batch=self.max_batch,
                max_tokens=self.max_tokens,
                queue=QUEUE,
                vocabulary=self._vocabulary,
            )
        except BaseException:
            group.close()
            raise
        with engine:
            result = act(engine, self.replica)
        if engine.failure is not None:
            raise BevatronError(engine.failure)
        return result

    def _break(self, problem: Problem) -> None:
        """After a failure in the middle of a step: the rest of the team may wait for this rank, and
        gets to know by the end of the connections."""
        if self.device.type != "cpu" and self.team > 1:
            # Not every backend notices. The end of this process is the end of the others.
            raise failed(problem.message, problem.status)
        if self._ranks is not None:
            self._ranks.abandon()

    def _check(self) -> None:
        if self._over is not None:
            raise BevatronError(f"{self._over}; make another one")

    def _agree(self, problem: Problem | None) -> None:
        """Raise what went wrong on any rank, on all of them: the cause before its effects."""
        problems: list[Problem | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self._meeting)
        if found := sorted((p for p in problems if p is not None), key=lambda p: p.effect):
            if any(p.fatal for p in found):
                self._over = "the engine failed"
            raise failed(found[0].message, found[0].status)


def engine_bytes(
    spec: ModelSpec, tp: int, pp: int, rank: int, positions: int, dtype: torch.dtype
) -> tuple[int, int]:
    """What one rank of a team holds: its weights, and a cache of so many positions. Exact."""
    share, wants = share_of(spec, tp, pp, rank), list[Want]()

    def announced(*want: *Want) -> Tensor:
        wants.append(want)
        return torch.empty(want[2], dtype=dtype, device="meta")

    Reader(spec, share, announced, dtype, torch.device("meta"), batches=False).model()
    present = [sublayer for i in share.layers for _, sublayer in spec.layers[i].present]
    each = sum(sublayer.cache_bytes(dtype.itemsize, tp) for sublayer in present)
    weights = sum(math.prod(shape) for _, _, shape in wants)
    return weights * dtype.itemsize, positions * each
