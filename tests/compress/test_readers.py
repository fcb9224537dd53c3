"""Which other programs read the export of a pruned model; vLLM and llama.cpp are run in
`tests/readers`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bevatron.bridge.remote_code import READERS, readers
from bevatron.compress.prune_targets import Targets
from bevatron.compress.pruned_spec import shape
from bevatron.families import by_name
from bevatron.families.published_models import preset
from bevatron.spec import MLP, Attention, LayerSpec, Linear, ModelSpec, Norm, Rope

LLAMA = preset("llama3.1-8b")
NEMOTRON = ModelSpec(
    vocab_size=256000,
    hidden_size=4096,
    layers=(LayerSpec(Attention(32, 8, 128), MLP(16384, "relu2", gated=False)),) * 4,
    norm=Norm("layernorm1p"),
    rope=Rope(partial=0.5),
)
IF_MODEL = "yes, if its converter takes the tokenizer: it reads tokenizer.model only of a Nemotron"
WIDTH = Targets(hidden_size=3072, intermediate_size=9216)


def pruned(spec: ModelSpec, family: str, targets: Targets = WIDTH) -> dict[str, str]:
    return readers(shape(spec, targets, None, by_name(family)).spec, family)


def with_layers(spec: ModelSpec, **changes) -> ModelSpec:
    mlp = replace(spec.layers[0].mlp, **changes)
    return replace(spec, layers=(replace(spec.layers[0], mlp=mlp),) * len(spec.layers))


def test_a_llama_that_lost_channels_has_a_head_dim_of_its_own() -> None:
    depth = Targets(drop_layers=tuple(range(15, 31)))
    assert pruned(LLAMA, "llama", depth) == dict.fromkeys(READERS, "yes")
    for family in ("llama", "mistral"):
        found = pruned(LLAMA, family)
        assert found.pop("llama.cpp").startswith("since September 2024: head_dim")
        assert set(found.values()) == {"yes"}


def test_sglang_leaves_biases_of_a_llamas_mlp_out() -> None:
    found = pruned(with_layers(LLAMA, bias=True), "llama")
    assert found["SGLang"].startswith("no: it has biases in the MLP")
    assert found["vLLM"] == found["TensorRT-LLM"] == "yes"


def test_llama_cpp_takes_a_nemotrons_head_dim_from_its_hidden_size() -> None:
    same = pruned(NEMOTRON, "nemotron", Targets(intermediate_size=9216))
    assert same.pop("SGLang").startswith("by its fallback")
    assert same.pop("llama.cpp") == IF_MODEL
    assert set(same.values()) == {"yes"}
    found = pruned(NEMOTRON, "nemotron")
    assert found["vLLM"] == found["TensorRT-LLM"] == "yes"
    assert found["llama.cpp"].startswith("no: head_dim is not hidden_size")
    heads = pruned(NEMOTRON, "nemotron", Targets(num_attention_heads=16))
    assert heads["llama.cpp"].startswith("no: head_dim is not hidden_size")
    both = Targets(hidden_size=2048, num_attention_heads=16)
    assert pruned(NEMOTRON, "nemotron", both)["llama.cpp"] == IF_MODEL
    tied = pruned(replace(NEMOTRON, tie_word_embeddings=True), "nemotron", both)
    assert "tied" in tied["llama.cpp"]


def test_nobody_has_a_class_for_nanochat() -> None:
    found = readers(LLAMA, "nanochat")
    assert all(found[name].startswith("by its fallback") for name in ("vLLM", "SGLang"))
    assert all(found[name].startswith("no: ") for name in ("TensorRT-LLM", "llama.cpp"))


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_llama_cpp_knows_few_ropes_of_layers_that_differ(kind: str) -> None:
    more = {"factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0}
    rope = Rope(kind=kind, original_max_position_embeddings=64, **more)  # type: ignore[arg-type]
    layers = (LayerSpec(Attention(8, 2, 8), MLP(256)), LayerSpec(None, MLP(512)))
    spec = ModelSpec(vocab_size=97, hidden_size=64, layers=layers, rope=rope)
    found = readers(spec, "llama_nemotron")
    assert kind in found.pop("llama.cpp")
    assert set(found.values()) == {"yes"}


def test_llama_cpp_wants_an_attention_in_the_first_layer_that_differs() -> None:
    """An empty first layer is as bad; a matrix in its place is not (all of them were run)."""
    whole, wide = LayerSpec(Attention(4, 2, 32), MLP(256)), MLP(512)
    for first, reads in (
        (LayerSpec(None, wide), False),
        (LayerSpec(None, None), False),
        (LayerSpec(Linear(), wide), True),
    ):
        spec = ModelSpec(vocab_size=128256, hidden_size=128, layers=(first, whole))
        found = readers(spec, "llama_nemotron")["llama.cpp"]
        assert found == ("yes" if reads else "no: its first layer has no attention")


def test_llama_cpp_reads_few_tokenizers_of_layers_that_differ() -> None:
    layers = (LayerSpec(Attention(4, 2, 32), MLP(256)), LayerSpec(None, MLP(512)))
    llama3, smaller = (ModelSpec(size, 128, layers) for size in (128256, 49152))
    assert readers(llama3, "llama_nemotron")["llama.cpp"] == "yes"
    found = readers(smaller, "llama_nemotron")
    assert found.pop("llama.cpp").startswith("yes, if its converter takes the tokenizer")
    assert set(found.values()) == {"yes"}
