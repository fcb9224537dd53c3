"""LlamaForCausalLM: Llama 2, 3, 3.1, 3.2, 3.3 and other models that use this class.

Defaults are those of transformers 5.23's LlamaConfig. Layers that differ from one another belong to
`llama_nemotron`.
"""

from __future__ import annotations

from bevatron.families.config_fields import Field, flag, size
from bevatron.families.registry import Family
from bevatron.families.uniform_family import Uniform

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

FAMILY: Family = Uniform(
    name="llama",
    model_type="llama",
    stem="Llama",
    fields=FIELDS,
    eps="rms_norm_eps",
    activations=("silu", "swish"),
    heads_divide_hidden=True,
)
