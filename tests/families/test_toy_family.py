"""A family from outside: everything that a user's own file can do without touching the library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.inspect import inspect
from bevatron.evaluate.verify import verify
from bevatron.families import FamilyError, register, registry
from bevatron.families.config_fields import Field, flag, size
from bevatron.families.uniform_family import Uniform
from bevatron.families.weight_map import Names
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import MLP
from tests.bridge.hf_folders import assert_same_folder

# --- what a user writes ---------------------------------------------------------------------------

TOY = Uniform(
    name="toy",
    model_type="toy",
    stem="Toy",
    fields={
        "vocab_size": size(100),
        "hidden_size": size(32),
        "intermediate_size": size(64),
        "num_hidden_layers": size(2),
        "num_attention_heads": size(4),
        "num_key_value_heads": size(4),
        "head_dim": size(8),
        "hidden_act": Field("string", "relu_squared"),
        "max_position_embeddings": size(64),
        "initializer_range": Field("number", 0.02),
        "norm_epsilon": Field("number", 1e-5),
        "tie_word_embeddings": flag(False),
    },
    eps="norm_epsilon",
    activations=("relu_squared",),
    mlp=MLP(1, "relu2", gated=False),
    names=Names(
        embed="model.wte.weight",
        q="model.blocks.{i}.attn.wq.{kind}",
        k="model.blocks.{i}.attn.wk.{kind}",
        v="model.blocks.{i}.attn.wv.{kind}",
        o="model.blocks.{i}.attn.wo.{kind}",
        attention_norm="model.blocks.{i}.norm_1.{kind}",
        mlp_norm="model.blocks.{i}.norm_2.{kind}",
        up="model.blocks.{i}.fc_in.{kind}",
        down="model.blocks.{i}.fc_out.{kind}",
        final_norm="model.ln_f.{kind}",
    ),
    heads=("causal_lm",),
)

# --------------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[None]:
    register(TOY)
    yield
    registry._REGISTERED.remove(TOY)


def make(path: Path) -> Path:
    path.mkdir()
    config = {"architectures": ["ToyForCausalLM"], "model_type": "toy", "num_key_value_heads": 2}
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {
        "model.wte.weight": torch.randn(100, 32),
        "model.ln_f.weight": torch.randn(32),
        "lm_head.weight": torch.randn(100, 32),
    }
    for i in range(2):
        block = f"model.blocks.{i}"
        tensors |= {
            f"{block}.attn.wq.weight": torch.randn(32, 32),
            f"{block}.attn.wk.weight": torch.randn(16, 32),
            f"{block}.attn.wv.weight": torch.randn(16, 32),
            f"{block}.attn.wo.weight": torch.randn(32, 32),
            f"{block}.norm_1.weight": torch.randn(32),
            f"{block}.norm_2.weight": torch.randn(32),
            f"{block}.fc_in.weight": torch.randn(64, 32),
            f"{block}.fc_out.weight": torch.randn(32, 64),
        }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def forward(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The toy's own forward pass, written out."""
    w = load_file(folder / "model.safetensors")

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    angle = torch.arange(len(ids))[:, None] * 10000.0 ** -(torch.arange(4) / 4)

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :4], x[..., 4:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    x = w["model.wte.weight"][ids]
    for i in range(2):
        p = f"model.blocks.{i}"
        h = rms(x, w[f"{p}.norm_1.weight"])
        q, k, v = (
            (h @ w[f"{p}.attn.w{n}.weight"].T).view(len(ids), -1, 8).transpose(0, 1) for n in "qkv"
        )
        q, k, v = turn(q), turn(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = q @ k.transpose(1, 2) / 8**0.5 + torch.full((len(ids),) * 2, -1e9).triu(1)
        y = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + y @ w[f"{p}.attn.wo.weight"].T
        h = rms(x, w[f"{p}.norm_2.weight"])
        x = x + (h @ w[f"{p}.fc_in.weight"].T).relu().square() @ w[f"{p}.fc_out.weight"].T
    return rms(x, w["model.ln_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.usefixtures("registered")
def test_a_registered_family_converts_and_runs(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    report = import_checkpoint(source, tmp_path / "native")
    assert report.family == "toy"
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")
    assert verify(tmp_path / "native", source, logits=False).ok
    assert inspect(tmp_path / "native")["family"] == "toy"
    decoder, spec = load_decoder(tmp_path / "native")
    ids = torch.randint(spec.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = forward(source, ids[0])
        assert (decoder.logits(ids)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_unregistered_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match="ToyForCausalLM"):
        import_checkpoint(make(tmp_path / "hf"), tmp_path / "native")


@pytest.mark.usefixtures("registered")
def test_a_taken_name_is_refused() -> None:
    with pytest.raises(FamilyError, match="taken by 'toy'"):
        register(TOY)
