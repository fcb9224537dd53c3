"""A run changes context and rope on purpose, or says that its samples are beyond the context."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec, Rope
from bevatron.spec.json import from_json
from bevatron.train.model_override import OverrideConfig, overridden
from tests.commands import bevatron
from tests.data.test_store import write_store
from tests.generate.engine_models import VOCAB, make
from tests.specs import HOMOGENEOUS

YARN = "{max_position_embeddings: 512, rope: {kind: yarn, factor: 4}}"
CONFIG = """\
model: {init: hf}
data: {train: [{path: tokens}], seq_len: 256, allow_other_tokenizer: true}
train: {steps: 1, global_batch: 1, precision: fp32}
optimizer: {lr: 1.0e-3}
schedule: {name: constant}
run: {dir: run}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder of a context of 128, tokens and a configuration with samples of 256."""
    folder = tmp_path_factory.mktemp("override")
    make(folder / "hf", "llama")
    source = random.Random(0)
    ids = [[source.randrange(VOCAB) for _ in range(300)] for _ in range(9)]
    write_store(folder / "tokens", ids, VOCAB)
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def test_samples_beyond_the_context_are_said_once(work: Path) -> None:
    said = "data.seq_len 256 is beyond the context of the model, 128 tokens"
    status, output = bevatron(work, "train", "run.yaml", "run.dir=plain")
    assert (status, output.count(said)) == (0, 1), output
    status, output = bevatron(work, "train", "run.yaml", "run.dir=dry", "--dry-run")
    assert (status, output.count(said)) == (0, 1), output
    status, output = bevatron(work, "train", "run.yaml", "run.dir=plain", "data.seq_len=128")
    assert status == 2 and said not in output, output


def test_a_stretched_model_exports_what_it_was_trained_as(work: Path) -> None:
    """In both spellings of rope, and with transformers' logits; a restart goes on with it."""
    options = ["train", "run.yaml", f"model.override={YARN}"]
    status, output = bevatron(work, *options, "checkpoint.export=out")
    assert status == 0 and "beyond" not in output, output
    config = json.loads((work / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    for spelled in ("rope_scaling", "rope_parameters"):
        rope = config[spelled]
        assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
        assert rope["original_max_position_embeddings"] == 128
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    status, output = bevatron(work, "verify", "run", "out", "--logits")
    assert status == 0 and "they agree" in output, output
    spec = from_json((work / "run/step-00000001/spec.json").read_text())
    assert (spec.max_position_embeddings, spec.rope.kind) == (512, "yarn")

    for steps, again in ((2, options), (3, options[:2])):  # said again or not: it is the run's own
        status, output = bevatron(work, *again, f"train.steps={steps}")
        assert status == 0 and "beyond" not in output, output
        saved = work / f"run/step-{steps:08}"
        assert from_json((saved / "spec.json").read_text()) == spec
        assert "factor: 4" in (saved / "config.yaml").read_text()
    other = "model.override.max_position_embeddings=600"
    status, output = bevatron(work, "train", "run.yaml", other, "train.steps=4")
    assert status == 2 and "other values of model.override.max_position_embeddings" in output
    allowed = "--allow-changed=model.override"
    status, output = bevatron(work, "train", "run.yaml", other, "train.steps=4", allowed)
    assert status == 0 and "512 -> 600: the model's rope or context is another" in output, output
    changed = from_json((work / "run/step-00000004/spec.json").read_text())
    assert changed == replace(spec, max_position_embeddings=600)


def test_a_prompt_or_an_answer_beyond_the_context_is_said(work: Path) -> None:
    for prompt, new, said in (
        ("ab " * 100, 1, "the prompt has 300 tokens, the model's context is 128"),
        ("abc" * 42, 4, "prompt and answer have 130 tokens, the model's context is 128"),
        ("ab", 4, ""),
    ):
        options = ["generate", "hf", "--prompt", prompt, "--max-new-tokens", str(new)]
        status, output = bevatron(work, *options, "--temperature", "0")
        assert status == 0
        assert said in output and output.count("warning") == bool(said), output


SPEC = replace(HOMOGENEOUS, max_position_embeddings=128, rope=Rope())


def change(spec: ModelSpec = SPEC, **values: Any) -> ModelSpec:
    return overridden(spec, OverrideConfig.model_validate(values), "llama")


def test_what_is_not_named_stays() -> None:
    llama3 = Rope(5e5, "llama3", 1.0, False, 8.0, 1.0, 4.0, 128)
    spec = replace(SPEC, rope=llama3)
    assert change(spec, max_position_embeddings=999) == replace(spec, max_position_embeddings=999)
    assert change(spec, rope={"theta": 1e6}).rope == replace(llama3, theta=1e6)
    assert change(spec, rope={"factor": 16.0}).rope == replace(llama3, factor=16.0)
    assert change(spec, rope={"kind": "default"}).rope == Rope(5e5)
    yarn = change(spec, max_position_embeddings=512, rope={"kind": "yarn"}).rope
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow) == (4.0, 32.0, 1.0)
    assert yarn.original_max_position_embeddings == 128
    wider = change(replace(spec, rope=yarn), rope={"factor": 8.0}).rope
    assert yarn.attention_factor == pytest.approx(1.13863, abs=1e-5)
    assert wider.attention_factor == pytest.approx(1.20794, abs=1e-5)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"factor": 4.0},
            r"rope\.factor means nothing to kind default, which has theta, kind; drop",
        ),
        ({"kind": "llama3", "factor": 4.0}, r"model\.override: rope\.low_freq_factor is missing"),
        ({"kind": "dynamic", "factor": 2.0}, r"give rope\.original_max_position_embeddings 512 as"),
    ],
)
def test_a_rope_that_cannot_be_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(BevatronError, match=message):
        change(max_position_embeddings=512, rope=rope)


def test_a_misspelled_key_is_named_with_the_nearest(work: Path) -> None:
    wrong = "model.override={max_position_embedding: 600}"
    status, output = bevatron(work, "train", "run.yaml", wrong)
    assert status == 2
    assert "did you mean model.override.max_position_embeddings?" in output
