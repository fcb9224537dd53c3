"""NanoChatForCausalLM: no norm weights, QK norm, rope turned the other way, softcapped logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bevatron.families.config_fields import (
    ROPE_FIELDS,
    Field,
    check,
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
    "vocab_size": size(50304),
    "hidden_size": size(768),
    "intermediate_size": size(8192),
    "num_hidden_layers": size(12),
    "num_attention_heads": size(6),
    "num_key_value_heads": size(lambda v: v["num_attention_heads"], null=True),
    # Not a field of NanoChatConfig, but its attention reads it if config.json has one.
    "head_dim": size(lambda v: v["hidden_size"] // v["num_attention_heads"]),
    "hidden_act": Field("string", "relu2"),
    "max_position_embeddings": size(2048),
    "initializer_range": Field("number", 0.02, low_allowed=True),
    "rms_norm_eps": Field("number", 1e-6),
    "tie_word_embeddings": flag(False),
    "attention_bias": flag(False),
}
SOFTCAP = "final_logit_softcapping"
_CAP = Field("number", 15.0)

NAMES = Names(up="model.layers.{i}.mlp.fc1.{kind}", down="model.layers.{i}.mlp.fc2.{kind}")


class NanoChat:
    name = "nanochat"
    model_type = "nanochat"
    architecture = "NanoChatForCausalLM"

    def spec(self, config: Config) -> ModelSpec:
        refuse_others(config, (*FIELDS, *ROPE_FIELDS, SOFTCAP))
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
                qk_norm=True,
            )
            mlp = MLP(v["intermediate_size"], "relu2", gated=False)
            return ModelSpec(
                vocab_size=v["vocab_size"],
                hidden_size=v["hidden_size"],
                layers=repeated(attention, mlp, v["num_hidden_layers"]),
                norm=Norm("rms", v["rms_norm_eps"], weight=False),
                rope=replace(read_rope(config, v["max_position_embeddings"]), reversed=True),
                max_position_embeddings=v["max_position_embeddings"],
                tie_word_embeddings=v["tie_word_embeddings"],
                embedding_norm=True,
                logit_softcap=_softcap(config),
                init=Init(v["initializer_range"], scale_attention_output=True),
            )
        except SpecError as error:
            raise FamilyError(f"config.json: {error}") from error

    def config(self, spec: ModelSpec, dtype: str, base: Config | None = None) -> dict[str, Any]:
        expect_model(
            self,
            spec,
            {
                "norm.kind": "rms",
                "norm.weight": False,
                "rope.partial": 1.0,
                "rope.reversed": True,
                "embedding_norm": True,
            },
        )
        attention, mlp = uniform(self, spec)
        expect_sublayer(
            self, "layers.0.attention", attention, {"qk_norm": True, "o_bias": attention.qkv_bias}
        )
        expect_sublayer(
            self, "layers.0.mlp", mlp, {"activation": "relu2", "gated": False, "bias": False}
        )
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
            "rms_norm_eps": spec.norm.eps,
            "tie_word_embeddings": spec.tie_word_embeddings,
            "attention_bias": attention.qkv_bias,
        }
        write_fields(config, FIELDS, wanted, full)
        if attention.head_dim == spec.hidden_size // attention.num_attention_heads:
            config.pop("head_dim", None)
        if full or _softcap(config) != spec.logit_softcap:
            config[SOFTCAP] = spec.logit_softcap
        rope = replace(spec.rope, reversed=False)
        write_rope(config, rope, spec.max_position_embeddings, full)
        return config

    def weight_map(self, spec: ModelSpec) -> list[Entry]:
        return weight_map(spec, NAMES)

    def skip(self, name: str) -> str | None:
        return skip_rotary(name)


def _softcap(config: Config) -> float | None:
    """Absent means 15; null means none."""
    value = config.get(SOFTCAP, _CAP.default)
    return None if value is None else float(check(SOFTCAP, value, _CAP))


FAMILY: Family = NanoChat()
