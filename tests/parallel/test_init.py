"""Random weights are distributed as the family's own class in transformers draws them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import bevatron.hf
from bevatron.families import for_config
from bevatron.parallel.random_weights import fill
from bevatron.spec import LayerSpec, Linear, ModelSpec
from bevatron.spec.json import from_json, to_json
from bevatron.train.config_file import load_config
from bevatron.train.run_start import find_start

SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
    {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
]


def llama_nemotron() -> Any:
    sizes = SIZES | {"num_hidden_layers": len(BLOCKS), "block_configs": BLOCKS}
    sizes |= {"num_key_value_heads": None, "intermediate_size": None}
    return bevatron.hf.DeciLMConfig(**sizes)


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, initializer_range=0.03),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "nanochat": lambda: transformers.NanoChatConfig(**SIZES),
    "nemotron": lambda: transformers.NemotronConfig(**SIZES, head_dim=64),
    "llama-nemotron": llama_nemotron,
}
ROLES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "fc1": "up"}
ROLES |= {"fc2": "down", "down_proj": "down", "gate_proj": "gate_up", "lm_head": "head"}
ROLES |= {"embed_tokens": "embedding", "linear_attn": "linear", "linear_mlp": "linear"}


def theirs(model: torch.nn.Module, gated: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        part = name.split(".")[-2]
        role = ROLES.get(part, "norm")
        if part == "up_proj":
            role = "gate_up" if gated else "up"
        yield role, parameter.detach()


def ours(spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    for parameter in spec.parameters():
        tensor = torch.full(parameter.shape, torch.nan)
        fill(tensor, parameter, spec, seed=1)
        yield parameter.role, tensor


def moments(parameters: Iterator[tuple[str, Tensor]]) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation) of all elements of a role."""
    by_role: dict[str, list[Tensor]] = {}
    for role, tensor in parameters:
        by_role.setdefault(role, []).append(tensor.flatten())
    flat = {role: torch.cat(tensors).double() for role, tensors in by_role.items()}
    return {role: (float(t.mean()), float(t.std())) for role, t in flat.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_role_is_drawn_as_in_transformers(family: str) -> None:
    """Standard deviations to 2%: the fewest elements of a role are 65,536, whose estimate is good
    to 0.3%. NanoChat's row of zeros for padding is 0.1% of its embedding."""
    config = CONFIGS[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    spec = for_config(
        config.to_dict() | {"architectures": [type(model).__name__], "torch_dtype": "float32"}
    ).spec(config.to_dict() | {"architectures": [type(model).__name__]})
    gated = any(p.role == "gate_up" for p in spec.parameters())
    expected, found = moments(theirs(model, gated)), moments(ours(spec))
    assert set(found) == set(expected)
    for role, (mean, std) in found.items():
        if role == "norm":
            continue
        assert std == pytest.approx(expected[role][1], rel=2e-2), role
        assert abs(mean) < 0.02 * std, role
    if family == "nemotron":
        # transformers fills LayerNorm1P's zero-centred weight with ones, which doubles every norm's
        # output; the identity is zero, as in Megatron, where these models were trained.
        assert expected["norm"][0] == 0.5  # ones and zero biases
        assert found["norm"] == (0.0, 0.0)
    elif "norm" in found:
        assert found["norm"] == expected["norm"] == (1.0, 0.0)


def test_a_depth_scaled_start_shrinks_what_is_added_to_the_residual_stream(tmp_path: Path) -> None:
    """By the root of the number of sublayers that there are: 7 here, 2 L where none is absent."""
    base = for_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).spec(
        transformers.LlamaConfig(**SIZES).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    )
    layers = (*base.layers[:3], LayerSpec(Linear(), None), LayerSpec(None, None))
    (tmp_path / "spec.json").write_text(to_json(replace(base, layers=layers)), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        f"model: {{spec: {tmp_path}/spec.json, init_std: 0.1, depth_scaled: true}}\n"
        "data: {train: [{path: tokens}], seq_len: 16}\n"
        "train: {steps: 5, global_batch: 8}\n"
        "optimizer: {lr: 1e-4}\n"
        f"run: {{dir: {tmp_path}/run}}\n",
        encoding="utf-8",
    )
    spec = find_start(load_config(tmp_path / "run.yaml", [])).spec
    assert from_json(to_json(spec)) == spec
    found = {role: std for role, (_, std) in moments(ours(spec)).items()}
    for role in ("qkv", "gate_up", "embedding", "head"):
        assert found[role] == pytest.approx(0.1, rel=2e-2), role
    for role in ("o", "down", "linear"):
        assert found[role] == pytest.approx(0.1 / 7**0.5, rel=2e-2), role
