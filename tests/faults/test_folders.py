"""Folders whose files disagree, lead elsewhere, are unsafe or describe another model."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.parallel.stage_split import Load, split
from tests.bridge.hf_folders import assert_same_folder, edit_config, rewrite
from tests.faults.refusal import (
    EMBED,
    INDEX,
    NORM,
    WEIGHTS,
    change_index,
    command,
    file_of,
    refused,
)


def neighbour(source: Path) -> Path:
    """A weight file that does not hold the norm."""
    files = json.loads((source / INDEX).read_text())["weight_map"].values()
    return source / next(f for f in files if source / f != file_of(source, NORM))


def test_fault_11_tensor_in_two_shards(model) -> None:
    source = model("many")
    other = neighbour(source)
    tensors = load_file(other)
    tensors[NORM] = load_file(file_of(source, NORM))[NORM]
    save_file(tensors, other)
    refused(source, NORM, "both", other.name)


def test_fault_12_tensor_in_the_index_but_not_in_the_shard(model) -> None:
    source = model("many")
    file, other = file_of(source, NORM).name, neighbour(source).name
    change_index(source, lambda m: m.update({NORM: other}))
    refused(source, NORM, other, "does not")
    change_index(source, lambda m: m.update({NORM: file, "x.weight": file}))
    refused(source, "x.weight", file)


def test_fault_13_tensor_in_the_shard_but_not_in_the_index(model) -> None:
    source = model("many")
    change_index(source, lambda m: m.pop(NORM))
    refused(source, NORM, "does not list")


def test_fault_14_missing_shard(model) -> None:
    source = model("many")
    other = neighbour(source)
    other.unlink()
    refused(source, other.name, "missing")
    other.mkdir()
    refused(source, other.name, "missing")


ELSEWHERE = [
    "../hf2/model.safetensors",
    "..",
    ".",
    "",
    "/etc/passwd",
    "/dev/zero",
    "a/b.safetensors",
    "./model.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "C:\\x.safetensors",
    "\\\\host\\share\\x.safetensors",
    "x.safetensors\0.txt",
    "file:///etc/passwd",
    "x" * 10**6 + ".safetensors",
    "x\n.safetensors",
    "\ud800.safetensors",
    5,
    None,
    ["model.safetensors"],
]


@pytest.mark.parametrize("file", ELSEWHERE, ids=lambda f: f"fault-15-{f!r:.30}")
def test_index_that_leads_elsewhere(model, file: object) -> None:
    source = model("many")
    change_index(source, lambda m: m.update({NORM: file}))
    refused(source, "plain name", NORM)


@pytest.mark.parametrize("name", ["one", "many"])
@pytest.mark.parametrize("through", ["file", "folder"])
def test_fault_15_links_out_of_the_folder(model, name: str, through: str, tmp_path: Path) -> None:
    source = model(name)
    (tmp_path / "secret").mkdir()
    for path in (source / "config.json", source / "tokenizer.json", file_of(source, NORM)):
        secret = tmp_path / "secret" / path.name
        shutil.move(path, secret)
        if through == "folder":
            (source / "way").symlink_to(secret.parent)
            path.symlink_to(source / "way" / path.name)
        else:
            path.symlink_to(secret)
        refused(source, path.name, "symbolic link")
        path.unlink()
        (source / "way").unlink(missing_ok=True)
        shutil.move(secret, path)
    import_checkpoint(source, source.parent / "target")


def test_fault_15_a_hub_cache_is_read_through_its_links(models, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / ("ab" * 20)
    shutil.copytree(models / "one", snapshot)
    (cache / "blobs").mkdir()
    for number, path in enumerate(p for p in sorted(snapshot.rglob("*")) if p.is_file()):
        blob = cache / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    import_checkpoint(snapshot, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(models / "one", tmp_path / "out")
    assert "ab" * 20 in (tmp_path / "native" / "provenance.json").read_text()


def test_fault_17_weights_as_pickles_only(model) -> None:
    source = model()
    (source / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1)}, source / "pytorch_model.bin")
    refused(source, "pytorch_model.bin", "safetensors")
    (source / "pytorch_model.bin").unlink()
    refused(source, "no weights")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_fault_18_malicious_pickle_is_never_opened(model, tmp_path: Path) -> None:
    source, flag = model(), tmp_path / "executed"
    data = pickle.dumps(Touch(flag))
    pickle.loads(data)
    assert flag.exists(), "the pickle is not malicious, so this test shows nothing"
    flag.unlink()
    kept = (source / WEIGHTS).read_bytes()
    for name in (WEIGHTS, "pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (source / name).write_bytes(data)
    refused(source, "pickle")
    (source / WEIGHTS).write_bytes(kept)
    report = import_checkpoint(source, source.parent / "target")
    assert sorted(report.skipped) == ["optimizer.pt", "pytorch_model.bin", "training_args.bin"]
    assert not flag.exists()


def test_fault_19_remote_code_is_carried_and_never_run(model, tmp_path: Path) -> None:
    source, flag = model(), tmp_path / "executed"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py", "__init__.py"):
        (source / name).write_text(f"open({str(flag)!r}, 'w')\n")
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    edit_config(source, auto_map=auto_map)
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")
    assert not flag.exists()


def test_fault_22_unknown_architecture(model) -> None:
    source = model()
    edit_config(source, architectures=["GPT9ForCausalLM"])
    refused(source, "GPT9ForCausalLM", "LlamaForCausalLM")
    edit_config(source, architectures=["LlamaForCausalLM"], model_type="mistral")
    refused(source, "mistral", "disagree")
    edit_config(source, architectures=None, model_type=None)
    refused(source, "architecture")


CHANGES = [
    {"vocab_size": 100},
    {"intermediate_size": 64},
    {"num_key_value_heads": 4},
    {"num_attention_heads": 8},
    {"num_hidden_layers": 2},
    {"num_hidden_layers": 4},
    {"hidden_size": 64},
    {"head_dim": 16},
    {"attention_bias": True},
    {"mlp_bias": True},
]


@pytest.mark.parametrize(
    "change", CHANGES, ids=lambda c: "fault-23-" + "-".join(f"{k}={v}" for k, v in c.items())
)
def test_config_that_disagrees_with_the_weights(model, change: dict[str, object]) -> None:
    source = model()
    edit_config(source, **change)
    refused(source, "config.json")


def test_fault_23_tensor_missing_or_of_another_shape(model) -> None:
    source = model()
    kept = (source / WEIGHTS).read_bytes()
    rewrite(source, lambda t: t.pop(NORM))
    refused(source, NORM, "missing")
    (source / WEIGHTS).write_bytes(kept)
    rewrite(source, lambda t: t.update({NORM: torch.ones(33)}))
    refused(source, NORM, "[33]", "[32]")


def test_fault_24_tied_but_the_head_differs(model) -> None:
    source = model("tied")
    rewrite(source, lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    refused(source, "lm_head.weight", "tie_word_embeddings")
    rewrite(source, lambda t: t.update({"lm_head.weight": t[EMBED].float()}))
    refused(source, "lm_head.weight", "F32")
    rewrite(source, lambda t: t.update({"lm_head.weight": t[EMBED][:-1].clone()}))
    refused(source, "lm_head.weight", "[100, 32]")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{}", "--prompt", "a"),
        ("eval", "{}", "--data", "{}/tokenizer.json"),
        ("chat", "{}"),
        ("serve", "{}", "--port", "0"),
        ("import", "{}", "{}-native", "--dry-run"),
        ("prune", "{}", "{}-native", "--drop-layers", "1", "--dry-run"),
        ("train", "{}/config.yaml", "--dry-run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_fault_24_no_verb_opens_a_tied_model_whose_head_differs(
    model, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """transformers computes with the stored head, a tied model with the embedding."""
    source = model("tied")
    rewrite(source, lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    (source / "config.yaml").write_text(
        f"model: {{init: {source}}}\nrun: {{dir: {tmp_path}/run}}\noptimizer: {{lr: 1.0e-3}}\n"
        f"data: {{train: [{{path: {source}, weight: 1.0}}], seq_len: 8}}\n"
        "train: {steps: 1, global_batch: 1}\n"
    )
    status, _, stderr = command(*(a.format(source) for a in arguments))
    assert status == 2
    assert "tie_word_embeddings" in stderr and stderr.count("\n") == 1, stderr


def test_fault_24_untied_but_there_is_no_head(model) -> None:
    source = model()
    rewrite(source, lambda t: t.pop("lm_head.weight"))
    refused(source, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize(
    "name", ["model.layers.0.extra.weight", "model.layers.3.mlp.up_proj.weight"]
)
def test_fault_25_unknown_extra_tensors(model, name: str) -> None:
    source = model()
    rewrite(source, lambda t: t.update({name: torch.ones(2)}))
    refused(source, name, "no parameter")


def test_fault_26_unknown_rope_type(model) -> None:
    source = model()
    edit_config(source, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    refused(source, "spiral")
    edit_config(source, rope_parameters=None, rope_scaling={"type": "spiral", "factor": 2.0})
    refused(source, "spiral")


@pytest.mark.parametrize(("layers", "stages"), [(126, 16), (30, 4), (3, 8)])
def test_fault_29_every_layer_is_in_exactly_one_stage(layers: int, stages: int) -> None:
    one, half = Load(1.0, 1.0, 1.0), Load(0.5, 0.5, 0.5)
    ranges = split([one] * layers, stages, first=half, last=one)
    assert len(ranges) == stages
    assert [i for r in ranges for i in r] == list(range(layers))


WRAPPED = {
    "DistributedDataParallel": (lambda name: f"module.{name}", "save model.module"),
    "DeepSpeed and compile": (lambda name: f"_orig_mod.module.{name}", "save model._orig_mod"),
    "compiled layers": (
        lambda name: re.sub(r"layers\.(\d)", r"layers.\1._orig_mod", name),
        "have _orig_mod. in",
    ),
    "peft": (lambda name: f"base_model.model.{name}", "merge_and_unload"),
    "a part": (lambda name: f"language_model.{name}", "language_model. in front"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_a_wrapped_model_are_told_from_those_of_another_one(model, wrapper: str) -> None:
    source = model()
    renamed, words = WRAPPED[wrapper]
    rewrite(source, lambda t: t.update({renamed(name): t.pop(name) for name in list(t)}))
    refused(source, words)


FORMATS = {
    "nanochat": (
        ("model_000650.pt", "meta_000650.json", "optim_000650_rank0.pt"),
        "convert_nanochat",
    ),
    "Meta": (("consolidated.00.pth", "params.json"), "Hugging Face files"),
    "torch.distributed.checkpoint": (("__0_0.distcp", ".metadata"), "program that wrote it"),
    "Megatron": (("latest_checkpointed_iteration.txt",), "Megatron-Bridge"),
    "GGUF": (("a.gguf",), "safetensors"),
    "peft": (("adapter_config.json", "adapter_model.safetensors"), "adapter.init: this folder"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_of_another_format_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    files, advice = FORMATS[kind]
    (tmp_path / "work" / "x").mkdir(parents=True)
    for name in files:
        (tmp_path / "work" / "x" / name).write_bytes(b"\x80\x02}q\x00.")
    refused(tmp_path / "work" / "x", kind, advice, files[0])
    status, _, stderr = command("inspect", tmp_path / "work" / "x")
    assert status == 2
    assert kind in stderr and advice in stderr


@pytest.mark.parametrize("older", ["tokenizer.model", "vocab.json", None])
def test_text_without_a_tokenizer_says_how_to_get_one(model, older: str | None) -> None:
    source = model()
    (source / "tokenizer.json").unlink()
    if older is not None:
        (source / older).write_text("{}")
    status, _, stderr = command("generate", source, "--prompt", "a")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "has no tokenizer.json" in stderr
    assert (f"only {older}" in stderr and "AutoTokenizer" in stderr) or older is None


def test_fault_31_parts_of_differing_dtypes_become_one_if_one_is_asked_for(
    model, tmp_path: Path
) -> None:
    source = model()
    q, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
    rewrite(source, lambda t: t.update({q: t[q].float() + 1e-4, up: t[up].half()}))
    want = load_file(source / WEIGHTS)
    status, out, _ = command("import", source, tmp_path / "x", "--dtype", "fp32", "--dry-run")
    assert status == 0
    assert "F32 and BF16" in out
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        import_checkpoint(source, tmp_path / name, dtype=name)
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-out")
        found = load_file(tmp_path / f"{name}-out" / WEIGHTS)
        assert all(torch.equal(found[n], t.to(dtype)) for n, t in want.items())


def test_fault_31_mixed_and_quantised_dtypes(model) -> None:
    source = model()
    q = "model.layers.0.self_attn.q_proj.weight"
    rewrite(source, lambda t: t.update({q: t[q].float()}))
    refused(source, q, "different dtypes", "--dtype")
    rewrite(source, lambda t: t.update({q: t[q].to(torch.float8_e4m3fn)}))
    refused(source, q, "F8_E4M3", "quantised")
    rewrite(source, lambda t: t.update({q: t[q].to(torch.int8)}))
    refused(source, q, "I8", "quantised")
    rewrite(source, lambda t: t.update({q: t[q].to(torch.bfloat16)}))
    refused(source, "'int3'", dtype="int3")
    edit_config(source, quantization_config={"quant_method": "gptq"})
    refused(source, "quantization_config")


JSON = {
    "duplicate-keys": (b'{"a": 1, "a": 2}', "twice"),
    "nan": (b'{"a": NaN}', "NaN"),
    "minus-infinity": (b'{"a": [-Infinity]}', "Infinity"),
    "bom": (b"\xef\xbb\xbf{}", "byte order"),
    "nested": (b'{"a":' * 10**6, "nested"),
    "not-utf-8": (b'{"\xff": 1}', "UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "list": (b"[]", "object"),
    "cut": (b'{"a": ', "line 1"),
    "empty": (b"", "JSON"),
    "huge-number": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("fault", JSON, ids=lambda f: f"fault-39-{f}")
def test_json_that_readers_would_disagree_about(model, fault: str, file: str) -> None:
    source = model("many")
    data, word = JSON[fault]
    (source / file).write_bytes(data)
    refused(source, word, file)


@pytest.mark.parametrize("raw", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}])
def test_fault_39_index_without_a_weight_map(model, raw: dict) -> None:
    source = model("many")
    (source / INDEX).write_text(json.dumps(raw))
    refused(source, INDEX, "weight_map")


def test_fault_40_file_names_that_are_not_utf_8(model, tmp_path: Path) -> None:
    """They are legal in a folder: they come back, and can be printed."""
    source = model()
    odd = os.fsdecode(b"\xff\n.txt")
    (source / odd).write_text("x")
    (source / os.fsdecode(b"\xfe.bin")).write_bytes(b"x")
    status, out, err = command("import", source, tmp_path / "native")
    assert (status, err) == (0, "")
    assert "\\udcfe.bin" in out
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    (source / os.fsdecode(b"\xfe.bin")).unlink()
    assert_same_folder(source, tmp_path / "out")
