"""NemotronForCausalLM (Nemotron-3/4, Minitron): LayerNorm1P, half-rotated heads, squared ReLU.

transformers starts LayerNorm1P weights at one, which multiplies by two; a fresh model here starts
them at zero, the identity, as those who trained these models did.
"""

from __future__ import annotations

from typing import Any

from bevatron.families.config_fields import (
    ROPE_FIELDS,
    Field,
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

PARTIAL = 0.5  # share of a head that is rotated if config.json says nothing

FIELDS = {
    "vocab_size": size(256000),
    "hidden_size": size(6144),
    "intermediate_size": size(24576),
    "num_hidden_layers": size(32),
    "num_attention_heads": size(48),
    # transformers 5.23 fails to build the model from a null; what it means is not in doubt.
    "num_key_value_heads": size(lambda v: v["num_attention_heads"], null=True),
    "head_dim": size(lambda v: v["hidden_size"] // v["num_attention_heads"], null=True),
    "hidden_act": Field("string", "relu2"),
    "max_position_embeddings": size(4096),
    "initializer_range": Field("number", 0.0134, low_allowed=True),
    "norm_eps": Field("number", 1e-5),
    "tie_word_embeddings": flag(False),
    "attention_bias": flag(False),
    "mlp_bias": flag(False),
}


class Nemotron:
    name = "nemotron"
    model_type = "nemotron"
    architecture = "NemotronForCausalLM"

    def spec(self, config: Config) -> ModelSpec:
        refuse_others(config, (*FIELDS, *ROPE_FIELDS))
        v = read_fields(config, FIELDS)
        require("hidden_act", v["hidden_act"], ("relu2",))
        bias = v["attention_bias"]
        try:
            attention = Attention(
                v["num_attention_heads"],
                v["num_key_value_heads"],
                v["head_dim"],
                qkv_bias=bias,
                o_bias=bias,
            )
            mlp = MLP(v["intermediate_size"], "relu2", gated=False, bias=v["mlp_bias"])
            return ModelSpec(
                vocab_size=v["vocab_size"],
                hidden_size=v["hidden_size"],
                layers=repeated(attention, mlp, v["num_hidden_layers"]),
                norm=Norm("layernorm1p", v["norm_eps"]),
                rope=read_rope(config, v["max_position_embeddings"], PARTIAL),
                max_position_embeddings=v["max_position_embeddings"],
                tie_word_embeddings=v["tie_word_embeddings"],
                init=Init(v["initializer_range"]),
            )
        except SpecError as error:
            raise FamilyError(f"config.json: {error}") from error

    def config(self, spec: ModelSpec, dtype: str, base: Config | None = None) -> dict[str, Any]:
        """`init.scale_attention_output` is not written: it matters to fresh weights only."""
        expect_model(
            self,
            spec,
            {
                "norm.kind": "layernorm1p",
                "rope.reversed": False,
                "embedding_norm": False,
                "logit_softcap": None,
            },
        )
        attention, mlp = uniform(self, spec)
        expect_sublayer(
            self, "layers.0.attention", attention, {"qk_norm": False, "o_bias": attention.qkv_bias}
        )
        expect_sublayer(self, "layers.0.mlp", mlp, {"activation": "relu2", "gated": False})
        config, full = start(self, dtype, base)
        wanted = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": mlp.intermediate_size,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": attention.num_attention_heads,
            "num_key_value_heads": attention.num_key_value_heads,
            "head_dim": attention.head_dim,
            "hidden_act": "relu2",
            "max_position_embeddings": spec.max_position_embeddings,
            "initializer_range": spec.init.std,
            "norm_eps": spec.norm.eps,
            "tie_word_embeddings": spec.tie_word_embeddings,
            "attention_bias": attention.qkv_bias,
            "mlp_bias": mlp.bias,
        }
        write_fields(config, FIELDS, wanted, full)
        write_rope(config, spec.rope, spec.max_position_embeddings, full, PARTIAL)
        return config

    def weight_map(self, spec: ModelSpec) -> list[Entry]:
        return weight_map(spec, Names())

    def skip(self, name: str) -> str | None:
        return skip_rotary(name)


FAMILY: Family = Nemotron()
