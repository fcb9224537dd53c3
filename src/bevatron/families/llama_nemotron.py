"""DeciLMForCausalLM (Llama-Nemotron Super, Ultra, 51B): Llama whose layers differ.

`block_configs` says of each layer what its attention and its MLP are. Two spellings are read: the
published one (`n_heads_in_group`, `ffn_mult`) and that of later tools (`num_key_value_heads`,
`intermediate_size`). New models are written in the published spelling. All layers have the same
number of query heads, head_dim and biases; MLP widths are multiples of 256 in the published
spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bevatron.families.config_fields import (
    Field,
    Values,
    cannot,
    check,
    expect_model,
    expect_sublayer,
    flag,
    read_fields,
    refuse_others,
    require,
    size,
    skip_rotary,
    start,
    write_fields,
    wrong,
)
from bevatron.families.head_fields import ALL_HEADS, architectures, read_head, write_head
from bevatron.families.llama import FIELDS as LLAMA
from bevatron.families.registry import Config, Family, FamilyError
from bevatron.families.rope_fields import ROPE_FIELDS, read_rope, write_rope
from bevatron.families.weight_map import Entry, Names, weight_map
from bevatron.spec import (
    MLP,
    Attention,
    Init,
    LayerSpec,
    Linear,
    ModelSpec,
    Norm,
    SpecError,
    Sublayer,
)

WIDTH_MULTIPLE = 256

# Null in published files, and overruled by the blocks where they are not.
GLOBAL_SIZES = ("intermediate_size", "num_key_value_heads")
FIELDS = {name: field for name, field in LLAMA.items() if name not in GLOBAL_SIZES}

# What the model must be like, as for any Llama.
RMS_MODEL = {
    "norm.kind": "rms",
    "norm.weight": True,
    "rope.partial": 1.0,
    "rope.reversed": False,
    "embedding_norm": False,
    "logit_softcap": None,
}

# Keys of a block that must be off: the decoder has neither windows, sinks nor sparsity.
_OFF = {
    "attention": (
        "sparsify",
        "window_length",
        "num_sink_tokens",
        "use_prefill_window_in_sink_attention",
        "unshifted_sink",
        "mamba",
        "llama4",
    ),
    "ffn": ("sparsify", "moe"),
}
_KNOWN = {
    "attention": ("no_op", "replace_with_linear", "n_heads_in_group", "num_key_value_heads"),
    "ffn": ("no_op", "replace_with_linear", "ffn_mult", "intermediate_size", "gated", "hidden_act"),
}
_COUNT = size(None)
_MULT = Field("number", None)


class LlamaNemotron:
    name = "llama_nemotron"
    model_type = "nemotron-nas"
    architecture = "DeciLMForCausalLM"
    architectures = architectures("DeciLM", ALL_HEADS)

    def spec(self, config: Config) -> ModelSpec:
        others = ("block_configs", "o_proj_bias", "position_embedding_type")
        refuse_others(config, (*FIELDS, *ROPE_FIELDS, *GLOBAL_SIZES, *others))
        v = read_fields(config, FIELDS)
        require("hidden_act", v["hidden_act"], ("silu", "swish"))
        require("position_embedding_type", config.get("position_embedding_type"), (None, "rope"))
        o_bias = config.get("o_proj_bias")
        if o_bias is not None and o_bias != v["attention_bias"]:
            raise wrong("o_proj_bias", o_bias, f"as attention_bias, {v['attention_bias']}")
        try:
            return ModelSpec(
                vocab_size=v["vocab_size"],
                hidden_size=v["hidden_size"],
                layers=_layers(config, v),
                norm=Norm("rms", v["rms_norm_eps"]),
                rope=read_rope(config, v["max_position_embeddings"]),
                max_position_embeddings=v["max_position_embeddings"],
                tie_word_embeddings=v["tie_word_embeddings"],
                init=Init(v["initializer_range"]),
                head=read_head(config, self.architectures),
            )
        except SpecError as error:
            raise FamilyError(f"config.json: {error}") from error

    def config(self, spec: ModelSpec, dtype: str, base: Config | None = None) -> dict[str, Any]:
        """`init.scale_attention_output` is not written: it matters to fresh weights only.

        `auto_map` is the base's; without a base there is none, as it names files that the family
        does not hold."""
        expect_model(self, spec, RMS_MODEL)
        for i, layer in enumerate(spec.layers):
            for place, sublayer in layer.present:
                if sublayer.kind not in (place, "linear"):
                    raise cannot(self, f"layers.{i}.{place}", sublayer.kind, f"{place} or linear")
        config, full = start(self, dtype, base)
        heads, head_dim, attention_bias = self._attention(spec, config)
        wanted = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": heads,
            "head_dim": head_dim,
            "hidden_act": config.get("hidden_act", "silu"),
            "max_position_embeddings": spec.max_position_embeddings,
            "initializer_range": spec.init.std,
            "rms_norm_eps": spec.norm.eps,
            "tie_word_embeddings": spec.tie_word_embeddings,
            "attention_bias": attention_bias,
            "mlp_bias": self._mlp_bias(spec),
        }
        write_fields(config, FIELDS, wanted, full)
        if full and head_dim * heads == spec.hidden_size:
            del config["head_dim"]  # as published
        config |= dict.fromkeys(GLOBAL_SIZES)
        if config.get("o_proj_bias") is not None:
            config["o_proj_bias"] = attention_bias
        same = not full and base is not None and base.get("hidden_size") == spec.hidden_size
        config["block_configs"] = self._blocks(spec, base if same else None)
        write_rope(config, spec.rope, spec.max_position_embeddings, full)
        write_head(config, spec.head, self.architectures)
        return config

    def weight_map(self, spec: ModelSpec) -> list[Entry]:
        return weight_map(spec, Names())

    def skip(self, name: str) -> str | None:
        return skip_rotary(name)

    def _attention(self, spec: ModelSpec, config: Config) -> tuple[int, int, bool]:
        """Query heads, head_dim and bias that all attentions share. If there is no attention the
        sizes are free, and the base's stay."""
        first: Attention | None = None
        for i, attention in spec.each(Attention):
            first = first or attention
            wanted = {
                "qk_norm": False,
                "num_attention_heads": first.num_attention_heads,
                "head_dim": first.head_dim,
                "qkv_bias": first.qkv_bias,
                "o_bias": first.qkv_bias,
            }
            expect_sublayer(self, f"layers.{i}.attention", attention, wanted)
        if first is not None:
            return first.num_attention_heads, first.head_dim, first.qkv_bias
        heads = config.get("num_attention_heads", 1)
        return heads, config.get("head_dim") or spec.hidden_size // heads, False

    def _mlp_bias(self, spec: ModelSpec) -> bool:
        bias: bool | None = None
        for i, mlp in spec.each(MLP):
            bias = mlp.bias if bias is None else bias
            wanted = {"activation": "silu", "gated": True, "bias": bias}
            expect_sublayer(self, f"layers.{i}.mlp", mlp, wanted)
        return bool(bias)

    def _blocks(self, spec: ModelSpec, base: Config | None) -> list[Values]:
        """All blocks: as the base spells them where it has the same sublayer, else in the published
        form with all keys, as other readers require."""
        known = _known_parts(base)

        def part(i: int, name: str, sublayer: Sublayer | None) -> Values:
            found = known.get((name, i, sublayer)) or known.get((name, None, sublayer))
            if found is not None:
                return dict(found)
            linear = sublayer is not None and sublayer.kind == "linear"
            off = {"no_op": sublayer is None, "replace_with_linear": linear}
            if name == "ffn":
                return {"ffn_mult": self._multiplier(i, sublayer, spec), **off, "sparsify": None}
            group = sublayer.queries_per_group if isinstance(sublayer, Attention) else None
            return {
                "n_heads_in_group": group,
                "no_op": off["no_op"],
                "num_sink_tokens": None,
                "replace_with_linear": off["replace_with_linear"],
                "sparsify": None,
                "unshifted_sink": False,
                "use_prefill_window_in_sink_attention": False,
                "window_length": None,
            }

        return [
            {"attention": part(i, "attention", layer.attention), "ffn": part(i, "ffn", layer.mlp)}
            for i, layer in enumerate(spec.layers)
        ]

    def _multiplier(self, i: int, mlp: Sublayer | None, spec: ModelSpec) -> float | None:
        if not isinstance(mlp, MLP):
            return None
        f = mlp.intermediate_size
        if f % WIDTH_MULTIPLE:
            limit = f"a multiple of {WIDTH_MULTIPLE}"
            raise cannot(self, f"layers.{i}.mlp.intermediate_size", f, limit)
        return round(1.5 * f / spec.hidden_size, 6)


def width(ffn_mult: float, hidden_size: int) -> int:
    """The MLP width that `ffn_mult` means: 2/3 of mult * h, truncated, then up to 256."""
    raw = int(2 * round(ffn_mult, 6) * hidden_size / 3)
    return -(-raw // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _known_parts(base: Config | None) -> dict[tuple[str, int | None, object], Values]:
    """How the base spells each sublayer, by its index, and the first such sublayer without one.

    Several numbers mean the same width, and published ones are not always the obvious one."""
    known: dict[tuple[str, int | None, object], Values] = {}
    if base is None:
        return known
    layers = _layers(base, read_fields(base, FIELDS))
    for i, (block, layer) in enumerate(zip(base["block_configs"], layers, strict=True)):
        for name, sublayer in (("attention", layer.attention), ("ffn", layer.mlp)):
            known[name, i, sublayer] = block[name]
            known.setdefault((name, None, sublayer), block[name])
    return known


def _layers(config: Config, v: Values) -> tuple[LayerSpec, ...]:
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != v["num_hidden_layers"]:
        found = f"{len(blocks)} entries" if isinstance(blocks, list) else repr(blocks)[:60]
        raise FamilyError(
            f"config.json: block_configs is {found}, expected a list of num_hidden_layers = "
            f"{v['num_hidden_layers']} objects"
        )
    layers = []
    for i, block in enumerate(blocks):
        place = f"block_configs[{i}]"
        if not isinstance(block, Mapping) or set(block) - {"attention", "ffn", "parallel_blocks"}:
            raise wrong(place, block, "an object with attention and ffn only")
        if block.get("parallel_blocks") is not None:
            raise wrong(f"{place}.parallel_blocks", block["parallel_blocks"], "null")
        layers.append(LayerSpec(_block_attention(block, place, v), _block_mlp(block, place, v)))
    return tuple(layers)


def _part(block: Mapping[str, Any], place: str, name: str) -> tuple[Mapping[str, Any], str]:
    """A block's attention or ffn, its type and keys checked, and what it is."""
    part = block.get(name)
    where = f"{place}.{name}"
    if not isinstance(part, Mapping):
        raise wrong(where, part, "an object")
    for key, value in part.items():
        if key in _OFF[name]:
            if value is not None and value is not False:
                raise FamilyError(
                    f"config.json: {where}.{key} = {value!r} is not supported; expected null or "
                    "false (no windows, sinks, sparsity, experts or state spaces)"
                )
        elif key not in _KNOWN[name] and value is not None:
            raise FamilyError(
                f"config.json: {where}.{key} = {value!r} is not understood and may change the "
                "model's output; remove it if it does not"
            )
    no_op = check(f"{where}.no_op", part.get("no_op", False), flag(False))
    linear = check(
        f"{where}.replace_with_linear", part.get("replace_with_linear", False), flag(False)
    )
    if no_op and linear:
        raise FamilyError(f"config.json: {where} is both no_op and replace_with_linear; keep one")
    return part, "no-op" if no_op else "linear" if linear else "full"


def _block_attention(block: Mapping[str, Any], place: str, v: Values) -> Attention | Linear | None:
    part, kind = _part(block, place, "attention")
    if kind != "full":
        return Linear() if kind == "linear" else None
    where, heads = f"{place}.attention", v["num_attention_heads"]
    group, kv = part.get("n_heads_in_group"), part.get("num_key_value_heads")
    if group is None and kv is None:
        raise FamilyError(
            f"config.json: {where} has neither n_heads_in_group nor num_key_value_heads, and is "
            "neither no_op nor replace_with_linear"
        )
    if group is not None:
        check(f"{where}.n_heads_in_group", group, _COUNT)
        if heads % group or (kv is not None and kv != heads // group):
            raise FamilyError(
                f"config.json: {where}.n_heads_in_group {group} does not share out "
                f"num_attention_heads {heads}" + ("" if kv is None else f" to {kv} KV heads")
            )
        kv = heads // group
    kv = int(check(f"{where}.num_key_value_heads", kv, _COUNT))
    bias = v["attention_bias"]
    try:
        return Attention(heads, kv, v["head_dim"], qkv_bias=bias, o_bias=bias)
    except SpecError as error:
        raise FamilyError(f"config.json: {where}: {error}") from error


def _block_mlp(block: Mapping[str, Any], place: str, v: Values) -> MLP | Linear | None:
    part, kind = _part(block, place, "ffn")
    if kind != "full":
        return Linear() if kind == "linear" else None
    where = f"{place}.ffn"
    require(f"{where}.gated", part.get("gated"), (None, True))
    require(f"{where}.hidden_act", part.get("hidden_act"), (None, "silu"))
    mult, f = part.get("ffn_mult"), part.get("intermediate_size")
    if mult is None and f is None:
        raise FamilyError(
            f"config.json: {where} has neither ffn_mult nor intermediate_size, and is neither "
            "no_op nor replace_with_linear"
        )
    if mult is not None:
        meant = width(check(f"{where}.ffn_mult", mult, _MULT), v["hidden_size"])
        if f is not None and f != meant:
            raise FamilyError(
                f"config.json: {where} says intermediate_size {f} and ffn_mult {mult}, which means "
                f"{meant}; keep the one that the weights have"
            )
        f = meant
    return MLP(int(check(f"{where}.intermediate_size", f, _COUNT)), bias=v["mlp_bias"])


FAMILY: Family = LlamaNemotron()
