"""Nanotron's model_config.json <-> ModelSpec.

The fields are those of Hugging Face's Llama and mean the same, so the llama family reads them. What
differs: heads always have hidden_size / num_attention_heads dimensions, `attention_bias` puts
biases on q, k and v but not on o (in its Llama class it does nothing), and `rope_scaling` is stored
but never applied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bevatron.families.config_fields import (
    TOKEN_IDS,
    flag,
    read_field,
    refuse_others,
    require,
    shown,
)
from bevatron.families.registry import FamilyError, by_name
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec

Config = Mapping[str, Any]

NAME = "model_config.json"

# Read by the llama family under the same names.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_theta"),
)
_OWN = ("attention_bias", "rope_interleaved", "interleaved_rotary", "rope_scaling")
# Fields of its config classes (2023 to 2026, all branches) that no forward pass reads, or that
# choose between kernels of one function: which class this is, losses and statistics of training,
# masks between the documents of a sample, and how ring attention communicates.
_HARMLESS = (
    *("is_llama_config", "is_qwen2_config", "z_loss_enabled", "z_loss_coefficient"),
    *("log_attn_probs", "ring_attn_heads_k_stride", "intra_doc_attention", "for_inference"),
    *("moe_loss_weight", "moe_z_loss_weight"),
    *("hybrid_bp_loss_enabled", "hybrid_bp_loss_k", "hybrid_bp_bp_weight", "hybrid_bp_nl_weight"),
    *("hybrid_bp_weight_special_ce", "hybrid_bp_include_dna_special_ce", "hybrid_bp_dna_oov_id"),
    *("hybrid_bp_dna_kmer_start_id", "hybrid_bp_dna_kmer_end_id"),
)


class _Acts(NamedTuple):
    """A field that changes numbers: what it does, and whether a value of it does nothing, given
    the value and the whole config. Null never does anything."""

    what: str
    inert: Callable[[Any, Config], bool]


def _without_mla(_: Any, raw: Config) -> bool:
    return raw.get("use_mla") is False


def _context(raw: Config) -> float:
    context = raw.get("max_position_embeddings")
    return context if type(context) is int else math.inf


_LATENT = _Acts("sizes of multi-head latent attention", _without_mla)
_ACTING = {
    "moe_config": _Acts(
        "layers with experts",
        lambda value, _: isinstance(value, dict) and value.get("layers") == [],
    ),
    "moe_num_experts": _Acts("layers with experts", lambda value, _: value == 1),
    "num_experts_per_tok": _Acts(
        "layers with experts", lambda _, raw: raw.get("moe_num_experts", 1) == 1
    ),
    "sliding_window_size": _Acts(
        "attention that sees fewer tokens than the context has",
        lambda value, raw: type(value) is int and value >= _context(raw),
    ),
    "no_rope_layer": _Acts("layers without rotation", lambda value, _: False),
    "rope_seq_len_interpolation_factor": _Acts(
        "positions divided by it before they rotate", lambda value, _: value == 1
    ),
    "use_mla": _Acts("multi-head latent attention", lambda value, _: value is False),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), _LATENT),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _LATENT),
}


@dataclass(frozen=True)
class Meaning:
    """What a model_config.json says. `interleaved`: rows of q and k heads come in rotated pairs."""

    spec: ModelSpec
    interleaved: bool
    notes: tuple[str, ...]


def read_model_config(raw: Config) -> Meaning:
    """Raises FamilyError that names the field, and the file as model_config.json."""
    try:
        return _read(raw)
    except FamilyError as error:
        raise FamilyError(str(error).replace("config.json", NAME, 1)) from error


def _read(raw: Config) -> Meaning:
    for name, acts in _ACTING.items():
        value = raw.get(name)
        if value is not None and not acts.inert(value, raw):
            raise FamilyError(
                f"config.json: {name} = {shown(value)} says {acts.what}, which is not supported"
            )
    refuse_others(raw, (*_SHARED, *_OWN, *_HARMLESS, *_ACTING, "flex_attention_mask"))
    require("flex_attention_mask", raw.get("flex_attention_mask"), (None, "document"))
    require("_is_using_mup", raw.get("_is_using_mup"), (None, False))
    biased = read_field(raw, "attention_bias", flag(False), {})
    biased = biased and not raw.get("is_llama_config")  # its Llama never has biases
    llama = by_name("llama")
    config = {name: raw[name] for name in _SHARED if name in raw}
    spec = llama.spec({"architectures": [llama.architecture], **config})
    if biased:
        spec = replace(spec, layers=tuple(_with_qkv_bias(layer) for layer in spec.layers))
    notes = []
    if raw.get("rope_scaling"):
        notes.append(
            f"rope_scaling {shown(raw['rope_scaling'])} was dropped: Nanotron stores it and never "
            "applies it; if the weights were made for it, convert the model they came from instead"
        )
    # For a week of March 2025 the rope of its Qwen2 read the second name, and not the first.
    field = "interleaved_rotary" if "interleaved_rotary" in raw else "rope_interleaved"
    if field not in raw:
        notes.append(
            f"{NAME} has no rope_interleaved, so Nanotron's default, false, was taken; versions "
            "before the field existed (2024) rotated interleaved: for their checkpoints set it to "
            "true"
        )
    interleaved = read_field(raw, field, flag(False), {})
    if interleaved and raw.get("is_qwen2_config") and not raw.get("_fused_rotary_emb"):
        notes.append(
            f"{field} was taken to mean the rotation of neighbouring dimensions; the "
            "unfused rope of Nanotron's Qwen2 pairs others with it in some versions, so compare "
            "outputs if the model was trained with that"
        )
    return Meaning(spec, interleaved, tuple(notes))


def _with_qkv_bias(layer: LayerSpec) -> LayerSpec:
    assert isinstance(layer.attention, Attention)
    return replace(layer, attention=replace(layer.attention, qkv_bias=True))


def hf_config(raw: Config, spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """The config.json of the same model, with its token ids.

    Args:
        spec: what `raw` means; `dtype`: as config.json spells it.
    """
    llama = by_name("llama")
    base = {"model_type": "nanotron", **{name: raw.get(name) for name in TOKEN_IDS}}
    first = next(a for _, a in spec.each(Attention))
    if not first.qkv_bias:
        return llama.config(spec, dtype, base)
    # Biases on q, k and v alone are what Qwen2ForCausalLM has, always.
    plain = replace(first, qkv_bias=False)
    layers = tuple(replace(layer, attention=plain) for layer in spec.layers)
    config = llama.config(replace(spec, layers=layers), dtype, base)
    for name in ("attention_bias", "mlp_bias", "head_dim"):
        config.pop(name, None)
    return config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def model_config(spec: ModelSpec, base: Config | None) -> tuple[dict[str, Any], list[str]]:
    """The model_config.json of `spec`, and notes.

    It is read back and compared with `spec`, so whatever the format has no word for is an error.

    Args:
        base: the model's config.json, for its token ids.
    Raises FamilyError naming the first part of the spec that Nanotron cannot express.
    """
    attention = next((a for _, a in spec.each(Attention)), None)
    mlp = next((m for _, m in spec.each(MLP)), None)
    if attention is None or mlp is None:
        raise FamilyError(
            f"Nanotron: the model has no {'mlp' if attention else 'attention'} in any layer; every "
            "layer must have both"
        )
    ids, notes = _token_ids(base or {})
    config = {
        "attention_bias": attention.qkv_bias,
        **ids,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": float(spec.init.std),
        "intermediate_size": mlp.intermediate_size,
        "is_qwen2_config": True,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": attention.num_attention_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": attention.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": float(spec.norm.eps),
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": float(spec.rope.theta),
        "tie_word_embeddings": spec.tied,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    means = replace(read_model_config(config).spec, init=spec.init)
    if found := _difference("", spec, means):
        place, here, there = found
        raise FamilyError(f"Nanotron: {place} is {here}; it can only be {there}")
    return config, notes


def _token_ids(base: Config) -> tuple[dict[str, Any], list[str]]:
    """Token ids as Nanotron takes them: one of each. Those that are unknown are left out."""
    ids, notes = {}, []
    for name in TOKEN_IDS:
        value = base.get(name)
        if isinstance(value, list) and value:
            notes.append(f"{name} {value}: Nanotron takes one, so the first was written")
            value = value[0]
        if value is not None or name == "pad_token_id":
            ids[name] = value
    return ids, notes


def _difference(path: str, a: Any, b: Any) -> tuple[str, Any, Any] | None:
    """The first place where two specs differ: its path and both values."""
    if a == b:
        return None
    pairs: list[tuple[str, Any, Any]] = []
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        names = [f.name for f in dataclasses.fields(a)]
        pairs = [(name, getattr(a, name), getattr(b, name)) for name in names]
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    for name, x, y in pairs:
        if found := _difference(f"{path}.{name}".removeprefix("."), x, y):
            return found
    return path, _kind(a), _kind(b)


def _kind(value: Any) -> Any:
    return type(value).__name__ if dataclasses.is_dataclass(value) else value
