"""A run configuration is checked in full, and says in one message what is wrong and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bevatron.cli.main import app
from bevatron.errors import BevatronError
from bevatron.train.config import OptimizerConfig, RunConfig, TrainConfig
from bevatron.train.config_file import load_config, to_yaml
from bevatron.train.config_reference import every_key, markdown

SMALL = """\
model: {spec: tiny}
data: {train: [{path: tokens}], seq_len: 16}
train: {steps: 5, global_batch: 8}
optimizer: {name: adamw, lr: 1e-4}
run: {dir: runs/a}
"""


def load(folder: Path, text: str = SMALL, *overrides: str) -> RunConfig:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def refusal(folder: Path, text: str = SMALL, *overrides: str) -> str:
    with pytest.raises(BevatronError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


def test_the_example_of_the_interface_loads(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """\
model: {init: path-or-hub-id}
tokenizer: path-or-hub-id
objective: {name: pretrain}
data: {train: [{path: tokens/, weight: 1.0}], validation: [{path: held-out/}], seq_len: 4096}
parallel: {tp: 2, pp: 2, dp_shard: 2, dp_replicate: 1, cp: 1, sequence_parallel: true, schedule: 1f1b}
train: {steps: 1000, global_batch: 64, micro_batch: 2, precision: bf16, recompute: none, compile: false, seed: 0}
optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1, clip_grad: 1.0}
schedule: {name: cosine, warmup_steps: 100, min_lr: 3.0e-5}
checkpoint: {every: 500, keep: 3, async: true}
run: {dir: runs/llama3-8b}
""",  # noqa: E501
    )
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.checkpoint.async_
    assert config.parallel.schedule == "1f1b"


def test_sections_are_built_by_keyword_too() -> None:
    assert OptimizerConfig(lr=1e-2, clip_grad=1.0).name == "adamw"
    assert TrainConfig(steps=1, global_batch=8).micro_batch == 1


@pytest.mark.parametrize("spelling", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4", "10e-5"])
def test_every_spelling_of_a_number_is_a_number(tmp_path: Path, spelling: str) -> None:
    assert load(tmp_path, SMALL, f"optimizer.lr={spelling}").optimizer.lr == pytest.approx(1e-4)
    assert load(tmp_path, SMALL.replace("1e-4", spelling)).optimizer.lr == pytest.approx(1e-4)


def test_overrides_reach_sections_lists_and_absent_sections(tmp_path: Path) -> None:
    overrides = [
        "train.steps=7",
        "parallel.tp=2",
        "data.train.0.weight=2.5",
        "parallel.split=[1, 3]",
    ]
    config = load(tmp_path, SMALL, *overrides)
    assert (config.train.steps, config.parallel.tp, config.parallel.split) == (7, 2, [1, 3])
    assert config.data.train[0].weight == 2.5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=3", "train.stepz: unknown key; did you mean train.steps?"),
        ("optimiser.lr=3", "optimiser: unknown key; did you mean optimizer?"),
        (
            "data.train.0.wieght=3",
            "data.train.0.wieght: unknown key; did you mean data.train.0.weight?",
        ),
        ("train.optimizer=adamw", "did you mean optimizer, which is a key of its own?"),
        (
            "objective={name: grpo, rewards: [{name: length, target: 4, longest: 8}]}",
            "objective.rewards.0.longest: not a key of the kind that objective.rewards.0 names",
        ),
        ("checkpoint.asinc=true", "did you mean checkpoint.async?"),
        ("parallel.tp='2'", "parallel.tp: "),
        ("train.compile=1", "train.compile: "),
        ("train.steps=1.5", "train.steps: "),
        ("optimizer.lr=.inf", "optimizer.lr: "),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: "),
        ("model.init=x", "model: give exactly one of init"),
        ("model={init: a, depth_scaled: true}", "depth_scaled are for random weights"),
        ("optimizer.lr_scale={embeding: 2.0}", "optimizer.lr_scale.embeding"),
        ("optimizer.no_decay=[norms]", "optimizer.no_decay.0: "),
        ("optimizer.muon.momentun=0.9", "did you mean optimizer.muon.momentum?"),
        ("schedule.min_lr=1.0", "schedule.min_lr 1 is above optimizer.lr 0.0001"),
        ("data.train=[]", "data.train: "),
        ("data.train.4.weight=1", "4 is not one of 1 items"),
        ("train.steps.x=1", "train.steps is a value, not a section"),
        ("steps", "expected section.key=value"),
        ("run.dir=[", "not valid YAML"),
        ("train.precision=fp8", "train.precision: "),
        ("train.val_every=2", "data.validation is empty"),
    ],
)
def test_a_bad_value_is_named_by_its_dotted_path(tmp_path: Path, override: str, says: str) -> None:
    message = refusal(tmp_path, SMALL, override)
    assert says in message
    assert message.startswith(str(tmp_path / "config.yaml"))


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    text = SMALL.replace("steps: 5", "stepz: 5").replace("1e-4", "fast")
    message = refusal(tmp_path, text, "nonsense", "run.dirr=x")
    for part in ("train.steps: missing", "train.stepz", "optimizer.lr", "nonsense", "run.dirr"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SMALL + "run: {dir: b}\n", "line 6: the key 'run' appears twice"),
        ("- a\n", "expected sections"),
        ("", "expected sections"),
        ("model: {", "not valid YAML"),
        ("? [a]\n: 1\n", "not text"),
        ("1: 2\n", "1: unknown key"),
        ("model: !!python/object:os.system {}\n", "not valid YAML"),
        ("model: &a {init: *a}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BevatronError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml", [])


def test_the_resolved_text_loads_equal_and_names_every_default(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL, "optimizer.eps=1e-12", "checkpoint.async=true")
    text = to_yaml(config)
    assert load(tmp_path, text) == config
    assert to_yaml(load(tmp_path, text)) == text
    assert yaml.safe_load(text)["schedule"]["name"] == "cosine"


def test_the_reference_in_the_docs_is_that_of_the_code() -> None:
    written = (Path(__file__).parents[2] / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == markdown(), "run `make docs`"


def test_every_key_has_a_meaning_and_a_required_one_an_example() -> None:
    for key in every_key():
        assert key.meaning, f"{key.path}: say what it means in a text below it"
        inside_of_absent = key.path.startswith(("recipe.", "data.stages.", "data.validation."))
        if key.default is None and not inside_of_absent and ".N." not in key.path:
            assert key.example is not None, f"{key.path}: give it examples=[...]"


def test_the_printed_default_configuration_holds_every_key_with_its_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["train", "--print-config"], standalone_mode=False)
    text = capsys.readouterr().out
    config = load(tmp_path, text)
    given = {"model": {"init": config.model.init}, "run": {"dir": config.run.dir}}
    given["data"] = {"train": [{"path": config.data.train[0].path}]}
    given["data"]["seq_len"] = config.data.seq_len  # type: ignore[assignment]
    given["train"] = {k: getattr(config.train, k) for k in ("steps", "global_batch")}
    given["optimizer"] = {"lr": config.optimizer.lr}
    assert config == RunConfig.model_validate(given), "all else is as if it were not written"
    for key in every_key():
        assert f"{key.name}:" in text, key.path


def test_a_printed_configuration_holds_every_key_absent_ones_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(tmp_path)
    app(["train", str(tmp_path / "config.yaml"), "--print-config"], standalone_mode=False)
    text = capsys.readouterr().out
    assert load(tmp_path, text) == config
    absent = (
        "recipe.",
        "prune.",
        "run.branch_from.",
        "model.override.",
        "model.spec.",
        "objective.states.",
        "objective.engine.",
        "objective.problems.",
        "objective.environment.",
        "adapter.",
    )  # sections that are not there
    for key in every_key():
        if ".N." not in key.path and not key.path.startswith(absent):
            *parents, name = key.path.split(".")
            at = yaml.safe_load(text)
            for parent in parents:
                at = at[parent]
            assert name in at, key.path
