"""What a model is: a list of layers, each of which says what it is.

A `ModelSpec` is plain frozen data. It knows nothing of Hugging Face, of torch, or of layouts. A
homogeneous Llama is the special case in which all layers say the same. `ModelSpec.parameters()` is
the one table of names and shapes that counting, conversion, the decoder, initialisation and
checkpoints all read.

Layout of the fused weights (why: they shard by slicing, without permuting):
- `qkv`     [G * (q + 2) * D, h]: per KV group its q query heads, its key, its value
- `gate_up` [2, f, h]: gate rows, then up rows
G KV heads (groups), q query heads per group, D head_dim, h hidden_size, f intermediate_size.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bevatron.errors import BevatronError

Role = Literal[
    "embedding", "head", "score", "norm", "bias", "qkv", "o", "gate_up", "up", "down", "linear"
]
Shape = tuple[int, ...]
HeadKind = Literal[
    "causal_lm", "sequence_classification", "token_classification", "question_answering", "none"
]
HEAD_KINDS: tuple[HeadKind, ...] = typing.get_args(HeadKind)


class SpecError(BevatronError):
    """A spec that describes no model."""


@dataclass(frozen=True)
class ParameterSpec:
    """One native parameter: its name, its global shape, and what it does."""

    name: str
    shape: Shape
    role: Role

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class Attention:
    """Causal self-attention with `num_key_value_heads` groups of query heads.

    `qk_norm`: query and key heads pass through an RMS norm without weights, after the rotation.
    """

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

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{prefix}.qkv.weight", (self.qkv_rows, hidden_size), "qkv")
        if self.qkv_bias:
            yield ParameterSpec(f"{prefix}.qkv.bias", (self.qkv_rows,), "bias")
        width = self.num_attention_heads * self.head_dim
        yield ParameterSpec(f"{prefix}.o.weight", (hidden_size, width), "o")
        if self.o_bias:
            yield ParameterSpec(f"{prefix}.o.bias", (hidden_size,), "bias")


@dataclass(frozen=True)
class MLP:
    """`down(act(up(x)))`, or with a gate `down(act(gate(x)) * up(x))`."""

    intermediate_size: int
    activation: Literal["silu", "relu2"] = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise SpecError(
                f"mlp: intermediate_size is {self.intermediate_size}, expected at least 1"
            )
        if self.activation not in ("silu", "relu2"):
            raise SpecError(f"mlp: activation {self.activation!r} is not one of silu, relu2")

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        f, h = self.intermediate_size, hidden_size
        name, lead = ("gate_up", (2, f)) if self.gated else ("up", (f,))
        role: Role = "gate_up" if self.gated else "up"
        yield ParameterSpec(f"{prefix}.{name}.weight", (*lead, h), role)
        if self.bias:
            yield ParameterSpec(f"{prefix}.{name}.bias", lead, "bias")
        yield ParameterSpec(f"{prefix}.down.weight", (h, f), "down")
        if self.bias:
            yield ParameterSpec(f"{prefix}.down.bias", (h,), "bias")


@dataclass(frozen=True)
class Linear:
    """A sublayer replaced by one square matrix without bias (Llama-Nemotron)."""

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{prefix}.linear.weight", (hidden_size, hidden_size), "linear")


@dataclass(frozen=True)
class LayerSpec:
    """One layer: an attention and an MLP sublayer, each of which may be absent (`None`, no-op).

    An absent sublayer has no norm either; a layer without both is the identity and keeps its index.
    """

    attention: Attention | Linear | None = None
    mlp: MLP | Linear | None = None


@dataclass(frozen=True)
class Norm:
    """`rms`: x / rms(x), times a weight if there is one. `layernorm1p`: LayerNorm with bias whose
    stored weight is zero-centred (the multiplier is 1 + weight)."""

    kind: Literal["rms", "layernorm1p"] = "rms"
    eps: float = 1e-5
    weight: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layernorm1p"):
            raise SpecError(f"norm: kind {self.kind!r} is not one of rms, layernorm1p")
        if self.kind == "layernorm1p" and not self.weight:
            raise SpecError("norm: layernorm1p always has a weight")

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        if self.weight:
            yield ParameterSpec(f"{prefix}.weight", (hidden_size,), "norm")
        if self.kind == "layernorm1p":
            yield ParameterSpec(f"{prefix}.bias", (hidden_size,), "norm")


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


@dataclass(frozen=True)
class Head:
    """What is read off the hidden states after the final norm.

    - `causal_lm`: logits over the vocabulary of every next token
    - `sequence_classification`: scores of the labels, at the last token that is not `pad_token_id`
    - `token_classification`: scores of the labels at every token
    - `question_answering`: two scores at every token, for the start and the end of the answer
    - `none`: nothing; the model ends with its hidden states

    Attributes:
        labels: their names, for the two classifications.
        problem_type: regression, single_label_classification or multi_label_classification;
            None leaves it to the labels of the training data, as transformers does.
    """

    kind: HeadKind = "causal_lm"
    labels: tuple[str, ...] = ()
    bias: bool = False
    pad_token_id: int | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise SpecError(f"head: kind {self.kind!r} is not one of {', '.join(HEAD_KINDS)}")
        if (self.kind in ("sequence_classification", "token_classification")) != bool(self.labels):
            raise SpecError(
                f"head: kind {self.kind} with {len(self.labels)} labels; classifications have at "
                "least one, others none"
            )

    @property
    def scores(self) -> int:
        """Rows of the score matrix of a head that is not over the vocabulary."""
        return 2 if self.kind == "question_answering" else len(self.labels)

    def parameters(self, hidden_size: int) -> Iterator[ParameterSpec]:
        """Of a head other than causal_lm."""
        if self.scores:
            yield ParameterSpec("head.weight", (self.scores, hidden_size), "score")
            if self.bias:
                yield ParameterSpec("head.bias", (self.scores,), "bias")


@dataclass(frozen=True)
class Init:
    """Random weights: N(0, std). Norms start as the identity, biases at zero.

    Attributes:
        scale_attention_output: output projections of the attention are divided by the root of the
            number of sublayers, 2 * layers where none is absent (NanoChat in transformers).
        depth_scaled: so is all that sublayers add to the residual stream: `o`, `down`, `linear`
            (GPT-2, Megatron), which keeps its variance independent of the depth.
    """

    std: float = 0.02
    scale_attention_output: bool = False
    depth_scaled: bool = False

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise SpecError(f"init: std is {self.std}, expected at least 0")

    def std_of(self, role: Role, sublayers: int) -> float:
        """Standard deviation of a matrix in a model of so many sublayers."""
        scaled = role == "o" and self.scale_attention_output
        scaled |= role in ("o", "down", "linear") and self.depth_scaled
        return self.std / math.sqrt(sublayers) if scaled else self.std


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model, independent of who stores it and how it is laid out.

    Args:
        tie_word_embeddings: the embedding is the matrix of a causal_lm head as well.
        embedding_norm: a norm of the model's kind right after the embedding, without weights.
        logit_softcap: logits become c * tanh(logits / c).
        max_position_embeddings: context length, in tokens, that the model was made for.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: Norm = Norm()
    rope: Rope = Rope()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    embedding_norm: bool = False
    logit_softcap: float | None = None
    init: Init = Init()
    head: Head = Head()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise SpecError(f"model: {name} is {getattr(self, name)}, expected at least 1")
        if not self.layers:
            raise SpecError("model: it has no layers")
        for i, layer in enumerate(self.layers):
            if isinstance(layer.attention, Attention):
                rotary = self.rope.rotary_dim(layer.attention.head_dim)
                least = 4 if self.rope.kind == "dynamic" else 0
                if rotary % 2 or rotary < least:
                    raise SpecError(
                        f"layers.{i}.attention: head_dim {layer.attention.head_dim} times "
                        f"partial {self.rope.partial} rotates {rotary} dimensions; expected an "
                        f"even number of at least {least}"
                    )

    @property
    def sublayers(self) -> int:
        """How many sublayers add to the residual stream."""
        return sum((a.attention is not None) + (a.mlp is not None) for a in self.layers)

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is the embedding."""
        return self.tie_word_embeddings and self.head.kind == "causal_lm"

    @property
    def head_rows(self) -> int:
        """Rows of the matrix that the last hidden states are multiplied with."""
        return self.vocab_size if self.head.kind == "causal_lm" else self.head.scores

    def layer_parameters(self, index: int) -> Iterator[ParameterSpec]:
        """Parameters of one layer: per sublayer its norm, then itself. Nothing for a no-op."""
        layer, h = self.layers[index], self.hidden_size
        for name, sublayer in (("attention", layer.attention), ("mlp", layer.mlp)):
            if sublayer is not None:
                yield from self.norm.parameters(f"layers.{index}.{name}_norm", h)
                yield from sublayer.parameters(f"layers.{index}.{name}", h)

    def parameters(self) -> Iterator[ParameterSpec]:
        """Every parameter of the model, each once: a tied head is the embedding and not listed."""
        yield ParameterSpec("embed.weight", (self.vocab_size, self.hidden_size), "embedding")
        for i in range(len(self.layers)):
            yield from self.layer_parameters(i)
        yield from self.norm.parameters("final_norm", self.hidden_size)
        if self.head.kind != "causal_lm":
            yield from self.head.parameters(self.hidden_size)
        elif not self.tied:
            yield ParameterSpec("head.weight", (self.vocab_size, self.hidden_size), "head")
