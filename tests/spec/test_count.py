"""Counts are exact: against published totals, against the decoder, against torch's FLOP counter."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bevatron.families import by_name
from bevatron.families.published_models import PRESETS, preset
from bevatron.nn.decoder import Decoder
from bevatron.spec import SpecError
from bevatron.spec.count import (
    flops_per_token,
    layer_flops,
    nbytes,
    parameter_count,
    parameters_by_role,
)
from tests.specs import ALL, HETEROGENEOUS

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-minitron-4b-width": 4_512_746_496,
    "llama3.1-minitron-4b-depth": 4_540_469_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.3-70b": 70_553_706_496,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-nemo-minitron-8b": 8_414_105_600,
    "llama-nemotron-nano-4b": 4_512_746_496,
    "llama-nemotron-nano-8b": 8_030_261_248,
    "llama-nemotron-70b": 70_553_706_496,
    "minitron-4b": 4_190_509_056,
    "minitron-8b": 8_271_699_968,
    "nemotron4-15b": 15_628_775_424,
    "nanochat-d20": 560_988_160,
    "nanochat-d32": 1_879_048_192,
    "llama-nemotron-super-49b": 49_867_145_216,
    "llama-nemotron-ultra-253b": 253_401_268_224,
    "llama-nemotron-51b": 51_501_015_040,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    assert parameter_count(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", [*ALL, *PRESETS])
def test_the_decoder_has_as_many(name: str) -> None:
    spec = ALL[name] if name in ALL else preset(name)
    with torch.device("meta"):
        decoder = Decoder(spec)
    assert sum(p.numel() for p in decoder.parameters()) == parameter_count(spec)
    assert sum(parameters_by_role(spec).values()) == parameter_count(spec)


def test_bytes() -> None:
    assert nbytes(HETEROGENEOUS, "bfloat16") == 2 * parameter_count(HETEROGENEOUS)
    assert nbytes(HETEROGENEOUS, "float32") == 4 * parameter_count(HETEROGENEOUS)
    with pytest.raises(SpecError, match="int4"):
        nbytes(HETEROGENEOUS, "int4")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_flops_are_those_that_torch_counts(tied: bool, bias: bool) -> None:
    """Eager attention computes the full square, so causal=False; torch counts matmuls as we do."""
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    spec = by_name("llama").spec(config.to_dict())
    batch, length = 2, 24
    ids = torch.randint(101, (batch, length))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids, use_cache=False).logits
    # transformers computes the angles of the rotation as a matmul; they are no work of ours
    angles = 2 * length * (16 // 2)
    counted = forward.get_total_flops()
    ours = flops_per_token(spec, length, causal=False) // 3 * batch * length
    assert counted - ours in (0, angles, batch * angles)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * ours


def test_causal_attention_costs_half() -> None:
    spec, length = HETEROGENEOUS, 64
    for i, layer in enumerate(spec.layers):
        matrices = 2 * layer_flops(spec, i, length, True) - layer_flops(spec, i, length, False)
        assert matrices == layer_flops(spec, i, 0, True)
        if layer.attention is None and layer.mlp is None:
            assert matrices == 0
