"""Strategies for whole models: a spec of some family, and the Hugging Face folder that holds it.

A new kind of rope, layer or head is one more line in `ropes`, `FAMILIES` or `specs` here; what it
should become is said once more, independently, in `fused`.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from bevatron.families.registry import by_name
from bevatron.spec import MLP, Attention, LayerSpec, Linear, ModelSpec, Norm, Rope

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ropes(partial: tuple[float, ...] = (1.0,)) -> st.SearchStrategy[Rope]:
    theta, factor, share = map(st.sampled_from, ([1e4, 5e5], [2.0, 8.0], partial))
    kinds = [
        st.builds(Rope, theta, st.just("default"), share),
        st.builds(Rope, theta, st.just("linear"), share, factor=factor),
        st.builds(
            Rope,
            theta,
            st.just("llama3"),
            share,
            factor=factor,
            low_freq_factor=st.just(1.0),
            high_freq_factor=st.just(4.0),
            original_max_position_embeddings=st.sampled_from([16, 8192]),
        ),
    ]
    return st.one_of(kinds)


@st.composite
def attentions(draw, heads: int, head_dim: int, bias: bool, qk_norm: bool = False) -> Attention:
    """Any number of KV heads that divides the query heads."""
    groups = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    return Attention(heads, groups, head_dim, qkv_bias=bias, o_bias=bias, qk_norm=qk_norm)


@st.composite
def specs(draw, family: str) -> ModelSpec:
    """Any model that the family can spell, in small."""
    heads, head_dim = draw(st.integers(1, 6)), draw(st.sampled_from([4, 8]))
    hidden = heads * draw(st.sampled_from([2, 8]))
    bias, mlp_bias = draw(st.booleans()), draw(st.booleans())
    width, count = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    eps = draw(st.sampled_from([1e-5, 1e-6]))
    spec = ModelSpec(
        vocab_size=draw(st.integers(1, 70)),
        hidden_size=hidden,
        layers=(LayerSpec(),),
        norm=Norm("rms", eps),
        rope=draw(ropes()),
        max_position_embeddings=64,
        tie_word_embeddings=draw(st.booleans()),
    )
    attention = draw(attentions(heads, head_dim, bias, qk_norm=family == "nanochat"))
    if family == "llama":
        layer = LayerSpec(attention, MLP(width, bias=mlp_bias))
        return replace(spec, layers=(layer,) * count)
    if family == "nemotron":
        layer = LayerSpec(attention, MLP(width, "relu2", gated=False, bias=mlp_bias))
        rope = draw(ropes((0.5, 1.0)))
        return replace(spec, layers=(layer,) * count, norm=Norm("layernorm1p", eps), rope=rope)
    if family == "nanochat":
        return replace(
            spec,
            layers=(LayerSpec(attention, MLP(width, "relu2", gated=False)),) * count,
            norm=Norm("rms", eps, weight=False),
            rope=replace(spec.rope, reversed=True),
            embedding_norm=True,
            logit_softcap=draw(st.sampled_from([None, 15.0, 30.0])),
            init=replace(spec.init, scale_attention_output=True),
        )
    assert family == "llama_nemotron"
    any_attention = st.one_of(st.none(), st.just(Linear()), attentions(heads, head_dim, bias))
    widths = st.sampled_from([256, 512])
    any_mlp = st.one_of(
        st.none(), st.just(Linear()), st.builds(MLP, widths, bias=st.just(mlp_bias))
    )
    layers = st.lists(st.builds(LayerSpec, any_attention, any_mlp), min_size=1, max_size=6)
    return replace(spec, layers=tuple(draw(layers)))


FAMILIES = ("llama", "nemotron", "nanochat", "llama_nemotron")


@dataclass(frozen=True)
class Model:
    """What was drawn. `shards`: file -> tensor names, in the order of their bytes."""

    family: str
    spec: ModelSpec
    config: dict = field(repr=False)
    tensors: dict[str, torch.Tensor] = field(repr=False)
    shards: dict[str, list[str]] = field(repr=False)
    by_hand: bool
    seed: int

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config, indent=self.seed % 4))
        (folder / "tokenizer.json").write_text('{"a":\r\n 1}')
        for file, names in self.shards.items():
            tensors = {name: self.tensors[name] for name in names}
            if self.by_hand:
                write_by_hand(folder / file, tensors, random.Random(self.seed))
            else:
                save_file(tensors, folder / file, metadata={"format": "pt"})
        if len(self.shards) > 1 or self.seed % 2:
            place = {name: file for file, names in self.shards.items() for name in names}
            index = {"metadata": {"total_size": 1}, "weight_map": place}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def write_by_hand(path: Path, tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """A legal file that no library writes: names, offsets and keys in any order, odd spaces."""
    data, table = b"", []
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = next(k for k, v in DTYPES.items() if v == tensor.dtype)
        entry = {"dtype": dtype, "shape": list(tensor.shape)}
        entry["data_offsets"] = [len(data), len(data) + len(raw)]
        keys = rng.sample(sorted(entry), 3)
        table.append((name, {key: entry[key] for key in keys}))
        data += raw
    if rng.random() < 0.5:
        table.append(("__metadata__", {"format": "pt", "ü": "\n"}))
    rng.shuffle(table)
    text = json.dumps(dict(table), indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
    header = text.encode() + b" " * rng.randint(0, 9)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@st.composite
def models(draw, family: str, any_bits: bool = True) -> Model:
    """A model in one or several files, its tensors shuffled, of one dtype or (those that are not
    fused) of several.

    Args:
        any_bits: values are random bits, NaN and infinity among them; else ordinary numbers and
            the special ones that a conversion must round properly.
    """
    spec = draw(specs(family))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = random.Random(seed)
    main = draw(st.sampled_from(sorted(DTYPES)))
    mixed = draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in by_name(family).weight_map(spec):  # names and shapes; `fused` checks the rest
        dtype = DTYPES[rng.choice(sorted(DTYPES)) if mixed else main]
        for source in entry.sources:
            tensors[source.name] = values(source.shape, dtype, generator, any_bits)
    if spec.tie_word_embeddings and draw(st.booleans()):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if draw(st.booleans()):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4, generator=generator)
    names = list(tensors)
    rng.shuffle(names)
    count = draw(st.integers(1, min(4, len(names))))
    cuts = sorted(rng.sample(range(1, len(names)), count - 1))
    edges = [0, *cuts, len(names)]
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    shards = {f: names[a:b] for f, a, b in zip(files, edges[:-1], edges[1:], strict=True)}
    if count == 1:
        shards = {"model.safetensors": names}
    config = by_name(family).config(spec, str(DTYPES[main]).removeprefix("torch."))
    return Model(family, spec, config, tensors, shards, draw(st.booleans()), seed)


def values(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, any_bits: bool
) -> torch.Tensor:
    if any_bits:
        raw = torch.randint(
            0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator
        )
        return raw.view(dtype).reshape(shape)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.randint(-30, 12, shape, generator=generator).double().exp2()
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 65504.0, 3e-8])
    choice = torch.randint(0, 40, shape, generator=generator)
    picked = special.double()[choice.clamp(max=7)]
    return torch.where(choice < 8, picked, numbers * scale).to(dtype)


def fused(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """What the native tensors should be, from the document of the format and torch alone."""
    t, spec = model.tensors, model.spec
    down, up = ("fc2", "fc1") if model.family == "nanochat" else ("down_proj", "up_proj")
    yield "embed.weight", t["model.embed_tokens.weight"]
    for i, layer in enumerate(spec.layers):
        hf, native = f"model.layers.{i}", f"layers.{i}"
        norms = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
        for part, norm in norms.items():
            for kind in ("weight", "bias"):
                if f"{hf}.{norm}.{kind}" in t:
                    yield f"{native}.{part}_norm.{kind}", t[f"{hf}.{norm}.{kind}"]
        a, m = layer.attention, layer.mlp
        if isinstance(a, Linear):
            linear = t[f"{hf}.self_attn.linear_attn.weight"]
            yield f"{native}.attention.linear.weight", linear
        elif a is not None:
            groups = a.num_key_value_heads
            for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
                parts = [t[f"{hf}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                tail = parts[0].shape[1:]
                by_group = [p.reshape(groups, -1, a.head_dim, *tail) for p in parts]
                whole = torch.cat(by_group, dim=1).reshape(-1, *tail)
                yield f"{native}.attention.qkv.{kind}", whole
                yield f"{native}.attention.o.{kind}", t[f"{hf}.self_attn.o_proj.{kind}"]
        if isinstance(m, Linear):
            yield f"{native}.mlp.linear.weight", t[f"{hf}.mlp.linear_mlp.weight"]
        elif m is not None:
            for kind in ("weight", "bias") if m.bias else ("weight",):
                if m.gated:
                    both = [t[f"{hf}.mlp.{x}_proj.{kind}"] for x in ("gate", "up")]
                    yield f"{native}.mlp.gate_up.{kind}", torch.stack(both)
                else:
                    yield f"{native}.mlp.up.{kind}", t[f"{hf}.mlp.{up}.{kind}"]
                yield f"{native}.mlp.down.{kind}", t[f"{hf}.mlp.{down}.{kind}"]
    for kind in ("weight", "bias"):
        if f"model.norm.{kind}" in t:
            yield f"final_norm.{kind}", t[f"model.norm.{kind}"]
    if not spec.tie_word_embeddings:
        yield "head.weight", t["lm_head.weight"]
