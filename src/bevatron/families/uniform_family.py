"""A family whose layers are all the same, described by the fields of its config.json.

The description is read in both directions: from fields to a spec, and from a spec to fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bevatron.families.config_fields import (
    Fields,
    Values,
    cannot,
    expect_model,
    expect_sublayer,
    read_fields,
    refuse_others,
    repeated,
    require,
    skip_rotary,
    start,
    uniform,
    write_fields,
    wrong,
)
from bevatron.families.head_fields import ALL_HEADS, architectures, read_head, write_head
from bevatron.families.registry import Config, FamilyError
from bevatron.families.rope_fields import ROPE_FIELDS, read_rope, write_rope
from bevatron.families.weight_map import Entry, Names, weight_map
from bevatron.spec import MLP, Attention, HeadKind, Init, ModelSpec, Norm, SpecError


@dataclass(frozen=True)
class Uniform:
    """A family of models that repeat one layer.

    Attributes:
        stem: of the class names, as in LlamaForCausalLM; `heads`: which of those classes exist.
        fields: what config.json has; `eps`: the name of the norm's epsilon among them;
            `must_be_null`: fields that change the model unless they stand there as null.
        activations: the names that `hidden_act` may have, all of which mean `mlp.activation`.
        norm, mlp, attention: what is fixed of these parts; sizes, biases and eps come from fields.
        partial: the share of a head that is rotated if config.json is silent; None if the family
            always rotates whole heads. `reversed_rope`: see `Rope`.
        model: fixed fields of ModelSpec.
        heads_divide_hidden: whether transformers insists on it even with an explicit head_dim.
    """

    name: str
    model_type: str
    stem: str
    fields: Fields
    eps: str
    activations: tuple[str, ...]
    norm: Norm = Norm()  # noqa: RUF009  (frozen)
    mlp: MLP = MLP(1)  # noqa: RUF009
    qk_norm: bool = False
    names: Names = Names()  # noqa: RUF009
    heads: tuple[HeadKind, ...] = ALL_HEADS
    partial: float | None = None
    reversed_rope: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    init: Init = Init()  # noqa: RUF009
    heads_divide_hidden: bool = False
    must_be_null: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return f"{self.stem}ForCausalLM"

    @property
    def architectures(self) -> dict[str, HeadKind]:
        return architectures(self.stem, self.heads)

    def spec(self, config: Config) -> ModelSpec:
        refuse_others(config, (*self.fields, *ROPE_FIELDS))
        for name in self.must_be_null:
            if name not in config:
                raise wrong(name, "absent", "null: without the field transformers assumes a value")
        v = read_fields(config, self.fields)
        require("hidden_act", v["hidden_act"], self.activations)
        if self.heads_divide_hidden and v["hidden_size"] % v["num_attention_heads"]:
            raise FamilyError(
                f"config.json: hidden_size {v['hidden_size']} is not a multiple of "
                f"num_attention_heads {v['num_attention_heads']}, which {self.architecture} "
                "requires even with an explicit head_dim"
            )
        bias = v.get("attention_bias", False)
        try:
            attention = Attention(
                v["num_attention_heads"],
                v["num_key_value_heads"],
                v["head_dim"],
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=self.qk_norm,
            )
            mlp = replace(
                self.mlp, intermediate_size=v["intermediate_size"], bias=v.get("mlp_bias", False)
            )
            rope = read_rope(config, v["max_position_embeddings"], self.partial)
            return ModelSpec(
                vocab_size=v["vocab_size"],
                hidden_size=v["hidden_size"],
                layers=repeated(attention, mlp, v["num_hidden_layers"]),
                norm=replace(self.norm, eps=v[self.eps]),
                rope=replace(rope, reversed=self.reversed_rope),
                max_position_embeddings=v["max_position_embeddings"],
                tie_word_embeddings=v["tie_word_embeddings"],
                init=replace(self.init, std=v["initializer_range"]),
                head=read_head(config, self.architectures),
                **self.model,
            )
        except SpecError as error:
            raise FamilyError(f"config.json: {error}") from error

    def config(self, spec: ModelSpec, dtype: str, base: Config | None = None) -> dict[str, Any]:
        """`init.scale_attention_output` is not written: it matters to fresh weights only."""
        wanted: Values = {
            "norm.kind": self.norm.kind,
            "norm.weight": self.norm.weight,
            "rope.reversed": self.reversed_rope,
            "embedding_norm": False,
            "logit_softcap": None,
        }
        if self.partial is None:
            wanted["rope.partial"] = 1.0
        expect_model(self, spec, wanted | dict(self.model))
        attention, mlp = uniform(self, spec)
        biased = "attention_bias" in self.fields
        wanted = {"qk_norm": self.qk_norm, "o_bias": attention.qkv_bias}
        wanted |= {} if biased else {"qkv_bias": False}
        expect_sublayer(self, "layers.0.attention", attention, wanted)
        wanted = {"activation": self.mlp.activation, "gated": self.mlp.gated}
        wanted |= {} if "mlp_bias" in self.fields else {"bias": False}
        expect_sublayer(self, "layers.0.mlp", mlp, wanted)
        heads = attention.num_attention_heads
        if self.heads_divide_hidden and spec.hidden_size % heads:
            limit = f"a divisor of hidden_size {spec.hidden_size}"
            raise cannot(self, "layers.0.attention.num_attention_heads", heads, limit)
        config, full = start(self, dtype, base)
        named = config.get("hidden_act")
        values = {
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": mlp.intermediate_size,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": heads,
            "num_key_value_heads": attention.num_key_value_heads,
            "head_dim": attention.head_dim,
            "hidden_act": named if named in self.activations else self.activations[0],
            "max_position_embeddings": spec.max_position_embeddings,
            "initializer_range": spec.init.std,
            self.eps: spec.norm.eps,
            "tie_word_embeddings": spec.tie_word_embeddings,
            "attention_bias": attention.qkv_bias,
            "mlp_bias": mlp.bias,
        }
        write_fields(config, self.fields, values, full)
        config |= dict.fromkeys(self.must_be_null)
        rope = replace(spec.rope, reversed=False)
        write_rope(config, rope, spec.max_position_embeddings, full, self.partial)
        try:
            write_head(config, spec.head, self.architectures)
        except FamilyError as error:
            raise cannot(self, "head.kind", spec.head.kind, " or ".join(self.heads)) from error
        return config

    def weight_map(self, spec: ModelSpec) -> list[Entry]:
        return weight_map(spec, self.names)

    def skip(self, name: str) -> str | None:
        return skip_rotary(name)
