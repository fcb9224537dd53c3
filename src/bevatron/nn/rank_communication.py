"""The communication that a sublayer may ask for: a few small functions with named effects.

Parameters may be DTensors; activations are always plain local tensors. `Comm` and `Context` are for
one process, where nothing is shared. For several processes there are
`bevatron.parallel.tensor_parallel.TensorParallel` and
`bevatron.parallel.context_parallel.ContextParallel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevatron.spec.sublayer import cut_range

Run = tuple[int, int]  # consecutive positions [begin, end) of a sequence


class Context:
    """The sequence that attention sees, of which a rank may hold a part. One process has it all."""

    size: int = 1  # ranks that share a sequence; each holds as many tokens

    def runs(self, length: int) -> tuple[Run, ...]:
        """Which positions of the whole sequence this rank's `length` tokens are, in order."""
        return ((0, length),)

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's [B, G, T, D] -> those of the whole sequence [B, G, S, D], in order."""
        return key, value

    def sum(self, x: Tensor) -> Tensor:
        """Added up over the ranks that share a sequence, such as the log-probability [B] of each
        sequence. Every rank gets the sum; its gradient is the sum of the ranks' gradients, because
        the ranks' losses are added up: each returns its share of a loss, or all but one zero."""
        return x

    def starts(self, documents: Tensor) -> Tensor:
        """[B, T]: at which position of the sequence the document of each token begins.

        `documents` [B, T] number them, in any way: where the number changes, another begins."""
        at = torch.arange(1, documents.shape[1], device=documents.device)
        begins = torch.where(documents[:, 1:] != documents[:, :-1], at, 0)
        return torch.nn.functional.pad(begins, (1, 0)).cummax(1).values


class Comm:
    """One process: every function is the identity."""

    size: int = 1
    rank: int = 0
    sequence_shares: int = 1  # into how many parts T is cut between the sublayers
    context: Context = Context()

    def enter(self, x: Tensor) -> Tensor:
        """Before a column-parallel product: the whole sequence, whose gradient is a partial sum."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """After a row-parallel product: sums the partial results of the ranks."""
        return x

    def view(self, parameter: Tensor) -> Tensor:
        """This rank's part of a parameter, every use of which this rank sees."""
        return parameter

    def shared(self, parameter: Tensor) -> Tensor:
        """A replicated parameter between the sublayers, where a rank may hold a part of T."""
        return parameter

    def whole(self, parameter: Tensor) -> Tensor:
        """All of a stored-sharded parameter, of which this rank will use its own part."""
        return parameter

    def max_(self, x: Tensor) -> Tensor:
        """In place maximum over the ranks (no gradient)."""
        return x

    def sum_(self, x: Tensor) -> Tensor:
        """In place sum over the ranks (no gradient)."""
        return x

    def bounds(self, n: int) -> tuple[int, int]:
        """This rank's range of a dimension of size `n`, cut as DTensor cuts it (ceil)."""
        return cut_range(n, self.size, self.rank)


LOCAL = Comm()


def empty(*shape: int) -> torch.nn.Parameter:
    """An uninitialised parameter on the current default device."""
    return torch.nn.Parameter(torch.empty(*shape))
