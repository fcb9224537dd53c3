"""The trained model with its adapter switched off, as a companion: a reference that costs nothing.

It runs the trainer's own placed model, and so holds no weights of its own. Its layout, stages and
precision are the trained model's; what it computes is what the base would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bevatron.nn.adapted_map import adapted_maps
from bevatron.parallel.companion import Companion
from bevatron.parallel.forward_pass import forward, joined, micro_batches, token_log_probabilities
from bevatron.parallel.layout import Layout
from bevatron.parallel.placement import AtEnd, Batch, Placed
from bevatron.spec import ModelSpec


class AdapterOff(Companion):
    """What an objective asks of the base of the model that it trains.

    Args:
        spec: of the trained model; its head is what `at_end` needs.
        at_end: what is asked of the last hidden states and the head.
    """

    def __init__(self, spec: ModelSpec, at_end: AtEnd = token_log_probabilities) -> None:
        assert spec.adapter is not None, "the model has no adapter to switch off"
        super().__init__(spec.base, None, at_end=at_end)

    def place(
        self,
        layout: Layout,
        mesh: DeviceMesh,
        *,
        device: torch.device,
        precision: str,
        seq_len: int,
        micro_batch: int,
        compile_layers: bool,
        stages: Sequence[range] = (),
        beside: Placed | None = None,
    ) -> None:
        """Take the trained model, `beside`, as it is placed."""
        assert beside is not None
        self._placed, self.micro_batch = beside, micro_batch

    def fill(self) -> None:
        """Nothing: the trained model is filled."""

    def run(self, ids: Tensor, batch: Batch, name: str) -> Batch:
        """What is asked, as `Companion.run` gives it."""
        placed, parts = self.placed, micro_batches(ids, batch, self.micro_batch)
        with switched_off(placed):
            found = list(forward(placed, parts, self.at_end))
        if not placed.is_last:
            return {}
        end = joined([f.end for f in found])
        return {f"{name}.{k}": v for k, v in end.items()} if isinstance(end, dict) else {name: end}

    def release(self) -> None:
        """Nothing is left gathered."""

    def kept_bytes(self, tokens: int) -> int:
        return 0

    def held_bytes(self) -> int:
        return 0

    def fingerprint(self) -> str:
        """None of its own: which base it is, the run's steps say."""
        return "the adapter switched off"


@contextmanager
def switched_off(placed: Placed) -> Iterator[None]:
    """The placed model without its adapter, for forwards that no backward follows."""
    maps = [m for stage in placed.mine.values() for m in adapted_maps(stage)]
    try:
        for found in maps:
            found.on = False
        yield
    finally:
        for found in maps:
            found.on = True
