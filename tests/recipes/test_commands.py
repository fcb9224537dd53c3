"""The commands that a recipe prints, run as they stand on a toy that stands in for the real model:
all widths a hundredth or so, every axis cut by the same ratio."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers

from bevatron.families.published_models import family_of, preset
from bevatron.recipes import recipe
from bevatron.spec import MLP, Attention, ModelSpec
from tests.commands import bevatron
from tests.train.small_run import lines
from tests.train.tiny_run import prepare

VOCAB, LENGTH = 300, 16


def toy(name: str, layers: int) -> ModelSpec:
    """A published model: hidden 1/128, heads 1/8, MLP 1/256 of it."""
    spec = preset(name)
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    heads, groups = attention.num_attention_heads // 8, attention.num_key_value_heads // 8
    layer = replace(
        spec.layers[0],
        attention=replace(
            attention, num_attention_heads=heads, num_key_value_heads=groups, head_dim=8
        ),
        mlp=replace(mlp, intermediate_size=mlp.intermediate_size // 256),
    )
    return replace(
        spec,
        vocab_size=VOCAB,
        hidden_size=spec.hidden_size // 128,
        layers=(layer,) * layers,
        max_position_embeddings=64,
        rope=replace(spec.rope, kind="default") if spec.rope.kind == "llama3" else spec.rope,
    )


@dataclass(frozen=True)
class Case:
    """Recipes that follow on one another. `bring`: what a user has to bring for them, by the name
    that their commands have for it -> the preset that it is; `layers`: how many the toy has."""

    names: tuple[str, ...]
    bring: dict[str, str]
    layers: int = 2


def save(folder: Path, name: str, layers: int, tokenizer: Path) -> None:
    """A random model, written by transformers."""
    config = family_of(name).config(toy(name, layers), "float32")
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def small(command: list[str], name: str, layers: int) -> list[str]:
    """The same command for the toy: sizes and lengths of its own, one process for --nproc 8."""
    if command[0] == "train":
        config = recipe(command[1]).config
        overrides = ["model.like=null", f"data.seq_len={LENGTH}", "train.precision=fp32"]
        overrides += ["train.steps=3", "train.global_batch=4", "parallel.tp=1"]
        overrides += ["schedule.warmup_steps=1"]
        if config.objective.name == "distill":
            overrides += ["objective.teacher_like=null"]
        else:
            overrides += [f"model.init={local(str(config.model.init))}"]
        return [*command[:2], *overrides]
    part = recipe(name).config.prune
    if command[0] != "prune" or part is None or part.drop_layers:
        return command
    layer = (spec := toy(str(recipe(name).config.model.like), layers)).layers[0]
    sizes = ["--hidden-size", spec.hidden_size, "--intermediate-size", layer.mlp.intermediate_size]
    if part.num_attention_heads is not None:
        sizes += ["--num-attention-heads", layer.attention.num_attention_heads]
    return [*command, "--samples", "4", *map(str, sizes)]


def local(name: str) -> str:
    """Where the toy for what a command names lies: no Hub id."""
    return name if name.startswith("path/") else name.replace("/", "_")


CASES = {
    "width": Case(("llama3.1-minitron-4b-width",), {"meta-llama/Llama-3.1-8B": "llama3.1-8b"}),
    "depth": Case(("llama3.1-minitron-4b-depth",), {"meta-llama/Llama-3.1-8B": "llama3.1-8b"}, 32),
    "nemotron": Case(("minitron-8b", "minitron-4b"), {"path/to/nemotron-4-15b": "nemotron4-15b"}),
    "mistral": Case(
        ("mistral-nemo-minitron-8b",), {"mistralai/Mistral-Nemo-Base-2407": "mistral-nemo-12b"}
    ),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "width"]


@pytest.mark.parametrize("case", ["width", *SLOW])
def test_its_commands_lead_from_text_to_a_model_that_transformers_loads(
    case: str, tmp_path: Path
) -> None:
    chosen = CASES[case]
    prepare(tmp_path / "made")
    named = {"path/to/text": "made/text.txt"}
    for name, model in chosen.bring.items():
        named[name] = local(name)
        save(tmp_path / named[name], model, chosen.layers, tmp_path / "made/tokenizer")
    for name in chosen.names:
        found, done = recipe(name), []
        for line in found.commands:
            command = [named.get(word, word) for word in line.split()[1:]]
            if command[0] == "tokenize" and (tmp_path / "tokens").exists():
                continue
            status, said = bevatron(tmp_path, *small(command, name, chosen.layers))
            assert status == 0, (command, said)
            done.append(command[0])
        config = found.config
        assert done[-3:] == ["prune", "train", "export"]
        distilled = lines(tmp_path / config.run.dir)
        assert [line["step"] for line in distilled] == [1, 2, 3]
        assert all(line["kl"] > 0 for line in distilled)

        pruned = json.loads((tmp_path / str(config.model.init) / "pruning.json").read_text())
        hf = tmp_path / f"runs/{name}/hf"
        model = transformers.AutoModelForCausalLM.from_pretrained(hf)
        small_spec = toy(str(config.model.like), len(pruned["layers"]))
        assert pruned["parameters"]["after"] == model.num_parameters()
        assert model.config.hidden_size == small_spec.hidden_size
        assert model.config.intermediate_size == small_spec.layers[0].mlp.intermediate_size
        heads = small_spec.layers[0].attention.num_attention_heads
        assert model.config.num_attention_heads == heads
        kept = [*range(15), 31] if case == "depth" else list(range(chosen.layers))
        assert pruned["layers"] == kept and model.config.num_hidden_layers == len(kept)
        text = transformers.AutoTokenizer.from_pretrained(hf)("a b", return_tensors="pt")
        with torch.no_grad():
            assert model(input_ids=text["input_ids"]).logits.isfinite().all()
