"""The weight map: how Hugging Face tensors make up native parameters, as moved rows.

An `Entry` says of one native parameter which HF tensors it consists of and where their rows go.
It is read in both directions: import copies source rows to native rows, export copies them back.
A row is a vector of the last dimension (one element of a 1-D tensor); leading dimensions count as
one. There is no arithmetic here, so a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bevatron.spec.model import MLP, Attention, HeadKind, ModelSpec, ParameterSpec, Shape


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


def fuse_qkv(native: ParameterSpec, attention: Attention, sources: tuple[str, str, str]) -> Entry:
    """Query, key and value rows interleaved by KV group: [group][q heads, k, v][head_dim]."""
    q_rows = attention.queries_per_group * attention.head_dim
    kv_rows = attention.head_dim
    rows, at = [], 0
    for group in range(attention.num_key_value_heads):
        for source, count in ((0, q_rows), (1, kv_rows), (2, kv_rows)):
            rows.append(Rows(source, group * count, at, count))
            at += count
    tail = native.shape[1:]
    groups = attention.num_key_value_heads
    shapes = ((groups * q_rows, *tail), (groups * kv_rows, *tail), (groups * kv_rows, *tail))
    parts = tuple(Source(name, shape) for name, shape in zip(sources, shapes, strict=True))
    return Entry(native, "fuse_qkv", parts, tuple(rows))


def fuse_gate_up(native: ParameterSpec, sources: tuple[str, str]) -> Entry:
    """Gate rows, then up rows: [2, intermediate, hidden]."""
    f, shape = native.shape[1], native.shape[1:]
    parts = (Source(sources[0], shape), Source(sources[1], shape))
    return Entry(native, "fuse_gate_up", parts, (Rows(0, 0, 0, f), Rows(1, 0, f, f)))


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

        if part == "attention.qkv":
            attention = spec.layers[i].attention
            assert isinstance(attention, Attention)
            yield fuse_qkv(parameter, attention, (hf("q"), hf("k"), hf("v")))
        elif part == "mlp.gate_up":
            assert isinstance(spec.layers[i].mlp, MLP)
            yield fuse_gate_up(parameter, (hf("gate"), hf("up")))
        else:
            yield rename(parameter, hf(_ATTRIBUTE[part]))


_ATTRIBUTE = {
    "attention_norm": "attention_norm",
    "attention.o": "o",
    "attention.linear": "attention_linear",
    "mlp_norm": "mlp_norm",
    "mlp.up": "up",
    "mlp.down": "down",
    "mlp.linear": "mlp_linear",
}
