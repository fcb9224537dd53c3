"""`model: {spec: {depth: N}}` says what NanoChat's base_train.py says for a depth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from bevatron.bridge.convert import export_checkpoint
from bevatron.cli.main import app
from bevatron.errors import BevatronError
from bevatron.families import by_name
from bevatron.families.published_models import preset
from bevatron.recipes import recipe
from bevatron.spec.count import parameter_count
from bevatron.train.config import depth_lines
from bevatron.train.config_file import checked, load_config, to_yaml
from bevatron.train.nanochat_depth import DepthConfig
from tests.train.tiny_run import prepare


def config_of(spec: dict[str, Any], **sections: Any) -> Any:
    raw: dict[str, Any] = {"model": {"spec": spec}, "data": {"train": [{"path": "tokens"}]}}
    return checked({**raw, "run": {"dir": "run"}, **sections}, [], "the case")


def theirs(depth: int, vocab_size: int) -> dict[str, float]:
    """The lines of scripts/base_train.py and nanochat/gpt.py of 2025-11-04 that compute."""
    embedding_lr, unembedding_lr, matrix_lr, total_batch_size = 0.2, 0.004, 0.02, 524288
    model_dim = depth * 64
    num_heads = max(1, (model_dim + 127) // 128)
    with torch.device("meta"):
        made = transformers.NanoChatForCausalLM(
            transformers.NanoChatConfig(
                vocab_size=vocab_size, hidden_size=model_dim, intermediate_size=4 * model_dim,
                num_hidden_layers=depth, num_attention_heads=num_heads,
            )
        )  # fmt: skip
    num_params = sum(p.numel() for p in made.parameters())
    scale = (model_dim / 768) ** -0.5
    return {
        "parameters": num_params,
        "steps": 20 * num_params // total_batch_size,
        "matrix": matrix_lr,
        "embedding": embedding_lr * scale,
        "head": unembedding_lr * scale,
        "batch": total_batch_size,
        "weight_decay": 0.0,
    }


def theirs_2026(depth: int, vocab_size: int) -> dict[str, float]:
    """The same of 2026-07-03, on the matrices and the head of this architecture."""

    def scaling_params(depth: int) -> int:
        h = ((depth * 64 + 127) // 128) * 128
        return depth * 12 * h * h + vocab_size * h

    target_tokens, d_ref = 12 * scaling_params(depth), 12 * scaling_params(12)
    b_ref = 2**19
    batch_size_ratio = target_tokens / d_ref
    total_batch_size = 2 ** round(math.log2(b_ref * batch_size_ratio**0.383))
    lr_scale = (total_batch_size / b_ref) ** 0.5
    width = (((depth * 64 + 127) // 128) * 128 / 768) ** -0.5
    return {
        "steps": target_tokens // total_batch_size,
        "matrix": 0.02 * lr_scale,
        "embedding": 0.3 * lr_scale * width,
        "head": 0.008 * lr_scale * width,
        "batch": total_batch_size,
        "weight_decay": 0.28 * math.sqrt(total_batch_size / b_ref) * (d_ref / target_tokens),
    }


@pytest.mark.parametrize("rules", ["october_2025", "july_2026"])
@pytest.mark.parametrize("depth", [4, 12, 20, 26, 32])
def test_a_depth_means_what_it_means_in_nanochat(depth: int, rules: str) -> None:
    config = config_of({"depth": depth, "rules": rules})
    expected = (theirs if rules == "october_2025" else theirs_2026)(depth, 65536)
    batch = config.train.global_batch * config.data.seq_len
    assert (config.train.steps, batch) == (expected["steps"], expected["batch"])
    optimizer = config.optimizer
    assert optimizer.name == "muon" and config.schedule.name == "wsd"
    found = {"matrix": optimizer.lr, "weight_decay": optimizer.weight_decay}
    found |= {role: optimizer.lr * optimizer.lr_scale[role] for role in ("embedding", "head")}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=5e-4)
    if rules == "october_2025":
        assert parameter_count(config.model.spec.model) == expected["parameters"]


def test_the_presets_and_the_recipe_are_depths() -> None:
    for depth in (20, 32):
        assert DepthConfig(depth=depth).model == preset(f"nanochat-d{depth}")
    published = recipe("nanochat-d20-pretrain").config
    dialled = config_of({"depth": 20})
    assert dialled.optimizer == published.optimizer and dialled.schedule == published.schedule
    assert dialled.data.seq_len == published.data.seq_len
    for key in ("steps", "global_batch"):
        assert getattr(dialled.train, key) == getattr(published.train, key)


def test_an_odd_depth_has_whole_heads_that_transformers_takes() -> None:
    spec = DepthConfig(depth=5).model
    assert spec.hidden_size == 384
    transformers.NanoChatConfig(**by_name("nanochat").config(spec, "float32"))


def test_what_the_configuration_says_goes_first_and_is_told() -> None:
    config = config_of(
        {"depth": 20},
        train={"steps": 7, "global_batch": 512},
        optimizer={"lr": 0.01},
        schedule={"name": "cosine"},
    )
    assert (config.train.steps, config.optimizer.lr, config.optimizer.name) == (7, 0.01, "muon")
    assert config.schedule.name == "cosine" and config.schedule.warmup_steps == 0
    first, second = depth_lines(config)
    assert "1280 channels, 10 heads, 560,988,160 parameters" in first
    assert "optimizer.lr_scale {embedding: 7.746, head: 0.1549}" in first
    for part in ("train.steps 7 (21400)", "train.global_batch 512 (256)", "schedule.name cosine"):
        assert part in second and part.partition(" ")[0] + " " not in first
    halved = config_of({"depth": 20}, train={"global_batch": 512})
    assert halved.train.steps == 10700, "the horizon is in tokens"
    with pytest.raises(BevatronError, match=r"optimizer\.lr: missing"):
        config_of({"depth": 20}, optimizer={"name": "adamw"})
    with pytest.raises(BevatronError) as raised:
        config_of({"dept": 20})
    assert str(raised.value) == "the case: \n  " + "\n  ".join(
        ("model.spec.depth: missing, and there is no default; add it",
         "model.spec.dept: unknown key; did you mean model.spec.depth?"))  # fmt: skip


def test_a_printed_configuration_says_the_same_again(tmp_path: Path) -> None:
    config = config_of({"depth": 26, "rules": "july_2026"})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run.yaml", []) == config
    printed = yaml.safe_load(to_yaml(config))
    assert printed["train"]["steps"] == 11134 and printed["model"]["spec"]["depth"] == 26


@pytest.mark.parametrize("depth", [20, 26, 32])
def test_a_dry_run_says_what_it_takes(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(to_yaml(config_of({"depth": depth}, train={"micro_batch": 8})))
    app(["train", "run.yaml", "--dry-run", "--world", "8", "--json"], standalone_mode=False)
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == theirs(depth, 65536)["parameters"]
    assert plan["steps"] * plan["tokens_per_step"] <= 20 * plan["parameters"]
    assert f"depth {depth}: " in plan["depth"][0] and plan["stages"][0]["peak"] > 0


def test_a_small_one_trains_goes_on_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(prepare(tmp_path / "work"))
    Path("run.yaml").write_text(
        "model: {spec: {depth: 2, vocab_size: 300}}\n"
        "tokenizer: tokenizer\n"
        "data: {train: [{path: tokens}], seq_len: 16}\n"
        "train: {steps: 2, global_batch: 2, precision: fp32}\n"
        "run: {dir: run}\n"
    )
    for steps in (2, 3):
        app(["train", "run.yaml", f"train.steps={steps}"], standalone_mode=False)
    said = capsys.readouterr().err
    assert said.count("NanoChat of depth 2: 128 channels, 1 heads") == 1  # where it begins
    assert "otherwise than depth 2 alone would have it: data.seq_len 16 (2048)" in said
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    export_checkpoint("run", "hf", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained("hf")
    assert type(model).__name__ == "NanoChatForCausalLM"
