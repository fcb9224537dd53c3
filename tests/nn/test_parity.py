"""The decoder computes what transformers computes: fp32, tiny random models, 1e-5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from bevatron.generate.engine import decode
from bevatron.generate.load import load_decoder
from bevatron.generate.sampling import Sampling
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
}
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
NEMOTRON = {
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
    ours = list(decode(decoder, prompt[0].tolist(), Sampling(), 20, frozenset()))
    assert ours == theirs[0, 7:].tolist()


@pytest.mark.parametrize("variant", LLAMA)
def test_llama(variant: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**SMALL, **LLAMA[variant]})
    assert_parity(save(transformers.LlamaForCausalLM(config), tmp_path), tmp_path)


@pytest.mark.parametrize("variant", NEMOTRON)
def test_nemotron(variant: str, tmp_path: Path) -> None:
    config = transformers.NemotronConfig(**{**SMALL, **NEMOTRON[variant]})
    assert_parity(save(transformers.NemotronForCausalLM(config), tmp_path), tmp_path)


@pytest.mark.parametrize("variant", NANOCHAT)
def test_nanochat(variant: str, tmp_path: Path) -> None:
    config = transformers.NanoChatConfig(**{**SMALL, **NANOCHAT[variant]})
    assert_parity(save(transformers.NanoChatForCausalLM(config), tmp_path), tmp_path)


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
        ours = list(decode(decoder, prompt, Sampling(), 20, frozenset()))
        assert ours == greedy(model, prompt, 20)
