"""The spec of rotary position embedding: its kind and the numbers of this kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bevatron.spec.parameter import SpecError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split. `partial`: share of head_dim that is rotated.

    `reversed`: rotates by minus the angle (NanoChat). Kinds:
    - `linear` divides all frequencies by `factor`
    - `dynamic` raises theta once a sequence is longer than `original_max_position_embeddings`
    - `yarn` divides those that turn slowly within that context, keeps those that turn fast, blends
      between `beta_slow` and `beta_fast` turns (from whole dimensions on if `truncate`), and
      multiplies cos and sin by `attention_factor` (Peng et al., arXiv 2309.00071)
    - `llama3` divides the long wavelengths and blends the ones between (Llama 3.1)
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    partial: float = 1.0
    reversed: bool = False
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_NEEDS:
            raise SpecError(f"rope: kind {self.kind!r} is not one of {', '.join(ROPE_NEEDS)}")
        for name in ROPE_NEEDS[self.kind]:
            if getattr(self, name) is None:
                raise SpecError(f"rope: kind {self.kind} needs {name}")

    def rotary_dim(self, head_dim: int) -> int:
        """How many leading dimensions of a head are rotated."""
        return int(head_dim * self.partial)


_CONTEXT = "original_max_position_embeddings"
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _CONTEXT),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", _CONTEXT),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
}
