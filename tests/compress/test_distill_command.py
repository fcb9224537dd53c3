"""`bevatron train` with a teacher as a user runs it: metrics, resuming, refusals."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from bevatron.errors import BevatronError
from bevatron.spec.json import to_json
from bevatron.train.config_file import load_config
from bevatron.train.launch import prepared
from tests.commands import ran
from tests.compress.test_distill import STUDENT
from tests.data.test_store import write_store
from tests.train.small_run import lines

CONFIG = """\
model: {{spec: {folder}/spec.json}}
objective: {{name: distill, teacher: {folder}/teacher, temperature: 2.0, ce: 0.25}}
data: {{train: [{{path: {folder}/tokens}}], validation: [{{path: {folder}/tokens}}], seq_len: 16}}
train: {{steps: 4, global_batch: 8, micro_batch: 2, precision: fp32, val_every: 2,
        val_batches: 1}}
optimizer: {{lr: 1.0e-3}}
schedule: {{name: constant}}
checkpoint: {{every: 2, keep: 9}}
run: {{dir: {folder}/run}}
"""


def teacher(path: Path, seed: int = 0, maker: str = "LlamaForCausalLM", **changes: int) -> None:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    config = transformers.LlamaConfig(**sizes, pad_token_id=0)
    getattr(transformers, maker)(config).save_pretrained(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    (folder / "spec.json").write_text(to_json(STUDENT))
    source = random.Random(0)
    documents = [[source.randrange(101) for _ in range(40)] for _ in range(100)]
    write_store(folder / "tokens", documents, 101)
    teacher(folder / "teacher")
    teacher(folder / "other", seed=1)
    teacher(folder / "larger", vocab_size=128)
    teacher(folder / "scorer", maker="LlamaForSequenceClassification")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ran(folder, "train", str(folder / "run.yaml"), *arguments)


@pytest.mark.slow
def test_a_run_reports_its_parts_and_resumes_with_the_same_teacher_alone(work: Path) -> None:
    done = train(work, "train.steps=2")
    assert done.returncode == 0, done.stderr
    kept = (work / "teacher").rename(work / "kept")
    (work / "other").rename(work / "teacher")
    refused = train(work)
    assert refused.returncode == 2 and "objective.teacher: is another model" in refused.stderr
    assert "Traceback" not in refused.stderr
    (work / "teacher").rename(work / "other")
    kept.rename(work / "teacher")
    done = train(work)
    assert done.returncode == 0, done.stderr

    found = lines(work / "run")
    assert [x["step"] for x in found if "lr" in x] == [1, 2, 3, 4]
    for line in found:
        prefix = "val_" if "val_loss" in line else ""
        loss, kl, ce = (line[prefix + name] for name in ("loss", "kl", "ce"))
        assert loss == pytest.approx(4 * kl + 0.25 * ce, rel=1e-6) and 0 < kl < ce
    state = json.loads((work / "run/step-00000004/train_state.json").read_text())
    assert len(state["companions"]["teacher"]) == 64
    names = json.loads((work / "run/step-00000004/manifest.json").read_text())["tensors"]
    assert not any("teacher" in name for name in names)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.teacher=/nowhere/at/all", "objective.teacher: "),
        ("objective.teacher={folder}/larger", "a vocabulary of 128 tokens, the student one of 101"),
        ("objective.teacher={folder}/scorer", "a teacher needs a causal_lm head"),
        ("objective.top_k=101", "expected less than the vocabulary's 101 tokens"),
        ("objective.teacher=null", "distill needs a teacher"),
        ("objective.temperature=0", "objective.temperature"),
        ("objective.z_loss=0.1", "z_loss means nothing to distill"),
        ("objective={{name: pretrain, ce: 0.5}}", "ce means nothing to pretrain, only to distill"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_it_starts(
    work: Path, override: str, said: str
) -> None:
    with pytest.raises(BevatronError) as refused:
        prepared(work / "run.yaml", [override.format(folder=work)], 1)
    assert said in str(refused.value)


def test_a_teacher_that_the_layout_cannot_cut_is_named(work: Path) -> None:
    """The student has 4 heads, this teacher 2."""
    teacher(work / "narrow", num_attention_heads=2, num_key_value_heads=1)
    overrides = [f"objective.teacher={work}/narrow", "parallel.tp=4"]
    with pytest.raises(BevatronError, match=r"^objective\.teacher: .*2 query heads"):
        prepared(work / "run.yaml", overrides, 4)


def test_the_configuration_prints_and_reads_back(work: Path) -> None:
    objective = load_config(work / "run.yaml", []).objective
    assert (objective.divergence, objective.temperature, objective.ce) == ("forward_kl", 2.0, 0.25)
