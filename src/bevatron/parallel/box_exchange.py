"""Moving boxes of live parameters in memory, from the ranks that hold them to those that need them.

`checkpoint.save_and_load.box_reader` does the same for the files of a checkpoint: it gives any box
of any parameter to a consumer with another layout (here, the engine inside a run). Parameters
travel in rounds of a bounded size, one all-to-all per round, in an order that all ranks know from
the start. A rank copies what it holds itself, values are cast before they are sent, and no rank
receives a box that it did not ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.checkpoint.rank_boxes import Box, box, local

Slices = tuple[slice, ...]
Held = Callable[[str, Slices], Tensor]  # name, part of what lies here of it -> its values
Want = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, offset, shape

ROUND = 128 << 20  # elements of the global parameters of a round, unless one alone is larger


@dataclass(frozen=True)
class _Piece:
    """Where two boxes of a parameter meet: `there` in what is held, `here` in what is wanted."""

    want: Want
    there: Slices
    here: Slices

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.there)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class _Round:
    """One exchange: what this rank sends to and gets from each other rank, in an order that both
    know; what it has itself; and what it wants in all. `crosses`: whether anything travels."""

    wants: list[Want] = field(default_factory=list)
    own: list[_Piece] = field(default_factory=list)
    sent: dict[int, list[_Piece]] = field(default_factory=dict)
    got: dict[int, list[_Piece]] = field(default_factory=dict)
    crosses: bool = False


class BoxExchange:
    """Gives each rank the boxes that it wants, as the parameters are when it asks. Collective to
    make, over all ranks of the default process group, as is every time that all are read.

    Memory, beside the boxes that are read: one round of what this rank wants, and of what others
    want of it, in `dtype`.

    Attributes:
        held: what is given of what this rank holds; the parameters' values, unless it is replaced.

    Args:
        parameters: what this rank holds, by name, as DTensors (or whole tensors).
        shapes: of all parameters of the model, in the order in which every rank will read them.
        wants: what this rank will read, every time.
        dtype, device: of what is read.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        wants: Sequence[Want],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parameters, self.dtype, self.device = parameters, dtype, device
        self.held: Held = self._held
        self.round_of = _rounds(shapes)
        self.rounds = [_Round() for _ in range(max(self.round_of.values(), default=-1) + 1)]
        self.next = 0  # the round that comes next
        self.arrived: dict[Want, Tensor] = {}
        held = {n: box(p) for n, p in parameters.items() if local(p).numel()}
        everyone: list[tuple[dict[str, Box], list[Want]]] = [({}, [])] * dist.get_world_size()
        dist.all_gather_object(everyone, (held, list(dict.fromkeys(wants))))
        self._plan(everyone)

    def _plan(self, everyone: Sequence[tuple[dict[str, Box], list[Want]]]) -> None:
        rank = dist.get_rank()
        holders: dict[str, dict[Box, list[int]]] = {}
        for holder, (held, _) in enumerate(everyone):
            for name, where in held.items():
                holders.setdefault(name, {}).setdefault(where, []).append(holder)
        mine, missing = everyone[rank][0], 0
        for target, (_, wants) in enumerate(everyone):
            for want in wants:
                name, *wanted = want
                turn = self.rounds[self.round_of[name]]
                if target == rank:
                    turn.wants.append(want)
                    boxes = holders.get(name, {})
                else:
                    boxes = {mine[name]: holders[name][mine[name]]} if name in mine else {}
                found = 0
                for where, ranks in boxes.items():
                    # Of equal copies: one's own, else each in turn.
                    source = target if target in ranks else ranks[target % len(ranks)]
                    piece = _meet(want, where, (wanted[0], wanted[1]))
                    if piece is None or rank not in (source, target):
                        continue
                    found += piece.numel
                    if source == target:
                        turn.own.append(piece)
                    elif source == rank:
                        turn.sent.setdefault(target, []).append(piece)
                    else:
                        turn.got.setdefault(source, []).append(piece)
                missing += target == rank and found < math.prod(wanted[1])
        facts = torch.tensor([missing, *(bool(r.sent) for r in self.rounds)], device=self.device)
        dist.all_reduce(facts, dist.ReduceOp.MAX)
        assert not facts[0], "a parameter is wanted of which no rank holds all"
        for turn, crosses in zip(self.rounds, facts[1:].tolist(), strict=True):
            turn.crosses = bool(crosses)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """One of the boxes that were announced: its values now, in memory of their own. In the
        order of the parameters; it waits for the ranks that send them."""
        while self.next <= self.round_of[name]:
            self._exchange()
        return self.arrived[name, offset, shape]

    def finish(self) -> None:
        """Take part in what other ranks still read; the next `read` begins anew. Every rank calls
        it, one that wants nothing calls it alone."""
        while self.next < len(self.rounds):
            self._exchange()
        self.next = 0
        self.arrived = {}

    def forget(self) -> None:
        """Give the parameters' own values again."""
        self.held = self._held

    @torch.no_grad()
    def _exchange(self) -> None:
        turn = self.rounds[self.next]
        self.next += 1
        self.arrived = {}  # of the round before: whoever wanted it has it
        new = {
            want: torch.empty(want[2], dtype=self.dtype, device=self.device) for want in turn.wants
        }
        for piece in turn.own:
            new[piece.want][piece.here] = self._values(piece)
        if turn.crosses:
            for piece, values in self._all_to_all(turn):
                new[piece.want][piece.here] = values
        self.arrived = new

    def _held(self, name: str, part: Slices) -> Tensor:
        return local(self.parameters[name].detach())[part]

    def _values(self, piece: _Piece) -> Tensor:
        return self.held(piece.want[0], piece.there).to(self.dtype)

    def _all_to_all(self, turn: _Round) -> Iterator[tuple[_Piece, Tensor]]:
        order = range(dist.get_world_size())
        out = [self._values(p).flatten() for rank in order for p in turn.sent.get(rank, ())]
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        sent = [self._bytes(turn.sent.get(rank, ())) for rank in order]
        got = [self._bytes(turn.got.get(rank, ())) for rank in order]
        send = torch.cat(out).view(torch.uint8) if out else nothing.view(torch.uint8)
        del out
        came = torch.empty(sum(got), dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(came, send, got, sent)
        flat, at = came.view(self.dtype), 0
        for rank in order:
            for piece in turn.got.get(rank, ()):
                yield piece, flat[at : at + piece.numel].view(piece.shape)
                at += piece.numel

    def _bytes(self, pieces: Sequence[_Piece]) -> int:
        return sum(piece.numel for piece in pieces) * self.dtype.itemsize


def _rounds(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Which round each parameter belongs to: as many in a row as ROUND holds."""
    rounds: dict[str, int] = {}
    number, size = 0, 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        if size and size + numel > ROUND:
            number, size = number + 1, 0
        rounds[name] = number
        size += numel
    return rounds


def _meet(want: Want, held: Box, wanted: Box) -> _Piece | None:
    there, here = [], []
    for a, n, b, m in zip(*held, *wanted, strict=True):
        first, last = max(a, b), min(a + n, b + m)
        if first >= last:
            return None
        there.append(slice(first - a, last - a))
        here.append(slice(first - b, last - b))
    return _Piece(want, tuple(there), tuple(here))
