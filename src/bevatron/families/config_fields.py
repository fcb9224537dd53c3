"""Reading and writing config.json, shared by the families.

A family states its fields as a table (`Field`), reads them with `read_fields`, and writes them with
`write_fields`, which leaves alone whatever already means the wanted value. A field that is neither
in the table nor known to be harmless is refused: it could change the numbers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from bevatron.families.registry import Config, Family, FamilyError
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec

MAX_LAYERS = 10_000  # a config.json that says more is not genuine


@dataclass(frozen=True)
class Field:
    """One field of config.json. `default`: its value if absent, or how it follows from the fields
    before it. `null`: that null means the default."""

    kind: Literal["integer", "number", "boolean", "string"]
    default: Any
    null: bool = False
    low: float = 0.0  # an integer may equal it, a number must be greater unless `low_allowed`
    low_allowed: bool = False


def size(default: Any, null: bool = False) -> Field:
    """A count of at least one."""
    return Field("integer", default, null, low=1)


def flag(default: bool) -> Field:
    return Field("boolean", default)


Fields = Mapping[str, Field]
Values = dict[str, Any]

_EXPECTED = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
}


def wrong(name: str, value: Any, expected: str) -> FamilyError:
    """The error for a field of the wrong type or range."""
    shown = {None: "null", True: "true", False: "false"}.get(value) if _plain(value) else None
    return FamilyError(f"config.json: {name} is {shown or repr(value)}, expected {expected}")


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def check(name: str, value: Any, field: Field) -> Any:
    """`value` if it has the field's type and lies in its range. Integers pass for numbers."""
    if field.kind == "boolean" and isinstance(value, bool):
        return value
    if field.kind == "string" and isinstance(value, str):
        return value
    if field.kind == "integer" and type(value) is int:
        if value < field.low:
            raise wrong(name, value, f"at least {field.low:g}")
        return value
    if field.kind == "number" and type(value) in (int, float):
        if not math.isfinite(value) or value < field.low:
            raise wrong(name, value, f"a number above {field.low:g}")
        if value == field.low and not field.low_allowed:
            raise wrong(name, value, f"a number above {field.low:g}")
        return float(value)
    raise wrong(name, value, _EXPECTED[field.kind])


def read_field(config: Config, name: str, field: Field, before: Values) -> Any:
    """What `name` means in `config`; `before` holds the fields that a default may follow from."""
    value = config.get(name)
    if name not in config or (value is None and field.null):
        if not callable(field.default):
            return field.default
        follow: Callable[[Values], Any] = field.default
        value = follow(before)
    return check(name, value, field)


def read_fields(config: Config, fields: Fields) -> Values:
    """All fields of the table, with transformers' defaults where `config` is silent."""
    values: Values = {}
    for name, field in fields.items():
        values[name] = read_field(config, name, field, values)
    if values.get("num_hidden_layers", 0) > MAX_LAYERS:
        raise wrong("num_hidden_layers", values["num_hidden_layers"], f"at most {MAX_LAYERS}")
    return values


def write_fields(config: Values, fields: Fields, wanted: Values, full: bool) -> None:
    """Set the fields that do not already mean what is wanted; all of them if `full`."""
    done: Values = {}
    for name, field in fields.items():
        value = wanted[name]
        if full or not _means(config, name, field, done, value):
            config[name] = value
        done[name] = value


def _means(config: Config, name: str, field: Field, before: Values, wanted: Any) -> bool:
    try:
        return bool(read_field(config, name, field, before) == wanted)
    except FamilyError:
        return False


# --- fields that no family needs -----------------------------------------------------------------

# Token ids, bookkeeping, defaults of generation, training switches: nothing that acts on the logits
# of a forward pass in eval mode. The generic fields of transformers 4 and 5 are all here or below.
HARMLESS = frozenset(
    """
    architectures auto_map model_type transformers_version dtype torch_dtype name_or_path revision
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id pad_token tokenizer_class prefix use_cache pretraining_tp
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    classifier_dropout output_hidden_states output_attentions output_router_logits return_dict
    attn_implementation experts_implementation torchscript tf_legacy_loss use_bfloat16
    chunk_size_feed_forward keys_to_ignore_at_inference gradient_checkpointing
    id2label label2id num_labels problem_type token_classification_bias finetuning_task
    task_specific_params
    tie_encoder_decoder cross_attention_hidden_size max_sequence_length
    unsloth_version unsloth_fixed custom_pipelines original_max_position_embeddings
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams
    num_beam_groups temperature top_k top_p typical_p min_p repetition_penalty length_penalty
    diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_lookbehind target_lookbehind tie_last_hidden_states
    """.split()  # noqa: SIM905
)

# What publishers and their tools write beside that: which program made or is to run the file, and
# how it was trained. No class of transformers reads any of it (a test looks).
INERT = frozenset(
    """
    is_llama_config neftune_noise_alpha num_logits_to_keep rescale_prenorm_residual
    transformers.js_config paddlenlp_version use_sdpa use_flash_attn use_flash_attention
    use_flash_attention_2 use_fused_rope use_fused_rms_norm use_recompute virtual_pp_degree
    model_max_length tokenizer_model_max_length tokenizer_padding_side seq_length
    bf16 fp16 eos_token bos_token unk_token license language library_name base_model output_past
    """.split()  # noqa: SIM905
)

# Fields of transformers that are harmless only while they are off.
MUST_BE_OFF = (
    "attention_bias",
    "mlp_bias",
    "add_cross_attention",
    "is_decoder",
    "is_encoder_decoder",
    "pruned_heads",
    "use_sliding_window",
    "allow_global_per_layer_attribute_access",
)

# The same of publishers' fields: a reader that knows them would compute otherwise if they were on.
INERT_WHILE_OFF = (
    *("rope_interleaved", "use_bias", "qkv_bias", "alibi", "use_mrope", "use_qk_norm", "qk_norm"),
    *("qk_layernorm", "residual_in_fp32", "attention_output_gate", "rope_scaling_type"),
    *("language_model_only", "mlp_only_layers"),
)

_ADVICE = {
    "quantization_config": "import the checkpoint that it was quantised from",
    "compression_config": "import the checkpoint that it was quantised from",
    "per_layer_config": (
        "this family has the same layers throughout; spell differing layers as block_configs of "
        "DeciLMForCausalLM"
    ),
    "block_configs": "per-layer blocks belong to DeciLMForCausalLM; correct `architectures`",
    "layer_types": "attention here always sees all earlier tokens, in every layer",
    "sliding_window": (
        "attention here always sees all earlier tokens; set it to null if the model was trained so"
    ),
}


class UnknownField(FamilyError):
    """A field that may act on what the model computes. `field`: its name if a user may say that it
    does not; None if transformers or a wide-spread reader acts on it."""

    def __init__(self, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.field = field


def spec_of(
    family: Family, config: Config, accept: Collection[str] = ()
) -> tuple[ModelSpec, dict[str, Any]]:
    """What a config.json means if the fields named by `accept` do nothing, and which of them it
    needed for that, with their values. A field that is understood is read, accepted or not.

    Raises FamilyError for what is not understood."""
    left, accepted = dict(config), dict[str, Any]()
    while True:
        try:
            return family.spec(left), accepted
        except UnknownField as error:
            if error.field is None or error.field not in accept:
                raise
            accepted[error.field] = left.pop(error.field)


def check_accepted(config: Config, accept: Collection[str]) -> None:
    """Raise FamilyError for a field to accept that `config` does not have."""
    for name in accept:
        if name not in config:
            near = difflib.get_close_matches(name, config, 1)
            raise FamilyError(
                f"config.json: has no field {shown(name)} that could be accepted"
                + (f"; did you mean {near[0]}?" if near else "")
            )


def refuse_others(config: Config, known: tuple[str, ...]) -> None:
    """Raise UnknownField for the first field that is neither known, harmless, private nor null."""
    for name, value in config.items():
        if value is None or name in known or name in HARMLESS or name.startswith("_"):
            continue
        if name in INERT or (name in (*MUST_BE_OFF, *INERT_WHILE_OFF) and not value):
            continue
        advice = _ADVICE.get(name)
        if name in MUST_BE_OFF:
            advice = "it must be off here"
        may = (
            "if it does not act on what the model computes, remove it, or import the model with "
            f"--accept-field {shown(name) if not name.isprintable() else name}"
        )
        raise UnknownField(
            f"config.json: {name} = {shown(value)} is not understood and may change the model's "
            f"output; {advice or may}",
            None if advice else name,
        )


def require(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise FamilyError unless `value` is one of those that the decoder implements."""
    if value not in allowed:
        raise FamilyError(
            f"config.json: {name} = {shown(value)} is not supported; this family computes with "
            f"{' or '.join(repr(a) for a in allowed)} only"
        )


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- writing a config ----------------------------------------------------------------------------

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Named(Protocol):
    """What messages and `start` need to know of a family."""

    @property
    def model_type(self) -> str: ...
    @property
    def architecture(self) -> str: ...


def start(family: Named, dtype: str, base: Config | None) -> tuple[Values, bool]:
    """The config to write into, and whether every field is still to be written.

    A base of the same family is copied, another family's only lends its token ids. Without any the
    ids are null: transformers' defaults would name tokens of some other vocabulary. The dtype has
    its old name, which all read, and the new one where the base has it.
    """
    if base is not None and base.get("model_type", family.model_type) == family.model_type:
        config = dict(base)
        if config.get("dtype") is not None:
            config["dtype"] = dtype
        config["torch_dtype"] = dtype
        return config, False
    config = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {name: (base or {}).get(name) for name in TOKEN_IDS}
    config |= {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}
    return config, True


def cannot(family: Named, place: str, found: Any, expected: str) -> FamilyError:
    """The error for a part of a spec that a family has no words for."""
    return FamilyError(f"{family.architecture}: {place} is {found}; it can only be {expected}")


def expect_model(family: Named, spec: ModelSpec, wanted: Mapping[str, Any]) -> None:
    """Raise FamilyError unless the spec has these values; `norm.kind` reads a nested field."""
    for path, value in wanted.items():
        found: Any = spec
        for name in path.split("."):
            found = getattr(found, name)
        if found != value:
            raise cannot(family, path, found, str(value))


def uniform(family: Named, spec: ModelSpec) -> tuple[Attention, MLP]:
    """The one attention and the one MLP of all layers. Raises FamilyError naming the first layer
    and field that differ."""
    first = spec.layers[0]
    for i, layer in enumerate(spec.layers):
        for name, cls in (("attention", Attention), ("mlp", MLP)):
            sublayer, model = getattr(layer, name), getattr(first, name)
            if not isinstance(sublayer, cls):
                kind = "absent" if sublayer is None else type(sublayer).__name__.lower()
                raise cannot(family, f"layers.{i}.{name}", kind, f"an {name}")
            for field in vars(sublayer):
                if getattr(sublayer, field) != getattr(model, field):
                    raise cannot(
                        family,
                        f"layers.{i}.{name}.{field}",
                        getattr(sublayer, field),
                        f"{getattr(model, field)} as in layer 0: all its layers are the same",
                    )
    assert isinstance(first.attention, Attention) and isinstance(first.mlp, MLP)
    return first.attention, first.mlp


def expect_sublayer(
    family: Named, place: str, sublayer: Attention | MLP, wanted: Mapping[str, Any]
) -> None:
    """Raise FamilyError unless the sublayer has these values."""
    for name, value in wanted.items():
        if getattr(sublayer, name) != value:
            raise cannot(family, f"{place}.{name}", getattr(sublayer, name), str(value))


def repeated(attention: Attention, mlp: MLP, layers: int) -> tuple[LayerSpec, ...]:
    return (LayerSpec(attention, mlp),) * layers


def skip_rotary(name: str) -> str | None:
    """Why `...rotary_emb.inv_freq` may be left out: old checkpoints store it, nobody reads it."""
    if name.endswith((".rotary_emb.inv_freq", ".rotary_emb.original_inv_freq")):
        return "rotary frequencies, computed from config.json"
    return None
