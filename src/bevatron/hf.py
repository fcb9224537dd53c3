"""Llama-Nemotron (`DeciLMForCausalLM`, model type "nemotron-nas") for transformers 4.57 and 5.

    import bevatron.hf      # registers the classes: AutoModelForCausalLM, pipeline(...) just work

This file stands alone: it needs torch and transformers only, and an exported folder that came with
no modelling code of its own carries it as `modeling_decilm.py`, for `trust_remote_code=True`.

A Llama whose layers differ: `block_configs` says of each layer whether its attention and its MLP
are there, are replaced by one matrix, or are absent, and how many key/value heads and how wide an
MLP it has. Every part that is there is transformers' own Llama part. Annotations are evaluated here
(no `from __future__ import annotations`): transformers 5 checks a config's types by them.
"""

import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

# What transformers calls differently from release to release; nothing below asks for its version.
VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])
V5 = VERSION >= (5, 0)  # rope is in `rope_parameters`
CHECKED = VERSION >= (5, 4)  # a configuration is a dataclass whose types are checked
GATHERED = "colwise_gather_output" if VERSION >= (5, 1) else "colwise_rep"  # tensor parallel plans
INPUTS = "inputs_embeds" if VERSION >= (5, 2) else "input_embeds"  # of masks
POSITIONS = VERSION < (5, 4)  # masks and caches are told `cache_position`
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"  # of masks, layers and outputs

WIDTH_MULTIPLE = 256
MODULE = "modeling_decilm"


# --- blocks: objects, because vLLM, SGLang and TensorRT-LLM read attributes -----------------------


@dataclass
class AttentionBlock:
    """`n_heads_in_group` query heads share a key/value head. The rest is never used."""

    n_heads_in_group: int | None = None
    no_op: bool = False
    num_sink_tokens: int | None = None
    replace_with_linear: bool = False
    sparsify: Any = None
    unshifted_sink: bool = False
    use_prefill_window_in_sink_attention: bool = False
    window_length: int | None = None

    @property
    def is_attention(self) -> bool:
        return not (self.no_op or self.replace_with_linear)


@dataclass
class FFNBlock:
    """The width is 2/3 of `ffn_mult` times hidden_size, truncated, then rounded up to a multiple
    of 256; or `intermediate_size`, for a width that no `ffn_mult` means."""

    ffn_mult: float | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: Any = None
    intermediate_size: int | None = None

    @property
    def is_mlp(self) -> bool:
        return not (self.no_op or self.replace_with_linear)

    def width(self, hidden_size: int) -> int:
        if self.ffn_mult is None:
            return self.intermediate_size or 0
        raw = int(2 * round(self.ffn_mult, 6) * hidden_size / 3)
        return -(-raw // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.intermediate_size is None:
            del values["intermediate_size"]
        return values


@dataclass
class BlockConfig:
    """One layer."""

    attention: AttentionBlock
    ffn: FFNBlock

    def to_dict(self) -> dict[str, Any]:
        return {"attention": asdict(self.attention), "ffn": self.ffn.to_dict()}


# Keys that must be off, as there is no code for them, and later tools' keys for the usual thing.
_OFF = {
    "attention": (
        *("sparsify", "window_length", "num_sink_tokens", "unshifted_sink"),
        *("use_prefill_window_in_sink_attention", "mamba", "llama4"),
    ),
    "ffn": ("sparsify", "moe"),
}
_KNOWN = {
    "attention": ("no_op", "replace_with_linear", "n_heads_in_group", "num_key_value_heads"),
    "ffn": ("no_op", "replace_with_linear", "ffn_mult", "intermediate_size", "gated", "hidden_act"),
}
_USUAL = {"gated": (None, True), "hidden_act": (None, "silu", "swish")}


def _part(block: dict[str, Any], place: str, name: str) -> tuple[dict[str, Any], str]:
    """A block's attention or ffn without what is off, and its name for errors."""
    place, given = f"{place}.{name}", block.get(name)
    if not isinstance(given, dict):
        raise ValueError(f"{place} is {given!r}, expected an object")
    for key, value in given.items():
        off = value is None or value is False
        if key in _OFF[name] and off:
            continue
        if key in _OFF[name] or value not in _USUAL.get(key, (value,)):
            raise ValueError(f"{place}.{key} = {value!r} is not supported")
        if key not in _KNOWN[name] and value is not None:
            raise ValueError(f"{place}.{key} = {value!r} is not understood")
    if given.get("no_op") and given.get("replace_with_linear"):
        raise ValueError(f"{place} is both no_op and replace_with_linear")
    return {k: v for k, v in given.items() if k in _KNOWN[name] and k not in _USUAL}, place


def _block(block: Any, index: int, heads: int, hidden_size: int) -> BlockConfig:
    """A block of config.json, in the published or the later spelling. Raises ValueError."""
    if isinstance(block, BlockConfig):
        return block
    place = f"block_configs[{index}]"
    if not isinstance(block, dict):
        raise ValueError(f"{place} is {block!r}, expected an object")
    for key, value in block.items():
        if key not in ("attention", "ffn") and value is not None:
            raise ValueError(f"{place}.{key} = {value!r} is not supported")

    values, where = _part(block, place, "attention")
    kv = values.pop("num_key_value_heads", None)
    attention = AttentionBlock(**values)
    group = attention.n_heads_in_group
    if attention.is_attention:
        if group is None and kv is not None and kv > 0:
            group = attention.n_heads_in_group = heads // kv
        if not group or group < 1 or heads % group or kv not in (None, heads // group):
            raise ValueError(
                f"{where}: n_heads_in_group {group} and num_key_value_heads {kv} do not share out "
                f"num_attention_heads {heads}"
            )
    else:
        attention.n_heads_in_group = None

    values, where = _part(block, place, "ffn")
    ffn = FFNBlock(**values)
    if ffn.is_mlp:
        f = ffn.intermediate_size
        if ffn.ffn_mult is None and f and f % WIDTH_MULTIPLE == 0:
            ffn.ffn_mult = round(1.5 * f / hidden_size, 6)
        if ffn.width(hidden_size) < 1 or f not in (None, ffn.width(hidden_size)):
            raise ValueError(
                f"{where}: ffn_mult {ffn.ffn_mult} and intermediate_size {f} mean no width, or two"
            )
        if ffn.ffn_mult is not None:
            ffn.intermediate_size = None
    return BlockConfig(attention, ffn)


# --- configuration --------------------------------------------------------------------------------


def _finish(config: Any) -> None:
    """After Llama's own part: blocks as objects, and no sizes that all layers would share."""
    allowed = {
        "o_proj_bias": (None, config.attention_bias),
        "position_embedding_type": (None, "rope"),
        "sliding_window": (None,),
        "attention_chunk_size": (None,),
    }
    for name, values in allowed.items():
        if getattr(config, name, None) not in values:
            raise ValueError(f"{name} = {getattr(config, name)!r} is not supported")
    blocks = config.block_configs or []
    if len(blocks) != config.num_hidden_layers:
        raise ValueError(
            f"block_configs has {len(blocks)} entries, num_hidden_layers is "
            f"{config.num_hidden_layers}"
        )
    heads, h = config.num_attention_heads, config.hidden_size
    made = [_block(block, i, heads, h) for i, block in enumerate(blocks)]
    head_dim = getattr(config, "head_dim", None) or h // heads
    own = {"block_configs": made, "intermediate_size": None, "num_key_value_heads": None}
    for name, value in {**own, "head_dim": head_dim}.items():
        object.__setattr__(config, name, value)
    parameters = getattr(config, "rope_parameters", None)
    if V5 and parameters:
        # transformers 4 and SGLang look for these
        object.__setattr__(config, "rope_theta", parameters["rope_theta"])


class _Written:
    """What both versions write: blocks as plain data, the published nulls, both rope spellings."""

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        config: Any = self
        values["block_configs"] = [
            b.to_dict() if isinstance(b, BlockConfig) else b for b in config.block_configs or []
        ]
        values["intermediate_size"] = values["num_key_value_heads"] = None
        if V5:
            rope = config.rope_parameters
            scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
            values["rope_theta"] = rope["rope_theta"]
            values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        else:
            scaling = config.rope_scaling or {"rope_type": "default"}
            values["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta}
        return values

    def to_dict(self) -> dict[str, Any]:
        return self._written(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return self._written(super().to_diff_dict())


if CHECKED:
    from huggingface_hub.dataclasses import strict

    @strict
    class DeciLMConfig(_Written, LlamaConfig):
        """LlamaConfig whose layers are described one by one in `block_configs`."""

        model_type = "nemotron-nas"

        intermediate_size: int | None = None
        num_key_value_heads: Any = None  # TensorRT-LLM puts a list here
        block_configs: Any = None

        def __post_init__(self, **kwargs: Any) -> None:
            if self.block_configs is None:  # transformers makes an empty one to compare with
                self.block_configs = [
                    {"attention": {"no_op": True}, "ffn": {"no_op": True}}
                    for _ in range(self.num_hidden_layers)
                ]
            super().__post_init__(**kwargs)
            _finish(self)

        def validate_architecture(self) -> None:
            """Llama wants hidden_size to be a multiple of the heads; with head_dim it need not."""

else:

    class DeciLMConfig(_Written, LlamaConfig):
        """LlamaConfig whose layers are described one by one in `block_configs`."""

        model_type = "nemotron-nas"

        def __init__(self, block_configs: Any = None, **kwargs: Any) -> None:
            rope = None if V5 else kwargs.pop("rope_parameters", None)
            if rope and not kwargs.get("rope_scaling"):  # version 4 would ignore it, silently
                kwargs["rope_theta"] = rope.get("rope_theta", kwargs.get("rope_theta", 10000.0))
                if rope.get("rope_type", "default") != "default":
                    kwargs["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
            kwargs |= {"intermediate_size": None, "num_key_value_heads": None}
            super().__init__(**kwargs)
            if block_configs is None:
                off = {"attention": {"no_op": True}, "ffn": {"no_op": True}}
                block_configs = [off] * self.num_hidden_layers
            self.block_configs = block_configs
            _finish(self)


# --- model ----------------------------------------------------------------------------------------


class DeciLMAttention(LlamaAttention):
    """Llama's attention with its own number of key/value heads. It keeps the model's config, so
    that a later change of the attention implementation reaches it."""

    def __init__(self, config: Any, own: Any, layer_idx: int) -> None:
        super().__init__(own, layer_idx)
        self.config = config


class DeciLMReplacement(nn.Module):
    """One square matrix instead of a sublayer, under the name that it has in published files.

    (transformers takes a class called "...Attention" for one that cannot change its kernel.)"""

    def __init__(self, hidden_size: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(hidden_size, hidden_size, bias=False))

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.get_submodule(self.name)(x)


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """A layer. An absent sublayer has no norm either; without both it is the identity.

    `cache_index` counts the layers with attention: caches and masks ask the first one for its
    length, so it must be one that has keys."""

    def __init__(self, config: Any, block: BlockConfig, cache_index: int) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.rms_norm_eps
        own = copy.copy(config)
        if block.attention.is_attention:
            kv = config.num_attention_heads // block.attention.n_heads_in_group
            object.__setattr__(own, "num_key_value_heads", kv)
            self.self_attn: nn.Module = DeciLMAttention(config, own, cache_index)
        elif block.attention.replace_with_linear:
            self.self_attn = DeciLMReplacement(h, "linear_attn")
        if not block.attention.no_op:
            self.input_layernorm = LlamaRMSNorm(h, eps=eps)
        if block.ffn.is_mlp:
            object.__setattr__(own, "intermediate_size", block.ffn.width(h))
            self.mlp: nn.Module = LlamaMLP(own)
        elif block.ffn.replace_with_linear:
            self.mlp = DeciLMReplacement(h, "linear_mlp")
        if not block.ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(h, eps=eps)
        self.has_attention, self.has_mlp = not block.attention.no_op, not block.ffn.no_op

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = None
        if self.has_attention:
            out = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            if isinstance(out, tuple):
                out, weights = out
            hidden_states = hidden_states + out
        if self.has_mlp:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, weights


class DeciLMPreTrainedModel(PreTrainedModel):
    config_class = DeciLMConfig
    config: Any
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeciLMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, and this file with it: the folder then needs nothing else."""
        if is_main_process:
            self.config.auto_map = auto_map()
            folder, code = Path(save_directory), Path(__file__)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{MODULE}.py").write_bytes(code.read_bytes())
        return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


class DeciLMModel(DeciLMPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers, attentions = [], 0
        for block in config.block_configs:
            layers.append(DeciLMDecoderLayer(config, block, attentions))
            attentions += block.attention.is_attention
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        attentions = _chosen(output_attentions, self.config.output_attentions)
        hidden = _chosen(output_hidden_states, self.config.output_hidden_states)
        cache = _one_cache(cache, past_key_values)
        if _chosen(use_cache, self.config.use_cache) and cache is None:
            cache = DynamicCache(config=self.config)
        positions = kwargs.pop("cache_position", None)
        if positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(x.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = positions.unsqueeze(0)
        kwargs[CACHE] = cache
        told = {"cache_position": positions} if POSITIONS else {}
        mask = create_causal_mask(
            config=self.config,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{INPUTS: x, CACHE: cache, **told},
        )
        rotations = self.rotary_emb(x, position_ids)
        all_hidden, all_weights = [], []
        for layer in self.layers:
            if hidden:
                all_hidden.append(x)
            x, weights = layer(
                x,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=rotations,
                **told,
                **kwargs,
            )
            if attentions:
                all_weights.append(weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*all_hidden, x) if hidden else None,
            attentions=tuple(all_weights) if attentions else None,
            **{CACHE: cache},
        )


def _one_cache(cache: Any, past_key_values: Any) -> Any:
    """Callers use either name in any release: one that was not understood would be an empty cache
    at every step, and wrong tokens without an error."""
    if cache is not None and past_key_values is not None:
        raise ValueError("give one of cache and past_key_values: they are the same thing")
    return past_key_values if cache is None else cache


def _chosen(asked: bool | None, default: Any) -> bool:
    return bool(default if asked is None else asked)


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": GATHERED}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE: getattr(out, CACHE)},
        )


class DeciLMForSequenceClassification(GenericForSequenceClassification, DeciLMPreTrainedModel):
    def __init__(self, config: Any) -> None:
        DeciLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeciLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DeciLMForTokenClassification(GenericForTokenClassification, DeciLMPreTrainedModel):
    def __init__(self, config: Any) -> None:
        DeciLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeciLMModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)
        self.post_init()


class DeciLMForQuestionAnswering(GenericForQuestionAnswering, DeciLMPreTrainedModel):
    base_model_prefix = "transformer"

    def __init__(self, config: Any) -> None:
        DeciLMPreTrainedModel.__init__(self, config)
        self.transformer = DeciLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


CLASSES: dict[str, Any] = {
    "AutoConfig": DeciLMConfig,
    "AutoModel": DeciLMModel,
    "AutoModelForCausalLM": DeciLMForCausalLM,
    "AutoModelForSequenceClassification": DeciLMForSequenceClassification,
    "AutoModelForTokenClassification": DeciLMForTokenClassification,
    "AutoModelForQuestionAnswering": DeciLMForQuestionAnswering,
}


def auto_map() -> dict[str, str]:
    """What config.json says of a folder that holds this file as `modeling_decilm.py`."""
    return {auto: f"{MODULE}.{cls.__name__}" for auto, cls in CLASSES.items()}


def register() -> None:
    """Make transformers' Auto classes know these."""
    # `transformers serve` looks for a class in the package, which replaces itself on import.
    package = sys.modules["transformers"]
    for auto, cls in CLASSES.items():
        key = DeciLMConfig.model_type if cls is DeciLMConfig else DeciLMConfig
        getattr(transformers, auto).register(key, cls, exist_ok=True)
        setattr(package, cls.__name__, cls)


if __name__ == "bevatron.hf":  # not where it is the remote code of a folder
    register()
# bevatron 2 9f30dca558f64a1d789205207883dd348f814f27c46ec25158b2c0ff7f55b907
