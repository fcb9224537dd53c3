"""Recipes say what is published, at the sizes that are published, and can be planned and found."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bevatron.cli.main import app
from bevatron.compress.prune import prune
from bevatron.compress.prune_targets import Targets, parse_layers
from bevatron.errors import BevatronError
from bevatron.families.published_models import preset
from bevatron.recipes import Recipe, find, recipe, recipes, sizes
from bevatron.spec.count import parameter_count
from bevatron.spec.json import to_json
from bevatron.train.config_file import load_config, to_yaml
from bevatron.train.launch import prepared, train
from bevatron.train.missing_inputs import check_present
from tests.bridge.hf_folders import make
from tests.data.test_store import write_store
from tests.train.tiny_run import SPEC

# Of the papers and of the published checkpoints, not of our presets: parameters, and tokens / 10^9
# where these are published.
NANO, SUPER, ULTRA = 8_030_261_248, 49_867_145_216, 253_401_268_224
PUBLISHED = {
    "llama-nemotron-nano-rpo-1": (NANO, None),
    "llama-nemotron-nano-rpo-2": (NANO, None),
    "llama-nemotron-nano-sft-1": (NANO, None),
    "llama-nemotron-nano-sft-2": (NANO, None),
    "llama-nemotron-nano-sft-3": (NANO, None),
    "llama-nemotron-super-if-rl": (SUPER, None),
    "llama-nemotron-super-rpo": (SUPER, None),
    "llama-nemotron-super-sft": (SUPER, None),
    "llama-nemotron-ultra-reasoning-rl": (ULTRA, None),
    "llama-nemotron-ultra-rlhf": (ULTRA, None),
    "llama-nemotron-ultra-sft": (ULTRA, None),
    "llama3-8b-pretrain": (8_030_261_248, 15_000),
    "llama3.1-8b-teacher-correction": (8_030_261_248, 100),
    "llama3.1-minitron-4b-depth": (4_540_469_248, 94),
    "llama3.1-minitron-4b-width": (4_512_746_496, 94),
    "minitron-4b": (4_190_509_056, 94),
    "minitron-8b": (8_271_699_968, 94),
    "mistral-nemo-12b-teacher-correction": (12_247_782_400, 127),
    "mistral-nemo-minitron-8b": (8_414_105_600, 380),
    "nanochat-d20-pretrain": (560_988_160, 11.22),
    "nanochat-d20-rl": (560_988_160, 0.122),
    "nanochat-d20-sft": (560_988_160, 0.046),
}
ALL = [pytest.param(found, id=found.path.stem) for found in recipes()]
PRUNED = [found for found in recipes() if found.config.prune is not None]


def test_all_are_known_here() -> None:
    assert [found.path.stem for found in recipes()] == sorted(PUBLISHED)


@pytest.mark.parametrize("found", ALL)
def test_it_is_a_run_configuration_of_the_published_size_and_length(found: Recipe) -> None:
    row = found.to_dict()
    parameters, billions = PUBLISHED[found.path.stem]
    assert (row["name"], row["parameters"]) == (found.path.stem, parameters)
    batch = found.config.train.global_batch * found.config.data.seq_len
    batch *= found.config.objective.sequences
    tokens = found.config.train.steps * batch
    assert row["tokens"] == tokens
    nanochat = found.path.stem.startswith("nanochat")  # whose steps are whole, or are of answers
    if billions is not None and not nanochat:
        assert 0 <= tokens - billions * 10**9 < batch, "the last step is the first to reach them"
    comments = [int(n.replace(",", "")) for n in re.findall(r"# ([\d,]+) parameters", found.text)]
    assert comments == [parameters]
    assert yaml.safe_load(to_yaml(found.config))["recipe"]["name"] == found.path.stem


@pytest.mark.parametrize("found", ALL)
def test_every_number_says_whether_it_is_published(found: Recipe) -> None:
    section = ""
    seen = 0
    for line in found.text.splitlines():
        if line and not line.startswith((" ", "#")):
            section = line.partition(":")[0]
        if section in ("prune", "data", "train", "optimizer", "schedule") and line.startswith(" "):
            assert re.search(r"# .*\b(published|ours|yours)\b", line), line
            seen += 1
    assert seen > 12


@pytest.mark.parametrize("found", PRUNED, ids=lambda found: found.path.stem)
def test_its_prune_part_makes_the_model_that_it_distils(found: Recipe, tmp_path: Path) -> None:
    """At the real size, from a preset's name: without weights."""
    about, part, model = found.config.recipe, found.config.prune, found.config.model
    assert about is not None and part is not None and model.like is not None
    targets = Targets(
        part.hidden_size,
        part.intermediate_size,
        part.num_attention_heads,
        drop_layers=parse_layers(part.drop_layers) if part.drop_layers else (),
    )
    report = prune(str(about.from_), tmp_path / "none", targets, dry_run=True)
    assert report.before == parameter_count(preset(str(about.from_)))
    assert report.parameters == PUBLISHED[found.path.stem][0]
    spec = preset(model.like)
    layer = spec.layers[0]
    assert report.sizes == {
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.mlp.intermediate_size,
        "num_attention_heads": layer.attention.num_attention_heads,
        "num_key_value_heads": layer.attention.num_key_value_heads,
        "head_dim": 128,
        "num_hidden_layers": len(spec.layers),
    }
    classes = {"llama3": "Llama", "minitr": "Nemotron", "mistra": "Mistral"}
    assert report.exports_as == f"{classes[found.path.stem[:6]]}ForCausalLM"
    assert not (tmp_path / "none").exists()


def planned(found: Recipe, capsys: pytest.CaptureFixture[str]) -> dict:
    train(found.path, [], dry_run=True, as_json=True)
    return json.loads(capsys.readouterr().out)


def check_plan(found: Recipe, plan: dict) -> None:
    config = found.config
    assert plan["parameters"] == PUBLISHED[found.path.stem][0]
    assert plan["ranks"] == config.recipe.world
    assert plan["steps"] * plan["tokens_per_step"] == found.to_dict()["tokens"]
    peaks = [stage["peak"] for stage in plan["stages"]]
    assert min(peaks) > 0 and max(peaks) < 80 * 2**30, "one of the GPUs that were used"
    warned = [w.partition(":")[0] for w in plan["warnings"]]
    if found.path.stem.startswith("llama-nemotron"):
        judged = ["objective.rewards.0.path"] * ("reward_model" in found.text)
        assert warned == ["model.init", *judged, *(source.path for source in config.data.train)]
        return
    expected = {"distill": ["model.init", "objective.teacher", "tokens"], "pretrain": ["tokens"]}
    if found.path.stem.startswith("nanochat") and config.model.init is not None:
        assert warned[0] == "model.init"
        return
    correction = config.objective.name == "pretrain" and config.model.init is not None
    assert warned == ["model.init"] * correction + expected[config.objective.name]


def test_a_distillation_is_planned_at_its_real_size_without_weights_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = recipe("llama3.1-minitron-4b-width")
    plan = planned(found, capsys)
    check_plan(found, plan)
    # The 8B teacher lies in the run's dtype beside the student's fp32: norms once per tensor rank.
    teacher = preset("llama3.1-8b")
    norms = 2 * len(teacher.layers) + 1
    held = (parameter_count(teacher) + teacher.hidden_size * norms) * 2 // 256
    assert plan["stages"][0]["weights"] - 4 * plan["stages"][0]["parameters_per_rank"] == held
    assert plan["start"] == "runs/llama3.1-minitron-4b-width/pruned, which is not there yet"
    assert list(tmp_path.iterdir()) == []


def test_alignment_is_planned_at_its_published_layout_with_its_reward_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = recipe("llama-nemotron-ultra-reasoning-rl")
    plan = planned(found, capsys)
    check_plan(found, plan)
    assert len(plan["stages"]) == 18 and plan["layout"].count("cp 2 x tp 8") == 1
    kind = found.config.objective
    prompts = kind.steps_per_generation * found.config.train.global_batch / kind.num_generations
    assert (prompts, kind.num_generations, kind.updates) == (72, 16, 2), "as published"


@pytest.mark.slow
@pytest.mark.parametrize("found", ALL)
def test_it_is_planned_at_its_real_size_without_weights_and_data(
    found: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    check_plan(found, planned(found, capsys))


def test_a_file_goes_before_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minitron-4b").mkdir()  # such as an export: no configuration
    assert find("minitron-4b") == recipe("minitron-4b").path
    text = recipe("minitron-8b").text.replace("seed: 0", "seed: 7")
    (tmp_path / "minitron-8b").write_text(text)
    app(["train", "minitron-8b", "--print-config"], standalone_mode=False)
    assert "seed: 7" in capsys.readouterr().out
    app(["train", "minitron-4b", "--print-config", "train.seed=8"], standalone_mode=False)
    assert "seed: 8" in capsys.readouterr().out
    assert sizes("minitron-4b").num_attention_heads == 24
    with pytest.raises(BevatronError, match=r"nearest are minitron-8b"):
        find("minitron-8")
    with pytest.raises(BevatronError, match=r"minitron-9\.yaml: cannot be read"):
        app(["train", "minitron-9.yaml"], standalone_mode=False)
    with pytest.raises(BevatronError, match=r"8b-pretrain: has no prune part.*minitron-4b"):
        sizes("llama3-8b-pretrain")


def test_the_verb_lists_them_and_prints_one_as_a_configuration_with_its_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["recipes"], standalone_mode=False)
    text = capsys.readouterr().out
    for name, (parameters, _) in PUBLISHED.items():
        assert re.search(rf"^{re.escape(name)}\n.*\n.*{parameters:,} parameters", text, re.M), name
    app(["recipes", "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)
    assert rows == [found.to_dict() for found in recipes()]
    app(["recipes", "llama3.1-minitron-4b-width"], standalone_mode=False)
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "mine.yaml", []) == recipe("llama3.1-minitron-4b-width").config
    app(["recipes", "llama3.1-minitron-4b-width", "--json"], standalone_mode=False)
    commands = json.loads(capsys.readouterr().out)["commands"]
    verbs = ["tokenize", "train", "prune", "train", "export"]
    assert [command.split()[1] for command in commands] == verbs


def test_all_that_a_user_has_to_bring_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["train", "minitron-8b"], ["launch", "slurm", "minitron-8b", "--nodes", "16"]):
        with pytest.raises(BevatronError) as refused:
            app(command, standalone_mode=False)
        assert [line.strip() for line in str(refused.value).splitlines()] == [
            "minitron-8b: what it starts from is not there yet:",
            "model.init: runs/minitron-8b/pruned",
            "objective.teacher: path/to/nemotron-4-15b",
            "data.train.0.path: tokens",
            "`bevatron recipes minitron-8b` shows the commands that make them; a path of your own "
            "is given as key=path",
        ]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_steps_of_its_own_needs_its_start_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe("minitron-8b").config
    step = tmp_path / config.run.dir / "step-00000003"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    with pytest.raises(BevatronError) as refused:
        check_present(config)
    assert "model.init" not in str(refused.value) and "objective.teacher" in str(refused.value)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "path/to/nemotron-4-15b").mkdir(parents=True)
    check_present(config)


def test_weights_of_other_sizes_than_like_says_are_refused(tmp_path: Path) -> None:
    """In a run as in a dry run, and of the teacher as of the student."""
    make(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    (tmp_path / "deeper.json").write_text(
        to_json(replace(SPEC, vocab_size=101, layers=SPEC.layers * 4))
    )
    write_store(tmp_path / "tokens", [[1] * 200], 101)
    (tmp_path / "run.yaml").write_text(
        f"model: {{init: {tmp_path}/hf}}\nobjective: {{name: distill, teacher: {tmp_path}/hf}}\n"
        f"data: {{train: [{{path: {tmp_path}/tokens}}], seq_len: 16}}\n"
        "train: {steps: 1, global_batch: 1, precision: fp32}\noptimizer: {lr: 1.0e-4}\n"
        f"run: {{dir: {tmp_path}/run}}\n"
    )
    prepared(tmp_path / "run.yaml", [], 1)
    for key, like in (
        ("model.init", "model.like"),
        ("objective.teacher", "objective.teacher_like"),
    ):
        said = (
            rf"^{key}: {tmp_path}/hf is not of the sizes of llama3\.1-8b, which {like} names: its "
        )
        said += rf"embed\.weight is \[101, 32\], expected \[128256, 4096\].*{like}=null"
        for start in (False, True):
            with pytest.raises(BevatronError, match=said):
                train(tmp_path / "run.yaml", [f"{like}=llama3.1-8b"], dry_run=start)
    said = r"its layers\.3\.\S+ is absent, expected \["
    with pytest.raises(BevatronError, match=said):
        prepared(tmp_path / "run.yaml", [f"model.like={tmp_path}/deeper.json"], 1)
    with pytest.raises(BevatronError, match="init is not given"):
        overrides = ["model.init=null", "model.spec=llama3-8b", "model.like=llama3-8b"]
        prepared(tmp_path / "run.yaml", overrides, 1)


def test_pruning_is_planned_from_a_config_alone(tmp_path: Path) -> None:
    make(tmp_path / "hf")
    sized = Targets(16, 24, drop_layers=(1,))
    whole = prune(tmp_path / "hf", tmp_path / "x", sized, dry_run=True)
    (tmp_path / "hf/model.safetensors").unlink()
    alone = prune(tmp_path / "hf", tmp_path / "x", sized, dry_run=True)
    note = f"{tmp_path}/hf has no weights on this disk; planned from its sizes"
    assert alone == replace(whole, notes=[*whole.notes, note])
    with pytest.raises(BevatronError, match="weights"):
        prune(tmp_path / "hf", tmp_path / "x", sized)
    with pytest.raises(BevatronError, match="--data or --scores"):
        prune("llama3.1-8b", tmp_path / "x", Targets(num_layers=16), dry_run=True)
