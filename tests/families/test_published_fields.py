"""Fields that publishers write into config.json: which pass, which are refused, which a user may
accept. What decides is whether transformers' own class reads them."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

import pytest
import transformers
from transformers import modeling_layers, modeling_rope_utils

from bevatron.demo.smollm2 import CONFIG as SMOLLM2
from bevatron.families.config_fields import (
    HARMLESS,
    INERT,
    INERT_WHILE_OFF,
    MUST_BE_OFF,
    UnknownField,
    check_accepted,
    spec_of,
)
from bevatron.families.registry import FamilyError, by_name
from bevatron.families.rope_fields import ROPE_FIELDS

LLAMA = by_name("llama")


def test_smollm2_is_understood_as_published() -> None:
    spec = LLAMA.spec(SMOLLM2)
    assert sum(p.numel for p in spec.parameters()) == 134_515_008
    assert LLAMA.config(spec, "bfloat16", SMOLLM2) == SMOLLM2


@pytest.mark.parametrize("name", ["rope_interleaved", "qk_norm", "use_bias", "alibi"])
def test_a_field_that_acts_in_some_reader_passes_only_while_it_is_off(name: str) -> None:
    assert LLAMA.spec({**SMOLLM2, name: False}) == LLAMA.spec(SMOLLM2)
    with pytest.raises(UnknownField, match=name) as caught:
        LLAMA.spec({**SMOLLM2, name: True})
    assert f"--accept-field {name}" in str(caught.value)


def test_an_unknown_field_is_accepted_by_name_only() -> None:
    config = {**SMOLLM2, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
    with pytest.raises(FamilyError, match="--accept-field logits_scaling"):
        spec_of(LLAMA, config, ["embedding_multiplier"])
    spec, accepted = spec_of(LLAMA, config, ["logits_scaling", "embedding_multiplier"])
    assert spec == LLAMA.spec(SMOLLM2)
    assert accepted == {"embedding_multiplier": 12.0, "logits_scaling": 8.0}
    with pytest.raises(FamilyError, match="did you mean logits_scaling"):
        check_accepted(config, ["logit_scaling"])


def test_what_is_understood_is_read_also_if_it_is_accepted() -> None:
    spec, accepted = spec_of(LLAMA, SMOLLM2, ["rope_theta", "is_llama_config"])
    assert spec.rope.theta == 100000
    assert accepted == {}


@pytest.mark.parametrize(
    "field",
    [{"sliding_window": 4096}, {"quantization_config": {"bits": 4}}, {"is_decoder": True},
     {"per_layer_config": {"0": {"skip": ["mlp"]}}}, {"layer_types": ["full_attention"]}],
    ids=lambda field: next(iter(field)),
)  # fmt: skip
def test_what_readers_act_on_cannot_be_accepted(field: dict[str, object]) -> None:
    name = next(iter(field))
    with pytest.raises(FamilyError, match=name) as caught:
        spec_of(LLAMA, SMOLLM2 | field, [name])
    assert "--accept-field" not in str(caught.value)


def read_by(module: ModuleType) -> set[str]:
    """Names that a module of transformers reads off a config: `config.x`, getattr(config, "x")."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            found.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "getattr"
            and _is_config(node.args[0])
            and isinstance(node.args[1], ast.Constant)
        ):
            found.add(str(node.args[1].value))
    return found


def _is_config(node: ast.expr) -> bool:
    return getattr(node, "attr", getattr(node, "id", "")) == "config"


@pytest.mark.parametrize("family", ["llama", "mistral", "nemotron", "nanochat"])
def test_transformers_reads_no_field_that_passes_as_inert(family: str) -> None:
    stem = by_name(family).architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{stem}Config")
    model = inspect.getmodule(getattr(transformers, f"{stem}ForCausalLM"))
    assert model is not None
    read = read_by(model) | read_by(modeling_layers) | read_by(modeling_rope_utils)
    read |= set(config().to_dict()) | set(inspect.signature(config).parameters)
    assert {"hidden_size", "max_position_embeddings", "num_hidden_layers"} <= read
    assert not read & (INERT | {*INERT_WHILE_OFF})


@pytest.mark.parametrize("family", ["llama", "mistral", "nemotron", "nanochat"])
def test_every_field_of_transformers_class_is_known(family: str) -> None:
    """A release that gives a class a field of another meaning turns this red."""
    found = by_name(family)
    config = getattr(transformers, found.architecture.removesuffix("ForCausalLM") + "Config")
    known = HARMLESS | {*MUST_BE_OFF, *ROPE_FIELDS, *getattr(found, "fields", {})}
    known |= {"sliding_window", "final_logit_softcapping", "quantization_config"}
    unknown = [name for name in config().to_dict() if name not in known and name[0] != "_"]
    assert unknown == []


def test_no_name_stands_in_two_lists() -> None:
    lists = [HARMLESS, INERT, {*MUST_BE_OFF}, {*INERT_WHILE_OFF}]
    assert sum(map(len, lists)) == len(set().union(*lists))
