"""NanoChatForCausalLM: no norm weights, QK norm, rope turned the other way, softcapped logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bevatron.families.config_fields import Field, check, flag, size
from bevatron.families.registry import Config, Family
from bevatron.families.uniform_family import Uniform
from bevatron.families.weight_map import Names
from bevatron.spec import MLP, Attention, Init, ModelSpec, Norm

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

_NAMES = Names(up="model.layers.{i}.mlp.fc1.{kind}", down="model.layers.{i}.mlp.fc2.{kind}")


@dataclass(frozen=True)
class NanoChat(Uniform):
    """With the one field more that this family has."""

    def spec(self, config: Config) -> ModelSpec:
        others = {k: v for k, v in config.items() if k != SOFTCAP}
        return replace(super().spec(others), logit_softcap=_softcap(config))

    def config(self, spec: ModelSpec, dtype: str, base: Config | None = None) -> dict[str, Any]:
        config = super().config(replace(spec, logit_softcap=None), dtype, base)
        attention = next(a for _, a in spec.each(Attention))
        if attention.head_dim == spec.hidden_size // attention.num_attention_heads:
            config.pop("head_dim", None)
        if base is None or _softcap(config) != spec.logit_softcap:
            config[SOFTCAP] = spec.logit_softcap
        return config


def _softcap(config: Config) -> float | None:
    """Absent means 15; null means none."""
    value = config.get(SOFTCAP, _CAP.default)
    return None if value is None else float(check(SOFTCAP, value, _CAP))


FAMILY: Family = NanoChat(
    name="nanochat",
    model_type="nanochat",
    stem="NanoChat",
    fields=FIELDS,
    eps="rms_norm_eps",
    activations=("relu2",),
    norm=Norm("rms", weight=False),
    mlp=MLP(1, "relu2", gated=False),
    qk_norm=True,
    names=_NAMES,
    heads=("causal_lm", "none"),
    reversed_rope=True,
    model={"embedding_norm": True},
    init=Init(scale_attention_output=True),
)
