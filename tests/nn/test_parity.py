"""The decoder computes what transformers computes: fp32, tiny random models, 1e-5."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from bevatron.errors import BevatronError
from bevatron.generate.engine import Engine
from bevatron.generate.request import Request
from bevatron.parallel.whole_decoder import load_decoder
from tests.nn.llama_nemotron_reference import (
    BLOCKS,
    ReferenceLlamaNemotron,
    published_config,
)

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
YARN = ROPE["yarn"] | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.5}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 6},
    "rope-linear": {"rope_parameters": ROPE["linear"]},
    "rope-llama3": {"rope_parameters": ROPE["llama3"], "rms_norm_eps": 1e-5},
}
LLAMA |= {
    "rope-dynamic": {"rope_parameters": ROPE["dynamic"]},
    "rope-dynamic-beyond": {"rope_parameters": ROPE["dynamic"], "max_position_embeddings": 16},
    "rope-yarn": {"rope_parameters": ROPE["yarn"]},
    "rope-yarn-betas": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "rope-yarn-mscale": {"rope_parameters": ROPE["yarn"] | MSCALE, "head_dim": 32},
    "rope-old-spelling": {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
}
NEMOTRON = {
    "rope-llama3": {"rope_parameters": ROPE["llama3"], "head_dim": 16},
    "rope-yarn": {"rope_parameters": YARN, "partial_rotary_factor": 0.25, "head_dim": 32},
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "partial": {"partial_rotary_factor": 0.25, "head_dim": 16},
}
NANOCHAT = {
    "plain": {"num_key_value_heads": 6},
    "gqa": {},
    "softcap": {"final_logit_softcapping": 5.0},
}


def save(model: Any, folder: Path) -> Any:
    """Random weights of a size at which every part matters, norms included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + noise * (0.2 if parameter.ndim == 1 else 0.15)
    model.eval().save_pretrained(folder)
    return model


def assert_parity(model: Any, folder: Path) -> None:
    decoder, spec = load_decoder(folder)
    ids = torch.randint(spec.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        got = decoder.logits(ids)
    assert expected.std() > 0.1, "the model is too flat to tell"
    assert (got - expected).abs().max() <= 1e-5
    prompt = ids[:1, :7]
    theirs = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    with Engine.open(folder) as engine:
        ours = engine.complete([Request(tuple(prompt[0].tolist()), 20)])[0]
    assert ours.tokens == theirs[0, 7:].tolist()


@pytest.mark.parametrize("variant", LLAMA)
def test_llama(variant: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**deepcopy({**SMALL, **LLAMA[variant]}))
    assert_parity(save(transformers.LlamaForCausalLM(config), tmp_path), tmp_path)


@pytest.mark.parametrize("variant", NEMOTRON)
def test_nemotron(variant: str, tmp_path: Path) -> None:
    config = transformers.NemotronConfig(**deepcopy({**SMALL, **NEMOTRON[variant]}))
    assert_parity(save(transformers.NemotronForCausalLM(config), tmp_path), tmp_path)


@pytest.mark.parametrize("variant", NANOCHAT)
def test_nanochat(variant: str, tmp_path: Path) -> None:
    config = transformers.NanoChatConfig(**deepcopy({**SMALL, **NANOCHAT[variant]}))
    assert_parity(save(transformers.NanoChatForCausalLM(config), tmp_path), tmp_path)


@pytest.mark.parametrize("variant", ["plain", "head_dim", "tied", "rope-yarn"])
def test_mistral_without_a_window(variant: str, tmp_path: Path) -> None:
    config = transformers.MistralConfig(
        **deepcopy({**SMALL, "sliding_window": None, **LLAMA[variant]})
    )
    assert_parity(save(transformers.MistralForCausalLM(config), tmp_path), tmp_path)


LABELS = {"id2label": {0: "bad", 1: "so-so", 2: "good"}}


@pytest.mark.parametrize("stem", ["Llama", "Nemotron", "Mistral"])
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("changes", [LABELS, {"token_classification_bias": False}], ids=["3", "2"])
def test_classification_heads(stem: str, head: str, changes: dict, tmp_path: Path) -> None:
    also = {"sliding_window": None} if stem == "Mistral" else {}
    config = getattr(transformers, f"{stem}Config")(**SMALL | also | changes | {"pad_token_id": 3})
    model = save(getattr(transformers, f"{stem}For{head}")(config), tmp_path)
    decoder, spec = load_decoder(tmp_path)
    assert len(spec.head.labels) == len(config.id2label)
    ids = torch.randint(4, spec.vocab_size, (4, 17), generator=torch.Generator().manual_seed(1))
    ids[1, 9:] = 3  # padded at the end, in the middle, throughout
    ids[2, 5] = 3
    ids[3] = 3
    with torch.no_grad():
        expected = model(ids).logits
        assert expected.std() > 0.1
        assert (decoder.logits(ids) - expected).abs().max() <= 1e-5


def test_sequences_without_a_padding_token_come_one_at_a_time(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SMALL)
    model = save(transformers.LlamaForSequenceClassification(config), tmp_path)
    decoder, _ = load_decoder(tmp_path)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert (decoder.logits(ids[:1]) - model(ids[:1]).logits).abs().max() <= 1e-5
        with pytest.raises(BevatronError, match="pad_token_id"):
            decoder.logits(ids)


@pytest.mark.parametrize("stem", ["Llama", "Nemotron", "Mistral"])
def test_question_answering(stem: str, tmp_path: Path) -> None:
    also = {"sliding_window": None} if stem == "Mistral" else {}
    config = getattr(transformers, f"{stem}Config")(**SMALL | also)
    model = save(getattr(transformers, f"{stem}ForQuestionAnswering")(config), tmp_path)
    decoder, spec = load_decoder(tmp_path)
    ids = torch.randint(spec.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(ids)
        ours = decoder.logits(ids)
    assert out.start_logits.std() > 0.1
    assert (ours[..., 0] - out.start_logits).abs().max() <= 1e-5
    assert (ours[..., 1] - out.end_logits).abs().max() <= 1e-5


@pytest.mark.parametrize("stem", ["Llama", "Nemotron", "NanoChat", "Mistral"])
def test_bare_models_give_hidden_states(stem: str, tmp_path: Path) -> None:
    also = {"sliding_window": None} if stem == "Mistral" else {}
    config = getattr(transformers, f"{stem}Config")(**SMALL | also)
    model = save(getattr(transformers, f"{stem}Model")(config), tmp_path)
    decoder, spec = load_decoder(tmp_path)
    ids = torch.randint(spec.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        assert (decoder.logits(ids) - expected).abs().max() <= 1e-5


def greedy(model: ReferenceLlamaNemotron, ids: list[int], count: int) -> list[int]:
    """The slow way: the whole sequence again for every token."""
    out = list(ids)
    for _ in range(count):
        out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
    return out[len(ids) :]


def test_llama_nemotron_against_an_independent_composition(tmp_path: Path) -> None:
    """transformers has no class for it, so transformers' Llama parts are composed a second time."""
    config = published_config(BLOCKS)
    model = ReferenceLlamaNemotron(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise * 0.2 if "norm" in name else noise * 0.1
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder, spec = load_decoder(tmp_path)
    ids = torch.randint(spec.vocab_size, (2, 33), generator=generator)
    with torch.no_grad():
        expected = model(ids)
        assert expected.std() > 0.1
        assert (decoder.logits(ids) - expected).abs().max() <= 1e-5
        prompt = ids[0, :7].tolist()
        with Engine.open(tmp_path) as engine:
            ours = engine.complete([Request(tuple(prompt), 20)])[0]
        assert ours.tokens == greedy(model, prompt, 20)
