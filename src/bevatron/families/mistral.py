"""MistralForCausalLM without a sliding window (Mistral-NeMo-Minitron, Mistral-NeMo).

Its tensors are Llama's and it has no biases. `sliding_window` must be in the file and null, because
transformers reads a missing `sliding_window` as 4096.
"""

from __future__ import annotations

from bevatron.families.config_fields import size
from bevatron.families.llama import FIELDS
from bevatron.families.registry import Family
from bevatron.families.uniform_family import Uniform
from bevatron.families.weight_map import Names

FAMILY: Family = Uniform(
    name="mistral",
    model_type="mistral",
    stem="Mistral",
    fields={k: v for k, v in FIELDS.items() if not k.endswith("_bias")}
    | {
        "intermediate_size": size(14336),
        "num_key_value_heads": size(8),
        "max_position_embeddings": size(4096 * 32),
    },
    eps="rms_norm_eps",
    activations=("silu", "swish"),
    names=Names(qa_prefix="model."),
    must_be_null=("sliding_window",),
)
