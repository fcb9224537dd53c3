"""NemotronForCausalLM (Nemotron-3/4, Minitron): LayerNorm1P, half-rotated heads, squared ReLU.

transformers initialises LayerNorm1P weights to one, which multiplies by two. A fresh model here
starts them at zero, the identity, as the published models did.
"""

from __future__ import annotations

from bevatron.families.config_fields import Field, flag, size
from bevatron.families.registry import Family
from bevatron.families.uniform_family import Uniform
from bevatron.spec import MLP, Norm

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

FAMILY: Family = Uniform(
    name="nemotron",
    model_type="nemotron",
    stem="Nemotron",
    fields=FIELDS,
    eps="norm_eps",
    activations=("relu2",),
    norm=Norm("layernorm1p"),
    mlp=MLP(1, "relu2", gated=False),
    partial=0.5,
)
