"""LlamaForCausalLM: the same layer throughout (Llama 2, 3, 3.1, 3.2 and whoever borrows the name).

Defaults are those of transformers 5.23's LlamaConfig. Layers that differ from one another belong to
`llama_nemotron`.
"""

from __future__ import annotations

from typing import Any

from bevatron.families.config_fields import (
    ROPE_FIELDS,
    Field,
    cannot,
    expect_model,
    expect_sublayer,
    flag,
    read_fields,
    read_rope,
    refuse_others,
    repeated,
    require,
    size,
    skip_rotary,
    start,
    uniform,
    write_fields,
    write_rope,
)
from bevatron.families.family import Config, Family, FamilyError
from bevatron.families.weight_map import Entry, Names, weight_map
from bevatron.spec.model import MLP, Attention, Init, ModelSpec, Norm, SpecError

FIELDS = {
    "vocab_size": size(32000),
    "hidden_size": size(4096),
    "intermediate_size": size(11008),
    "num_hidden_layers": size(32),
    "num_attention_heads": size(32),
    "num_key_value_heads": size(lambda v: v["num_attention_heads"], null=True),
    "head_dim": size(lambda v: v["hidden_size"] // v["num_attention_heads"], null=True),
    "hidden_act": Field("string", "silu"),
    "max_position_embeddings": size(2048),
    "initializer_range": Field("number", 0.02, low_allowed=True),
    "rms_norm_eps": Field("number", 1e-6),
    "tie_word_embeddings": flag(False),
    "attention_bias": flag(False),
    "mlp_bias": flag(False),
}


class Llama:
    name = "llama"
    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def spec(self, config: Config) -> ModelSpec:
        refuse_others(config, (*FIELDS, *ROPE_FIELDS))
        v = read_fields(config, FIELDS)
        require("hidden_act", v["hidden_act"], ("silu", "swish"))
        if v["hidden_size"] % v["num_attention_heads"]:
            raise FamilyError(
                f"config.json: hidden_size {v['hidden_size']} is not a multiple of "
                f"num_attention_heads {v['num_attention_heads']}, which LlamaForCausalLM requires "
                "even with an explicit head_dim"
            )
        bias = v["attention_bias"]
        try:
            attention = Attention(
                v["num_attention_heads"],
                v["num_key_value_heads"],
                v["head_dim"],
                qkv_bias=bias,
                o_bias=bias,
            )
            mlp = MLP(v["intermediate_size"], bias=v["mlp_bias"])
            return ModelSpec(
                vocab_size=v["vocab_size"],
                hidden_size=v["hidden_size"],
                layers=repeated(attention, mlp, v["num_hidden_layers"]),
                norm=Norm("rms", v["rms_norm_eps"]),
                rope=read_rope(config, v["max_position_embeddings"]),
                max_position_embeddings=v["max_position_embeddings"],
                tie_word_embeddings=v["tie_word_embeddings"],
                init=Init(v["initializer_range"]),
            )
        except SpecError as error:
            raise FamilyError(f"config.json: {error}") from error

    def config(self, spec: ModelSpec, dtype: str, base: Config | None = None) -> dict[str, Any]:
        """`init.scale_attention_output` is not written: it matters to fresh weights only."""
        expect_model(self, spec, RMS_MODEL)
        attention, mlp = uniform(self, spec)
        expect_sublayer(
            self, "layers.0.attention", attention, {"qk_norm": False, "o_bias": attention.qkv_bias}
        )
        expect_sublayer(self, "layers.0.mlp", mlp, {"activation": "silu", "gated": True})
        heads = attention.num_attention_heads
        if spec.hidden_size % heads:
            raise cannot(
                self,
                "layers.0.attention.num_attention_heads",
                heads,
                f"a divisor of hidden_size {spec.hidden_size}",
            )
        config, full = start(self, dtype, base)
        wanted = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": mlp.intermediate_size,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": heads,
            "num_key_value_heads": attention.num_key_value_heads,
            "head_dim": attention.head_dim,
            "hidden_act": config.get("hidden_act", "silu"),
            "max_position_embeddings": spec.max_position_embeddings,
            "initializer_range": spec.init.std,
            "rms_norm_eps": spec.norm.eps,
            "tie_word_embeddings": spec.tie_word_embeddings,
            "attention_bias": attention.qkv_bias,
            "mlp_bias": mlp.bias,
        }
        write_fields(config, FIELDS, wanted, full)
        write_rope(config, spec.rope, spec.max_position_embeddings, full)
        return config

    def weight_map(self, spec: ModelSpec) -> list[Entry]:
        return weight_map(spec, Names())

    def skip(self, name: str) -> str | None:
        return skip_rotary(name)


# What a model must be like for any of the Llama architectures.
RMS_MODEL = {
    "norm.kind": "rms",
    "norm.weight": True,
    "rope.partial": 1.0,
    "rope.reversed": False,
    "embedding_norm": False,
    "logit_softcap": None,
}

FAMILY: Family = Llama()
