"""Each family means what transformers means: names, shapes, fields, and their spelling back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from bevatron.errors import BevatronError
from bevatron.families import FamilyError, by_name, for_config, for_spec
from bevatron.families.llama_nemotron import width
from bevatron.families.published_models import PRESETS, preset, read_blocks
from bevatron.families.rope_fields import ROPE_FIELDS
from bevatron.spec import MLP, Attention, LayerSpec, Linear, Norm, Rope
from tests.specs import HETEROGENEOUS, HOMOGENEOUS, NANOCHAT, NEMOTRON

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16.0}
YARN |= {"original_max_position_embeddings": 32}
LABELS = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "pad_token_id": 3}
LABELS |= {"problem_type": "single_label_classification"}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
# Without a field like this transformers assumes a sliding window.
ALSO = {"mistral": {"sliding_window": None}}
CASES = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-all-kv": ("llama", {"num_key_value_heads": None}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-classes": ("llama", {"architectures": ["LlamaForSequenceClassification"], **LABELS}),
    "llama-classes-2": ("llama", {"architectures": ["LlamaForSequenceClassification"]}),
    "llama-tokens": ("llama", {"architectures": ["LlamaForTokenClassification"], **LABELS}),
    "llama-answers": ("llama", {"architectures": ["LlamaForQuestionAnswering"]}),
    "llama-bare": ("llama", {"architectures": ["LlamaModel"], "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-answers": (
        "mistral",
        {"sliding_window": None, "architectures": ["MistralForQuestionAnswering"]},
    ),
    "nemotron": ("nemotron", {}),
    "nemotron-yarn": ("nemotron", {"rope_parameters": YARN, "partial_rotary_factor": 0.25}),
    "nemotron-classes": (
        "nemotron",
        {"architectures": ["NemotronForSequenceClassification"], **LABELS},
    ),
    "nemotron-tokens": (
        "nemotron",
        {"architectures": ["NemotronForTokenClassification"], "token_classification_bias": False},
    ),
    "nemotron-answers": ("nemotron", {"architectures": ["NemotronForQuestionAnswering"]}),
    "nemotron-bare": ("nemotron", {"architectures": ["NemotronModel"]}),
    "nanochat-bare": ("nanochat", {"architectures": ["NanoChatModel"]}),
    "nemotron-biases": ("nemotron", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "nemotron-partial": ("nemotron", {"partial_rotary_factor": 0.25, "rope_theta": 5e4}),
    "nemotron-tied": ("nemotron", {"tie_word_embeddings": True}),
    "nanochat": ("nanochat", {}),
    "nanochat-biases": ("nanochat", {"attention_bias": True, "final_logit_softcapping": None}),
    "nanochat-head-dim": ("nanochat", {"head_dim": 16}),
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "nemotron": transformers.NemotronConfig,
    "nanochat": transformers.NanoChatConfig,
}


def hf_config(case: str) -> Any:
    family, changes = CASES[case]
    named = {"architectures": [by_name(family).architecture]}
    return CONFIGS[family](**copy.deepcopy(SMALL | named | changes))


def as_json(config: Any) -> dict[str, Any]:
    """What save_pretrained writes into config.json."""
    return json.loads(config.to_json_string())


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_transformers(case: str) -> None:
    config = hf_config(case)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight", None)  # not in the file
    family = for_config(as_json(config))
    spec = family.spec(as_json(config))
    entries = family.weight_map(spec)
    assert {s.name: s.shape for e in entries for s in e.sources} == theirs
    assert [e.native for e in entries] == list(spec.parameters())


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_configs_round_trip_through_transformers(case: str, full: bool) -> None:
    source = as_json(hf_config(case)) | {"torch_dtype": "bfloat16"}
    family = for_config(source)
    spec = family.spec(source)
    assert for_spec(spec).name == {"mistral": "llama"}.get(family.name, family.name)
    if full:
        written = family.config(spec, "bfloat16")
        assert family.spec(written) == spec
        again = CONFIGS[family.name](**written)
        assert again.dtype == torch.bfloat16
        assert again.bos_token_id is None
    else:
        source["dtype"] = "bfloat16"
        written = family.config(spec, "bfloat16", source)
        assert {name: written[name] for name in source} == source
        assert set(written) - set(source) <= OLD_ROPE, "what transformers 4 needs"
        again = CONFIGS[family.name](**written)
    assert family.spec(as_json(again)) == spec


def test_silence_means_transformers_defaults() -> None:
    for name, config in CONFIGS.items():
        family = by_name(name)
        also = ALSO.get(name, {})
        assert family.spec(also) == family.spec(as_json(config(**also)))


OLD_ROPE = {"rope_theta", "rope_scaling", "original_max_position_embeddings"}
OLD_ROPE |= {"partial_rotary_factor"}
SPELLINGS = [
    {"rope_theta": 5e5},
    {"rope_parameters": {"rope_theta": 5e5}},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_theta": 5e5, "rope_parameters": LLAMA3},
    {"rope_theta": 7.0, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": None, "rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5}},
    {"rope_scaling": {}, "rope_parameters": {"type": "linear", "factor": 4}},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    {"rope_parameters": {k: v for k, v in LLAMA3.items() if k[0] != "o"}},
    {"rope_parameters": None},
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", CONFIGS)
def test_rope_spellings_have_transformers_precedence(family: str, spelling: dict) -> None:
    theirs = dict(CONFIGS[family](**SMALL, **json.loads(json.dumps(spelling))).rope_parameters)
    if theirs["rope_type"] == "llama3":  # the model gives the top level priority when it is built
        key = "original_max_position_embeddings"
        theirs[key] = spelling.get(key, theirs[key])
    rope = by_name(family).spec(SMALL | ALSO.get(family, {}) | spelling).rope
    assert rope.kind == theirs["rope_type"]
    assert rope.theta == theirs["rope_theta"]
    assert rope.partial == theirs.get("partial_rotary_factor", 1.0)
    for name in ("factor", "low_freq_factor", "original_max_position_embeddings"):
        assert getattr(rope, name) == theirs.get(name)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_that_is_rewritten_means_the_same_in_either_spelling(
    family: str, spelling: dict
) -> None:
    """transformers 4 knows the old one alone, and computes with theta 10000 without it."""
    base = SMALL | ALSO.get(family, {}) | spelling | {"dtype": "bfloat16"}
    found = by_name(family)
    spec = found.spec(base)
    shorter = replace(spec, layers=spec.layers[:2])
    written = found.config(shorter, "float32", base)
    old = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    assert found.spec(written) == found.spec(old) == shorter
    assert written["dtype"] == old["torch_dtype"] == "float32"
    given = written.get("rope_parameters")
    if given is not None:
        new = {k: v for k, v in written.items() if k not in ROPE_FIELDS}
        assert found.spec(new | {"rope_parameters": given}) == shorter


REFUSED = [
    {"hidden_act": "gelu"},
    {"sliding_window": 4096},
    {"use_sliding_window": True},
    {"quantization_config": {"bits": 4}},
    {"per_layer_config": {"0": {"intermediate_size": 3}}},
    {"embedding_multiplier": 12.0},
    {"residual_multiplier": 0.2},
    {"logits_scaling": 8.0},
    {"num_experts": 8},
    {"is_decoder": True},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "dynamic"}},
    {"rope_scaling": {"rope_type": "yarn", "beta_fast": "32"}},
    {"rope_scaling": {"rope_type": "yarn", "truncate": 1}},
    {"rope_scaling": {"rope_type": ["llama3"]}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    {"rope_scaling": "llama3"},
    {"rope_theta": None},
    {"rope_theta": "1e4"},
    {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
    {"partial_rotary_factor": 2.0},
    {"hidden_size": None},
    {"hidden_size": "48"},
    {"hidden_size": 48.0},
    {"num_hidden_layers": True},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 10**9},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 5},
    {"attention_bias": 1},
    {"initializer_range": float("nan")},
    {"tie_word_embeddings": None},
]


@pytest.mark.parametrize("change", REFUSED, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_not_understood_is_refused_by_name(family: str, change: dict) -> None:
    with pytest.raises(FamilyError) as caught:
        by_name(family).spec(SMALL | ALSO.get(family, {}) | change)
    words = {"num_key_value_heads": "key/value"}
    name = next(iter(change))
    assert words.get(name, name) in str(caught.value)


def test_harmless_fields_pass_and_are_kept() -> None:
    extra = {"eos_token_id": [1, 2], "use_cache": False, "attention_dropout": 0.1, "_x": {"y": 1}}
    extra |= {"id2label": {"0": "a"}, "unknown_null": None, "transformers_version": "4.40.0"}
    base = SMALL | extra
    family = by_name("llama")
    spec = family.spec(base)
    written = family.config(replace(spec, layers=spec.layers[:2]), "float32", base)
    assert written == base | {"num_hidden_layers": 2, "torch_dtype": "float32"}


def test_nulls_that_follow_other_fields_stay_only_while_they_are_right() -> None:
    family = by_name("llama")
    base = SMALL | {"num_key_value_heads": None, "head_dim": None, "torch_dtype": "float32"}
    spec = family.spec(base)
    fewer = LayerSpec(Attention(3, 3, 8), spec.layers[0].mlp)
    written = family.config(replace(spec, layers=(fewer,) * 3), "float32", base)
    assert written == base | {"num_attention_heads": 3, "head_dim": 8}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"layers": HETEROGENEOUS.layers}, r"layers\.1\.attention"),
        ({"layers": (*HOMOGENEOUS.layers[:1], LayerSpec(Attention(4, 2, 8), MLP(40)))},
         r"layers\.1\.mlp\.intermediate_size"),
        ({"layers": (LayerSpec(Attention(5, 5, 8), MLP(48)),)}, "num_attention_heads"),
        ({"layers": (LayerSpec(Attention(4, 2, 8, qkv_bias=True), MLP(48)),)}, "o_bias"),
        ({"norm": Norm("layernorm1p")}, r"norm\.kind"),
        ({"rope": Rope(partial=0.5)}, r"rope\.partial"),
        ({"logit_softcap": 3.0}, "logit_softcap"),
    ],
)  # fmt: skip
def test_llama_says_what_it_cannot_express(change: dict, place: str) -> None:
    with pytest.raises(FamilyError, match=place):
        by_name("llama").config(replace(HOMOGENEOUS, **change), "float32")


def test_every_family_is_found_for_its_own() -> None:
    assert for_spec(HOMOGENEOUS).name == "llama"
    assert for_spec(NANOCHAT).name == "nanochat"
    assert for_spec(NEMOTRON).name == "nemotron"
    odd_heads = replace(HOMOGENEOUS, layers=(LayerSpec(Attention(5, 5, 8), MLP(256)),) * 2)
    assert for_spec(odd_heads).name == "llama_nemotron"
    with pytest.raises(FamilyError, match=r"(?s)llama: .*layers\.1.*llama_nemotron: .*layers\."):
        for_spec(HETEROGENEOUS)


def test_rotary_buffers_are_skipped() -> None:
    for name in ("llama", "nanochat", "nemotron", "llama_nemotron"):
        skip = by_name(name).skip
        assert skip("model.layers.0.self_attn.rotary_emb.inv_freq")
        assert skip("model.layers.0.self_attn.q_proj.weight") is None


# --- llama_nemotron ------------------------------------------------------------------------------

NAS = replace(
    HOMOGENEOUS,
    hidden_size=64,
    layers=(
        LayerSpec(Attention(8, 2, 8), MLP(256)),
        LayerSpec(None, MLP(512)),
        LayerSpec(Linear(), None),
        LayerSpec(Attention(8, 8, 8), Linear()),
        LayerSpec(None, None),
    ),
)


def nas_config() -> dict[str, Any]:
    return by_name("llama_nemotron").config(NAS, "bfloat16")


def test_blocks_are_written_as_published() -> None:
    config = nas_config()
    assert by_name("llama_nemotron").spec(config) == NAS
    assert config["intermediate_size"] is None
    assert config["num_key_value_heads"] is None
    for block in config["block_configs"]:
        assert list(block["attention"]) == [
            "n_heads_in_group",
            "no_op",
            "num_sink_tokens",
            "replace_with_linear",
            "sparsify",
            "unshifted_sink",
            "use_prefill_window_in_sink_attention",
            "window_length",
        ]
        assert list(block["ffn"]) == ["ffn_mult", "no_op", "replace_with_linear", "sparsify"]
    assert config["block_configs"][0]["attention"]["n_heads_in_group"] == 4
    assert isinstance(config["block_configs"][0]["ffn"]["ffn_mult"], float)


def test_the_other_spelling_of_blocks_is_read() -> None:
    config = nas_config()
    for block, layer in zip(config["block_configs"], NAS.layers, strict=True):
        if block["attention"].pop("n_heads_in_group"):
            block["attention"]["num_key_value_heads"] = layer.attention.num_key_value_heads
        if block["ffn"].pop("ffn_mult"):
            block["ffn"]["intermediate_size"] = layer.mlp.intermediate_size
    family = by_name("llama_nemotron")
    assert family.spec(config) == NAS
    config["block_configs"][1]["ffn"]["intermediate_size"] = 300  # has no ffn_mult
    spec = family.spec(config)
    assert spec.layers[1].mlp == MLP(300)
    config["torch_dtype"] = "float32"
    assert family.config(spec, "float32", config) == config | {"dtype": "float32"}


def test_the_sources_multiplier_stays_while_the_width_does() -> None:
    base = nas_config() | {"auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}}
    base["block_configs"][0]["ffn"]["ffn_mult"] = 5.5  # also 256
    family = by_name("llama_nemotron")
    assert family.spec(base) == NAS
    assert family.config(NAS, "bfloat16", base) == base
    fewer = family.config(replace(NAS, layers=NAS.layers[1:]), "bfloat16", base)
    assert fewer["block_configs"] == base["block_configs"][1:]
    assert fewer["auto_map"] == base["auto_map"]


@pytest.mark.parametrize("hidden", [64, 2048, 3072, 5120, 8192, 16384, 20480])
def test_a_multiplier_recovers_every_width(hidden: int) -> None:
    for f in range(256, 4 * hidden + 1, 256):
        assert width(round(1.5 * f / hidden, 6), hidden) == f


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("attention", {"window_length": 128}),
        ("attention", {"num_sink_tokens": 4}),
        ("attention", {"sparsify": ["2:4"]}),
        ("attention", {"unshifted_sink": True}),
        ("attention", {"replace_with_linear": True, "no_op": True}),
        ("attention", {"n_heads_in_group": None}),
        ("attention", {"n_heads_in_group": 3}),
        ("attention", {"num_key_value_heads": 7}),
        ("attention", {"no_op": 1}),
        ("attention", {"surprise": 1}),
        ("ffn", {"ffn_mult": None}),
        ("ffn", {"ffn_mult": "1.0"}),
        ("ffn", {"intermediate_size": 300}),
        ("ffn", {"gated": False}),
        ("ffn", {"moe": {"num_experts": 4}}),
    ],
    ids=str,
)
def test_blocks_that_are_not_understood_are_refused_by_layer(part: str, change: dict) -> None:
    config = nas_config()
    config["block_configs"][0][part] |= change
    with pytest.raises(FamilyError, match=rf"block_configs\[0\]\.{part}"):
        by_name("llama_nemotron").spec(config)


@pytest.mark.parametrize("blocks", [None, [], {}, [None] * 5, [{"attention": {}}] * 5])
def test_broken_block_lists_are_refused(blocks: Any) -> None:
    with pytest.raises(FamilyError, match="block_configs"):
        by_name("llama_nemotron").spec(nas_config() | {"block_configs": blocks})


def test_widths_that_no_multiplier_means_are_refused_by_layer() -> None:
    spec = replace(NAS, layers=(*NAS.layers, LayerSpec(None, MLP(300))))
    with pytest.raises(FamilyError, match=r"layers\.5\.mlp\.intermediate_size is 300.*256"):
        by_name("llama_nemotron").config(spec, "bfloat16")


# --- published -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    spec = preset(name)
    family = for_spec(spec)
    config = json.loads(json.dumps(family.config(spec, "bfloat16")))
    assert for_config(config).spec(config) == spec


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(BevatronError, match=r"llama3\.2-1b"):
        preset("llama-3.2-1b")


def test_block_lists_have_no_gaps() -> None:
    with pytest.raises(BevatronError, match="2:a1/-"):
        read_blocks("0:a1/- 2:a1/-", 8, 1)


def test_architecture_and_model_type_must_agree():
    with pytest.raises(FamilyError, match=r"architectures .* and model_type 'mistral' disagree"):
        for_config({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"})
