"""The spec of causal self-attention.

Layout of the fused matrix (why: it shards by slicing, without permuting):
- `qkv` [G * (q + 2) * D, h]: per KV group its q query heads, its key, its value
G KV heads (groups), q query heads per group, D head_dim, h hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bevatron.spec.parameter import ParameterSpec, SpecError
from bevatron.spec.rope import Rope
from bevatron.spec.sublayer import FP32, Sublayer


@dataclass(frozen=True)
class Attention(Sublayer, kind="attention", places=("attention",)):
    """Causal self-attention with `num_key_value_heads` groups of query heads.

    `qk_norm`: query and key heads pass through an RMS norm without weights, after the rotation.
    """

    unit: ClassVar[str] = "heads"
    unit_field: ClassVar[str] = "num_attention_heads"

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise SpecError(f"attention: {name} is {getattr(self, name)}, expected at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise SpecError(
                f"attention: {self.num_attention_heads} query heads cannot be shared out among "
                f"{self.num_key_value_heads} key/value heads; the second must divide the first"
            )

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def qkv_rows(self) -> int:
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def unit_groups(self) -> int:
        return self.num_key_value_heads

    @property
    def unit_width(self) -> int:
        return self.head_dim

    @property
    def rotated(self) -> int:
        return self.head_dim

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        d = self.head_dim
        fused = (self.num_key_value_heads, (self.queries_per_group * d, d, d))
        shape = (self.qkv_rows, hidden_size)
        yield ParameterSpec(f"{prefix}.qkv.weight", shape, "qkv", ("units", "hidden"), fused)
        if self.qkv_bias:
            yield ParameterSpec(f"{prefix}.qkv.bias", (self.qkv_rows,), "bias", ("units",), fused)
        width = self.num_attention_heads * d
        yield ParameterSpec(f"{prefix}.o.weight", (hidden_size, width), "o", ("hidden", "units"))
        if self.o_bias:
            yield ParameterSpec(f"{prefix}.o.bias", (hidden_size,), "bias", ("hidden",))

    def misfit(self, place: str, hidden_size: int, rope: Rope) -> str | None:
        rotary = rope.rotary_dim(self.head_dim)
        least = 4 if rope.kind == "dynamic" else 0
        if rotary % 2 == 0 and rotary >= least:
            return None
        return (
            f"{place}: head_dim {self.head_dim} times partial {rope.partial} rotates "
            f"{rotary} dimensions; expected an even number of at least {least}"
        )

    def cut(self, name: str, tp: int) -> int | None:
        """Whole groups of `qkv`; where the ranks do not divide them, its columns, and no bias."""
        if name.startswith("qkv."):
            if self.num_key_value_heads % tp == 0:
                return 0
            return 1 if name == "qkv.weight" else None
        return 1 if name == "o.weight" else None

    def cut_problem(self, place: str, tp: int) -> str | None:
        heads = self.num_attention_heads
        if heads % tp == 0:
            return None
        sizes = [n for n in range(1, heads + 1) if heads % n == 0 and n <= 4 * tp]
        return (
            f"{place} has {heads} query heads, which tp={tp} does not divide; "
            f"use tp={' or '.join(map(str, sizes))}"
        )

    def groups_at(self, tp: int) -> tuple[int, int]:
        """Groups that one of `tp` ranks computes when it generates, and queries in each: whole
        groups, or where the ranks do not divide them, each query head with a key and value of its
        own."""
        if self.num_key_value_heads % tp == 0:
            return self.num_key_value_heads // tp, self.queries_per_group
        return self.num_attention_heads // tp, 1

    def flops(self, hidden_size: int, seq_len: int, causal: bool) -> int:
        """Besides the matrices, scores and weighted values: 4 * seq_len * H * D, of which a causal
        kernel skips half. Norms, biases and the rotation are left out."""
        full = 4 * seq_len * self.num_attention_heads * self.head_dim
        return super().flops(hidden_size, seq_len, causal) + (full // 2 if causal else full)

    def activation_bytes(self, itemsize: int, tp: int, cp: int) -> float:
        heads, width = self.num_attention_heads, self.head_dim
        groups = max(self.num_key_value_heads, tp)  # each rank has at least one
        rows = (heads + 2 * groups) * width  # the product, alive through its values
        rotated = (heads + groups * cp) * width
        return (rows + rotated + 2 * heads * width) * itemsize / tp + FP32 * heads / tp

    def product_bytes(self, itemsize: int, tp: int) -> float:
        heads, groups = self.num_attention_heads, max(self.num_key_value_heads, tp)
        return (2 * heads + 2 * groups) * self.head_dim / tp * itemsize + FP32 * heads / tp

    def cache(self, tp: int) -> tuple[int, int]:
        return self.groups_at(tp)[0], self.head_dim

    def describe(self) -> str:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        return f"{heads} heads, {groups} key/value heads of {self.head_dim}"
