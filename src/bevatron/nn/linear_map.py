"""The linear maps of a decoder: every weight that multiplies hidden states does it here.

There are two products, one for each way in which tensor-parallel ranks share a weight. Both go
through `product`, which an adapter overrides (`adapted_map.py`). How a rank finds its rows in the
stored weight is said in two steps, which work as well on a matrix with the same rows and fewer
columns. (The output matrix over the vocabulary is not here: the objective decides what is computed
with it.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.nn.rank_communication import Comm, empty

Here = Callable[[Tensor], Tensor]
Chosen = Callable[[Tensor], Tensor]


class LinearMap(nn.Module):
    """A weight, which may be stored in more than two dimensions, and perhaps a bias."""

    def __init__(self, *shape: int, bias: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.weight = empty(*shape)
        self.bias = None if bias is None else empty(*bias)

    def product(
        self, x: Tensor, here: Here, chosen: Chosen | None = None, *, biased: bool = True
    ) -> Tensor:
        """x [..., in] times this rank's rows -> [..., out].

        Args:
            here: a stored parameter -> what this rank has of it to compute with.
            chosen: of that, whose first dimensions are the weight's, the rows that this rank
                multiplies with, as a matrix [out, in]; of the bias [out]. If absent, all as it is.
            biased: whether the bias is added, if there is one.
        """
        weight, bias = here(self.weight), None
        if biased and self.bias is not None:
            bias = here(self.bias)
        if chosen is not None:
            weight, bias = chosen(weight), None if bias is None else chosen(bias)
        return F.linear(x, weight, bias)

    def reduced(self, x: Tensor, comm: Comm) -> Tensor:
        """The row-parallel product: x holds this rank's part of the input columns; the ranks'
        results are summed, and the bias is added once."""
        y = comm.leave(self.product(x, comm.view, biased=False))
        return y if self.bias is None else y + comm.shared(self.bias)

    def reduced_part(self, x: Tensor, comm: Comm) -> Tensor:
        """The row-parallel product of an x that every rank has whole."""
        first, last = comm.bounds(x.shape[-1])
        return self.reduced(comm.enter(x)[..., first:last], comm)
