"""What every kind of sublayer answers for itself, and the table of the kinds.

A kind is a subclass of `Sublayer`, a frozen dataclass in a file of its own. Counting, conversion,
placement, estimates of time and memory, the native format and tables call these methods and never
ask which kind a sublayer is. Two more tables name the class that computes a kind:
`bevatron.nn.decoder.MODULES` in training, `bevatron.generate.decoding_sublayers.DECODINGS` in the
engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Self

from bevatron.spec.parameter import ParameterSpec, SpecError
from bevatron.spec.rope import Rope

FP32 = 4  # bytes


class Sublayer(ABC):
    """A sublayer between its norm and its sum with the residual stream.

    Class attributes, given where a kind is defined:
        kind: its name in spec.json and in the tables of modules.
        places: which parts of a layer it may be, `attention` and `mlp`.
        added: fields that came later; a spec.json without them means their defaults.
        unit: what it is made of many of, such as `heads`: pruning may leave some out. Its module
            shows what they gave to a `tap`. unit_field: the field that says how many.
    """

    kind: ClassVar[str]
    places: ClassVar[tuple[str, ...]]
    added: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = ""
    unit_field: ClassVar[str] = ""

    def __init_subclass__(cls, *, kind: str, places: tuple[str, ...]) -> None:
        super().__init_subclass__()
        cls.kind, cls.places = kind, places
        known = KINDS.setdefault(kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"sublayer: the kind {kind!r} is {known.__qualname__} already")

    @abstractmethod
    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        """Its parameters in order, named `prefix.<name>`."""

    @abstractmethod
    def cut(self, name: str, tp: int) -> int | None:
        """The dimension along which `tp` ranks cut the parameter of this name (such as
        `qkv.weight`), each `ceil(size / tp)` of it; None for one that every rank has whole."""

    @abstractmethod
    def activation_bytes(self, itemsize: int, tp: int, cp: int) -> float:
        """Bytes per token of a rank's share of the sequence that eager execution keeps for the
        backward on one of `tp` ranks, beside the norm's output that comes in."""

    @abstractmethod
    def product_bytes(self, itemsize: int, tp: int) -> float:
        """Those of the products (and attention) within, which selective recomputation keeps; the
        last product's output is not counted."""

    @abstractmethod
    def describe(self) -> str:
        """Its kind and sizes in a few words, for tables."""

    def misfit(self, place: str, hidden_size: int, rope: Rope) -> str | None:
        """Why it cannot stand in such a model at `place`, which is `layers.3.attention` or so."""
        return None

    def cut_problem(self, place: str, tp: int) -> str | None:
        """Why `tp` ranks cannot share it, and what to do."""
        return None

    def flops(self, hidden_size: int, seq_len: int, causal: bool) -> int:
        """Forward FLOPs per token in a sequence of `seq_len`: 2 per element of its matrices."""
        parameters = self.parameters("", hidden_size)
        return sum(2 * p.numel for p in parameters if p.role not in ("bias", "norm"))

    def cache(self, tp: int) -> tuple[int, int] | None:
        """(heads, head_dim) of the keys and of the values that generation keeps of every position
        of a sequence on one of `tp` ranks, if it does."""
        return None

    def cache_bytes(self, itemsize: int, tp: int) -> int:
        """What that takes, per position."""
        heads, head_dim = self.cache(tp) or (0, 0)
        return 2 * heads * head_dim * itemsize

    @property
    def units(self) -> int:
        """How many units it has, 0 if it is not made of units."""
        return getattr(self, self.unit_field) if self.unit_field else 0

    def with_units(self, count: int) -> Self:
        """The same with another number of units."""
        return replace(self, **{self.unit_field: count})  # type: ignore[type-var]

    @property
    def unit_groups(self) -> int:
        """Groups of neighbouring units, each of which must keep as many."""
        return 1

    @property
    def unit_width(self) -> int:
        """Entries of each unit."""
        return 1

    @property
    def rotated(self) -> int | None:
        """The head_dim of the heads that it rotates by position, if it does."""
        return None


KINDS: dict[str, type[Sublayer]] = {}


def cut_range(size: int, tp: int, rank: int) -> tuple[int, int]:
    """The range of a dimension that is one rank's of `tp`, each `ceil(size / tp)` of it; the last
    ones may have less or nothing. As torch.chunk, DTensor and FSDP cut."""
    step = -(-size // tp)
    return min(size, step * rank), min(size, step * (rank + 1))


def uneven_cut(what: str, size: int, tp: int) -> str | None:
    """What is wrong with cutting a dimension over `tp` ranks with rounding up, if a rank would hold
    nothing of it."""
    if -(-size // tp) * (tp - 1) >= size:
        return f"{what} {size} leaves a rank of tp={tp} with nothing; use a smaller tp"
    return None
