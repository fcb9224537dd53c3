"""What a model is: a list of layers, each of which says what it is.

A `ModelSpec` is plain frozen data. It knows nothing of Hugging Face, of torch, or of layouts. A
homogeneous Llama is the special case in which all layers say the same. `ModelSpec.parameters()` is
the one table of names and shapes that counting, conversion, the decoder, initialisation and
checkpoints all read.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from bevatron.spec.adapter import MAPS, NAMES, Adapter, adds_up_columns
from bevatron.spec.parameter import ParameterSpec, Role, SpecError
from bevatron.spec.rope import Rope
from bevatron.spec.sublayer import Sublayer

S = TypeVar("S", bound=Sublayer)

HeadKind = Literal[
    "causal_lm", "sequence_classification", "token_classification", "question_answering", "none"
]
HEAD_KINDS: tuple[HeadKind, ...] = typing.get_args(HeadKind)


@dataclass(frozen=True)
class LayerSpec:
    """One layer: an attention and an MLP sublayer, each of which may be absent (`None`, no-op).

    An absent sublayer has no norm either; a layer without both is the identity and keeps its index.
    """

    attention: Sublayer | None = None
    mlp: Sublayer | None = None

    def __post_init__(self) -> None:
        for place, sublayer in self.present:
            if place not in sublayer.places:
                raise SpecError(f"layer: a sublayer of kind {sublayer.kind!r} is no {place}")

    @property
    def present(self) -> list[tuple[str, Sublayer]]:
        """`attention` and `mlp` with what they are, in the order in which they compute."""
        both = (("attention", self.attention), ("mlp", self.mlp))
        return [(place, sublayer) for place, sublayer in both if sublayer is not None]


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
            yield ParameterSpec(f"{prefix}.weight", (hidden_size,), "norm", ("hidden",))
        if self.kind == "layernorm1p":
            yield ParameterSpec(f"{prefix}.bias", (hidden_size,), "norm", ("hidden",))


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
            shape = (self.scores, hidden_size)
            yield ParameterSpec("head.weight", shape, "score", ("other", "hidden"))
            if self.bias:
                yield ParameterSpec("head.bias", (self.scores,), "bias", ("other",))


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
        adapter: what is trained beside its linear maps, if anything is.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: Norm = Norm()
    rope: Rope = Rope()  # noqa: RUF009
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    embedding_norm: bool = False
    logit_softcap: float | None = None
    init: Init = Init()
    head: Head = Head()
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise SpecError(f"model: {name} is {getattr(self, name)}, expected at least 1")
        if not self.layers:
            raise SpecError("model: it has no layers")
        for i, layer in enumerate(self.layers):
            for place, sublayer in layer.present:
                if problem := sublayer.misfit(f"layers.{i}.{place}", self.hidden_size, self.rope):
                    raise SpecError(problem)
        if self.adapter is not None:
            self._check_adapter(self.adapter)

    def _check_adapter(self, adapter: Adapter) -> None:
        """That every target is a linear map somewhere, and everything named is there."""
        for layer in adapter.layers or ():
            if not 0 <= layer < len(self.layers):
                raise SpecError(
                    f"adapter: there is no layer {layer}; layers are 0 to {len(self.layers) - 1}"
                )
        base = self.base
        weights = [(i, p) for i in range(len(self.layers)) for p in base.layer_parameters(i)]
        for target in adapter.targets:
            one = replace(adapter, targets=(target,))
            if not any(one.parts(p, i) for i, p in weights):
                there = {
                    p.role: None for i, p in weights if replace(adapter, targets=MAPS).parts(p, i)
                }
                raise SpecError(
                    f"adapter: targets names {target}, which no such layer has; there are "
                    f"{', '.join(there) or 'none'}"
                )
        known = {p.name for p in base.parameters()}
        for name in adapter.whole:
            if name not in known:
                raise SpecError(f"adapter: {name} is not a parameter of the model")

    @property
    def base(self) -> ModelSpec:
        """The model without its adapter."""
        return self if self.adapter is None else replace(self, adapter=None)

    def with_adapter(self, adapter: Adapter | None) -> ModelSpec:
        """The model with this adapter. Raises SpecError if it does not fit."""
        return replace(self, adapter=adapter)

    @property
    def sublayers(self) -> int:
        """How many sublayers add to the residual stream."""
        return sum(len(layer.present) for layer in self.layers)

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
        for place, sublayer in layer.present:
            yield from self.norm.parameters(f"layers.{index}.{place}_norm", h)
            for parameter in sublayer.parameters(f"layers.{index}.{place}", h):
                yield parameter
                if self.adapter is not None:
                    yield from self.adapter.beside(parameter, index)

    def parameters(self) -> Iterator[ParameterSpec]:
        """Every parameter of the model, each once: a tied head is the embedding and not listed."""
        vocabulary = (self.vocab_size, self.hidden_size)
        yield ParameterSpec("embed.weight", vocabulary, "embedding", ("other", "hidden"))
        for i in range(len(self.layers)):
            yield from self.layer_parameters(i)
        yield from self.norm.parameters("final_norm", self.hidden_size)
        if self.head.kind != "causal_lm":
            yield from self.head.parameters(self.hidden_size)
        elif not self.tied:
            yield ParameterSpec("head.weight", vocabulary, "head", ("other", "hidden"))

    def each(self, cls: type[S]) -> Iterator[tuple[int, S]]:
        """The sublayers of one class, with the layers that they are in."""
        for i, layer in enumerate(self.layers):
            yield from ((i, found) for _, found in layer.present if isinstance(found, cls))

    def cut(self, parameter: ParameterSpec, tp: int) -> int | None:
        """The dimension along which `tp` ranks cut a parameter, each `ceil(size / tp)` of it; None
        for one that every rank has whole."""
        first, _, rest = parameter.name.partition(".")
        if first == "layers":
            index, place, name = rest.split(".", 2)
            sublayer = dict(self.layers[int(index)].present).get(place)
            if sublayer is None:  # of its norm
                return None
            linear_map, _, last = name.rpartition(".")
            if last in NAMES:
                return self._adapter_cut(sublayer, f"layers.{index}.{place}", linear_map, last, tp)
            return sublayer.cut(name, tp)
        return {"embedding": 0, "head": 0, "score": 1}.get(parameter.role)

    def _adapter_cut(
        self, sublayer: Sublayer, place: str, linear_map: str, name: str, tp: int
    ) -> int | None:
        """Where ranks share a map's rows, B and the magnitude are cut with them (unless the map is
        gathered for use), and every rank has A. Where they share its columns, A is cut with them,
        and every rank has the rest, which is small: gathering it would cost a message per use."""
        found = sublayer.parameters(place, self.hidden_size)
        weight = next(p for p in found if p.name == f"{place}.{linear_map}.weight")
        if adds_up_columns(weight):
            return 1 if name == "lora_a" else None
        dim = sublayer.cut(f"{linear_map}.weight", tp)
        of_rows = dim is not None and dim < len(weight.shape) - 1
        return dim if of_rows and name != "lora_a" else None
