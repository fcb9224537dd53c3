"""Llama-Nemotron composed a second time, from transformers' own Llama parts.

transformers has no class for it. This one shares no code with bevatron: every layer is made of
`LlamaAttention`, `LlamaMLP` and `LlamaRMSNorm` under a configuration of its own width, in the way
that the published modelling code describes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


def block(attention: int | str | None, ffn: float | str | None) -> dict[str, Any]:
    """One entry of block_configs: heads per group or "linear" or None; ffn_mult likewise."""
    return {
        "attention": {
            "n_heads_in_group": attention if isinstance(attention, int) else None,
            "no_op": attention is None,
            "replace_with_linear": attention == "linear",
            "num_sink_tokens": None,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": ffn if isinstance(ffn, float) else None,
            "no_op": ffn is None,
            "replace_with_linear": ffn == "linear",
            "sparsify": None,
        },
    }


def published_config(blocks: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """config.json as the published models spell it."""
    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": blocks,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": 8,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.44.2",
        "use_cache": True,
        "vocab_size": 97,
        **changes,
    }


BLOCKS = [
    block(4, 5.25),
    block(None, 2.625),
    block(8, None),
    block("linear", 1.0),
    block(None, None),
    block(1, "linear"),
    block(2, 1.3125),
]


class ReferenceLayer(nn.Module):
    def __init__(self, config: LlamaConfig, described: dict[str, Any], index: int) -> None:
        super().__init__()
        attention, ffn = described["attention"], described["ffn"]
        own = copy.deepcopy(config)
        h = config.hidden_size
        if attention["replace_with_linear"]:
            self.self_attn = nn.Module()
            self.self_attn.linear_attn = nn.Linear(h, h, bias=False)
        elif not attention["no_op"]:
            own.num_key_value_heads = config.num_attention_heads // attention["n_heads_in_group"]
            self.self_attn = LlamaAttention(own, index)
        if not attention["no_op"]:
            self.input_layernorm = LlamaRMSNorm(h, config.rms_norm_eps)
        if ffn["replace_with_linear"]:
            self.mlp = nn.Module()
            self.mlp.linear_mlp = nn.Linear(h, h, bias=False)
        elif not ffn["no_op"]:
            width = int(2 * ffn["ffn_mult"] * h / 3)
            own.intermediate_size = width if width % 256 == 0 else width + 256 - width % 256
            self.mlp = LlamaMLP(own)
        if not ffn["no_op"]:
            self.post_attention_layernorm = LlamaRMSNorm(h, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Any, mask: Tensor) -> Tensor:
        if hasattr(self, "self_attn"):
            y = self.input_layernorm(x)
            if hasattr(self.self_attn, "linear_attn"):
                x = x + self.self_attn.linear_attn(y)
            else:
                x = x + self.self_attn(y, rotary, mask)[0]
        if hasattr(self, "mlp"):
            y = self.post_attention_layernorm(x)
            x = x + (self.mlp.linear_mlp(y) if hasattr(self.mlp, "linear_mlp") else self.mlp(y))
        return x


class ReferenceLlamaNemotron(nn.Module):
    """Parameter names are those of the published checkpoints."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        fields = {k: v for k, v in config.items() if v is not None}
        drop = ("block_configs", "auto_map", "architectures", "model_type", "torch_dtype")
        llama = LlamaConfig(**{k: v for k, v in fields.items() if k not in drop})
        llama._attn_implementation = "eager"
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(llama.vocab_size, llama.hidden_size)
        blocks = config["block_configs"]
        layers = [ReferenceLayer(llama, b, i) for i, b in enumerate(blocks)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = LlamaRMSNorm(llama.hidden_size, llama.rms_norm_eps)
        self.lm_head = nn.Linear(llama.hidden_size, llama.vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(llama)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        length = ids.shape[1]
        rotary = self.rotary(x, torch.arange(length)[None])
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        for layer in self.model.layers:
            x = layer(x, rotary, mask)
        return self.lm_head(self.model.norm(x))
