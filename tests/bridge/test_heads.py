"""Every class that a folder may name converts there and back, exactly, and still runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.inspect import inspect
from bevatron.checkpoint.manifest import Chunk, TensorEntry, read_manifest
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import compare_logits, verify
from bevatron.generate.engine import generate
from bevatron.spec.json import from_json, to_json
from tests.bridge.hf_folders import SIZES, add_others, assert_same_folder

CLASSES = [
    f"{stem}{suffix}"
    for stem in ("Llama", "Nemotron", "Mistral")
    for suffix in (
        "ForCausalLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "Model",
    )
]
CLASSES += ["NanoChatForCausalLM", "NanoChatModel"]
LABELS = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "pad_token_id": 3}


def save(name: str, path: Path, **changes: object) -> Path:
    """A tiny random model of that class of transformers."""
    torch.manual_seed(0)
    stem = name.partition("For")[0].removesuffix("Model")
    also: dict[str, object] = {"sliding_window": None} if stem == "Mistral" else {}
    also |= {} if stem == "NanoChat" else {"head_dim": 8}
    also |= LABELS if "Classification" in name else {}
    config = getattr(transformers, f"{stem}Config")(**{**SIZES, **also, **changes})
    getattr(transformers, name)(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_returns_identical(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "hf")
    add_others(source)
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")
    stored = load_file(source / "model.safetensors")
    native = read_manifest(tmp_path / "native").weights()
    elements = sum(t.numel() for t in stored.values())
    assert sum(t.nbytes for t in native.values()) == 2 * elements


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_anew_runs_in_transformers(name: str, tmp_path: Path) -> None:
    """As after training: config.json made from the spec alone, other shards, another dtype."""
    source = save(name, tmp_path / "hf")
    import_checkpoint(source, tmp_path / "native")
    (tmp_path / "native" / "source" / "config.json").unlink()
    export_checkpoint(tmp_path / "native", tmp_path / "out", dtype="fp32", max_shard_size="20KB")
    found = compare_logits(tmp_path / "native", tmp_path / "out")
    assert (found["a"], found["b"]) == ("bevatron", "transformers")
    assert found["ok"]
    assert found["max_abs_difference"] <= 1e-5
    model = getattr(transformers, name).from_pretrained(tmp_path / "out")
    expected = getattr(transformers, name).from_pretrained(source, dtype=torch.float32)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    if "Classification" in name:
        assert model.config.id2label == LABELS["id2label"]
        assert model.config.label2id == {"bad": 0, "so-so": 1, "good": 2}
    assert "num_labels" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_two_checkpoints_with_other_heads_differ(tmp_path: Path) -> None:
    save("LlamaForSequenceClassification", tmp_path / "a", pad_token_id=3)
    save("LlamaForSequenceClassification", tmp_path / "b", pad_token_id=4)
    report = verify(tmp_path / "a", tmp_path / "b", logits=False)
    assert not report.ok
    assert "head" in report.differences[0]


def test_inspect_tells_the_head(tmp_path: Path) -> None:
    found = inspect(save("LlamaForTokenClassification", tmp_path / "hf"))
    assert (found["head"], found["labels"]) == ("token_classification", ["bad", "so-so", "good"])


def test_only_a_language_model_generates(tmp_path: Path) -> None:
    save("LlamaForQuestionAnswering", tmp_path / "hf")
    with pytest.raises(BevatronError, match="question_answering"):
        generate(tmp_path / "hf", "x")


def test_a_head_that_a_family_lacks_is_refused(tmp_path: Path) -> None:
    import_checkpoint(save("NanoChatModel", tmp_path / "hf"), tmp_path / "native")
    file = tmp_path / "native" / "spec.json"
    spec = from_json(file.read_text())
    head = replace(spec.head, kind="question_answering", bias=True)
    file.write_text(to_json(replace(spec, head=head)))
    manifest = read_manifest(tmp_path / "native")
    scores = {f"model/{p.name}": p.shape for p in head.parameters(spec.hidden_size)}
    added = {
        name: TensorEntry("F32", shape, (Chunk((0,) * len(shape), shape, "model/x", 0, ""),))
        for name, shape in scores.items()
    }
    changed = replace(manifest, tensors={**manifest.tensors, **added})
    (tmp_path / "native" / "manifest.json").write_text(changed.to_json())
    with pytest.raises(BevatronError, match=r"head\.kind is question_answering"):
        export_checkpoint(tmp_path / "native", tmp_path / "out")


LABEL_ERRORS = {
    "num_labels": ({"num_labels": 5, "id2label": {"0": "a"}}, "num_labels is 5"),
    "gap": ({"id2label": {"0": "a", "2": "b"}}, "id2label has the keys"),
    "none": ({"id2label": {}}, "id2label"),
    "type": ({"problem_type": "ranking"}, "problem_type"),
    "rows": ({"id2label": {"0": "a"}}, r"score\.weight.*\[3, 32\].*\[1, 32\].*id2label"),
}


@pytest.mark.parametrize("case", LABEL_ERRORS)
def test_labels_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = LABEL_ERRORS[case]
    source = save("LlamaForSequenceClassification", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(BevatronError, match=message):
        import_checkpoint(source, tmp_path / "native")
