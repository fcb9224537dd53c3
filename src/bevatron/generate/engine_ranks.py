"""What the processes that share a model send to one another. A single process sends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from bevatron.generate.engine_step import Output, Scores, Step
from bevatron.spec.sublayer import cut_range

LONG = timedelta(days=365)  # a server may be idle for as long as it likes
FIRST = 1024  # bytes of the first message of a command; a longer one takes a second


class Ranks:
    """One process: every function is the identity.

    Attributes:
        tp, tp_rank: tensor-parallel ranks and which one this is; pp, stage: of the pipeline.
            Rank = stage * tp + tp_rank, of those that share the model.
        processes: all that there are, those of other replicas included.
    """

    tp = pp = processes = 1
    tp_rank = stage = 0

    def bounds(self, n: int) -> tuple[int, int]:
        """This rank's range of a dimension of size n."""
        return cut_range(n, self.tp, self.tp_rank)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of the tensor-parallel ranks' partial results."""
        return x

    def gather(self, x: Tensor, n: int) -> Tensor:
        """Ranks' parts of [N, n] -> the whole on tensor-parallel rank 0."""
        return x

    def send(self, x: Tensor) -> None:
        """To the next stage."""

    def receive(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """From the previous stage."""
        raise AssertionError("one process has all stages")

    def to_first(
        self, output: Output | None, step: Step, vocab: int, device: torch.device
    ) -> Output | None:
        """The last stage's output, on rank 0."""
        return output

    def all_of(self, fact: bool) -> bool:
        """Whether it is so on every rank."""
        return fact

    def command(self, data: bytes) -> None:
        """As rank 0: tell all ranks; empty to end."""

    def next_command(self) -> bytes:
        """As another rank: wait for rank 0."""
        raise AssertionError("one process follows nobody")

    def abandon(self) -> None:
        """End the connections, so that no rank waits for this one for ever."""


class ProcessRanks(Ranks):
    """Those of the default process group that share a model.

    Args:
        members: their ranks there; tp_group: of this stage; group: of all of them.
        commands: the same over the CPU, whatever the model computes on.
    """

    def __init__(
        self,
        tp: int,
        pp: int,
        members: Sequence[int],
        tp_group: dist.ProcessGroup,
        group: dist.ProcessGroup,
        commands: dist.ProcessGroup,
    ) -> None:
        self.tp, self.pp, self.members = tp, pp, members
        self.processes, self.rank = dist.get_world_size(), members.index(dist.get_rank())
        self.stage, self.tp_rank = divmod(self.rank, tp)
        self.tp_group, self.group, self.commands = tp_group, group, commands

    def sum_(self, x: Tensor) -> Tensor:
        if self.tp > 1:
            dist.all_reduce(x, group=self.tp_group)
        return x

    def gather(self, x: Tensor, n: int) -> Tensor:
        if self.tp == 1:
            return x
        width = -(-n // self.tp)
        x = torch.nn.functional.pad(x, (0, width - x.shape[1])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.tp)] if self.tp_rank == 0 else None
        dist.gather(x, parts, group=self.tp_group, group_dst=0)
        return x if parts is None else torch.cat(parts, dim=1)[:, :n]

    def send(self, x: Tensor) -> None:
        dist.send(x.contiguous(), group=self.group, group_dst=self.rank + self.tp)

    def receive(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(x, group=self.group, group_src=self.rank - self.tp)
        return x

    def to_first(
        self, output: Output | None, step: Step, vocab: int, device: torch.device
    ) -> Output | None:
        if self.pp == 1:
            return output
        last = (self.pp - 1) * self.tp
        shapes = [(len(step.wanted), vocab)]
        for segment in step.prefill:
            if n := len(segment.targets):
                shapes += [(n, 1), (n, 1), (n, k := min(segment.top, vocab)), (n, k)]
        sizes = [a * b for a, b in shapes]
        if not sum(sizes):
            return Output(torch.empty(0, vocab, device=device), [])
        if self.rank == last:
            assert output is not None
            tensors = [output.logits]
            for s in output.scores:
                tensors += [s.logprobs, s.greedy, s.tokens, s.top]
            # Token ids are exact in fp32: no vocabulary has 2^24.
            flat = torch.cat([t.float().flatten() for t in tensors])
            dist.send(flat, group=self.group, group_dst=0)
        if self.rank != 0:
            return None
        flat = torch.empty(sum(sizes), device=device)
        dist.recv(flat, group=self.group, group_src=last)
        parts = [p.view(shape) for p, shape in zip(flat.split(sizes), shapes, strict=True)]
        scores = [
            Scores(own[:, 0], greedy[:, 0] > 0, tokens.long(), top)
            for own, greedy, tokens, top in zip(*[iter(parts[1:])] * 4, strict=True)
        ]
        return Output(parts[0], scores)

    def all_of(self, fact: bool) -> bool:
        least = torch.tensor([int(fact)])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.commands)
        return bool(least.item())

    def command(self, data: bytes) -> None:
        whole = len(data).to_bytes(8, "little") + data
        head = torch.frombuffer(bytearray(whole[:FIRST].ljust(FIRST, b"\0")), dtype=torch.uint8)
        dist.broadcast(head, group=self.commands, group_src=0)
        if len(whole) > FIRST:
            rest = torch.frombuffer(bytearray(whole[FIRST:]), dtype=torch.uint8)
            dist.broadcast(rest, group=self.commands, group_src=0)

    def next_command(self) -> bytes:
        head = torch.empty(FIRST, dtype=torch.uint8)
        dist.broadcast(head, group=self.commands, group_src=0)
        data = head.numpy().tobytes()
        size = int.from_bytes(data[:8], "little")
        if size + 8 > FIRST:
            rest = torch.empty(size + 8 - FIRST, dtype=torch.uint8)
            dist.broadcast(rest, group=self.commands, group_src=0)
            data += rest.numpy().tobytes()
        return data[8 : 8 + size]

    def abandon(self) -> None:
        for name in ("tp_group", "group", "commands"):
            group = self.__dict__.pop(name, None)
            if group is not None:
                with suppress(RuntimeError, ValueError):  # two names of one, or a broken one
                    dist.destroy_process_group(group)


def share_world(tp: int, pp: int, replicas: int = 1) -> Ranks | None:
    """The ranks of the default process group in `replicas` teams of tp * pp neighbours: this rank's
    team, or None for a rank that is left over. Collective: all ranks create all groups."""
    mine: Ranks | None = None
    for replica in range(replicas):
        members = range(replica * tp * pp, (replica + 1) * tp * pp)
        here = dist.get_rank() in members
        if tp * pp == 1:
            if here:
                mine = Ranks()
                mine.processes = dist.get_world_size()
            continue
        everyone = dist.new_group(list(members))
        stages = [everyone] * pp
        if min(tp, pp) > 1:
            stages = [dist.new_group(list(members[s * tp : (s + 1) * tp])) for s in range(pp)]
        commands = dist.new_group(list(members), timeout=LONG, backend="gloo")
        if here:
            stage = stages[members.index(dist.get_rank()) // tp]
            mine = ProcessRanks(tp, pp, members, stage, everyone, commands)
    return mine
