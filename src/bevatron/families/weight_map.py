"""The weight map: how Hugging Face tensors make up native parameters, as moved rows.

An `Entry` says of one native parameter which HF tensors it consists of and where their rows go.
It is read in both directions: import copies source rows to native rows, export copies them back.
A row is a vector of the last dimension (one element of a 1-D tensor); leading dimensions count as
one. There is no arithmetic here, so a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bevatron.spec import HeadKind, ModelSpec, ParameterSpec, Shape


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name in the safetensors file and its shape."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Rows:
    """`count` rows of source number `source`, from `source_start`, lie at `native_start`."""

    source: int
    source_start: int
    native_start: int
    count: int


@dataclass(frozen=True)
class Entry:
    """One native parameter <- transform <- HF tensors. `rows` is in native order without gaps;
    the rows of each source appear in that source's own order."""

    native: ParameterSpec
    transform: str
    sources: tuple[Source, ...]
    rows: tuple[Rows, ...]


def rename(native: ParameterSpec, source: str) -> Entry:
    """The same tensor under another name."""
    count = native.numel // native.shape[-1] if len(native.shape) > 1 else native.shape[0]
    return Entry(native, "rename", (Source(source, native.shape),), (Rows(0, 0, 0, count),))


def fuse(native: ParameterSpec, transform: str, sources: tuple[str, ...]) -> Entry:
    """Rows of several tensors in one, as `native.fused` says: those of query, key and value by KV
    group, gate rows before up rows."""
    assert native.fused is not None
    groups, counts = native.fused
    rows, at = [], 0
    for group in range(groups):
        for source, count in enumerate(counts):
            rows.append(Rows(source, group * count, at, count))
            at += count
    tail = () if native.role == "bias" else native.shape[-1:]
    shapes = ((groups * count, *tail) for count in counts)
    parts = tuple(Source(name, shape) for name, shape in zip(sources, shapes, strict=True))
    return Entry(native, transform, parts, tuple(rows))


@dataclass(frozen=True)
class Names:
    """How a family spells its tensors. `{i}` is the layer, `{kind}` is weight or bias."""

    embed: str = "model.embed_tokens.weight"
    attention_norm: str = "model.layers.{i}.input_layernorm.{kind}"
    q: str = "model.layers.{i}.self_attn.q_proj.{kind}"
    k: str = "model.layers.{i}.self_attn.k_proj.{kind}"
    v: str = "model.layers.{i}.self_attn.v_proj.{kind}"
    o: str = "model.layers.{i}.self_attn.o_proj.{kind}"
    attention_linear: str = "model.layers.{i}.self_attn.linear_attn.{kind}"
    mlp_norm: str = "model.layers.{i}.post_attention_layernorm.{kind}"
    gate: str = "model.layers.{i}.mlp.gate_proj.{kind}"
    up: str = "model.layers.{i}.mlp.up_proj.{kind}"
    down: str = "model.layers.{i}.mlp.down_proj.{kind}"
    mlp_linear: str = "model.layers.{i}.mlp.linear_mlp.{kind}"
    final_norm: str = "model.norm.{kind}"
    head: str = "lm_head.{kind}"
    qa_prefix: str = "transformer."  # of the backbone below a question answering head

    def below(self, head: HeadKind) -> Names:
        """The names in the class with that head."""
        if head == "causal_lm":
            return self
        prefix = {"none": "", "question_answering": self.qa_prefix}.get(head, "model.")
        score = "qa_outputs.{kind}" if head == "question_answering" else "score.{kind}"
        moved = {name: _moved(value, prefix) for name, value in vars(self).items()}
        return replace(Names(**moved), head=score, qa_prefix=self.qa_prefix)


def _moved(name: str, prefix: str) -> str:
    return prefix + name.removeprefix("model.")


def weight_map(spec: ModelSpec, names: Names) -> list[Entry]:
    """Every native parameter of `spec` with the HF tensors that it consists of, in native order."""
    return list(_entries(spec, names.below(spec.head.kind)))


def _entries(spec: ModelSpec, names: Names) -> Iterator[Entry]:
    for parameter in spec.parameters():
        parts = parameter.name.split(".")
        kind = parts[-1]
        if parts[0] != "layers":
            yield rename(parameter, getattr(names, parts[0]).format(kind=kind))
            continue
        i, part = int(parts[1]), ".".join(parts[2:-1])

        def hf(attribute: str, i: int = i, kind: str = kind) -> str:
            return str(getattr(names, attribute).format(i=i, kind=kind))

        first, *others = _PARTS[part]
        if others:
            transform = f"fuse_{part.partition('.')[2]}"
            yield fuse(parameter, transform, tuple(hf(name) for name in _PARTS[part]))
        else:
            yield rename(parameter, hf(first))


# The fields of Names that a native parameter of a layer consists of.
_PARTS = {
    "attention_norm": ("attention_norm",),
    "attention.qkv": ("q", "k", "v"),
    "attention.o": ("o",),
    "attention.linear": ("attention_linear",),
    "mlp_norm": ("mlp_norm",),
    "mlp.gate_up": ("gate", "up"),
    "mlp.up": ("up",),
    "mlp.down": ("down",),
    "mlp.linear": ("mlp_linear",),
}
