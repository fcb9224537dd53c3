"""Bad input ends in one clear message, without a target and without anything left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevatron.bridge import mover
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.verify import verify
from bevatron.errors import BevatronError
from tests.bridge.hf_folders import assert_same_folder, edit_config, make, rewrite

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make(root / "one", dtype="bfloat16")
    make(root / "tied", dtype="bfloat16", tie_word_embeddings=True)
    make(root / "many", dtype="bfloat16", shard="10KB")
    return root


@pytest.fixture
def model(models, tmp_path):
    """A function that gives a fresh copy of a model to damage."""

    def copy(name="one"):
        return Path(shutil.copytree(models / name, tmp_path / "work" / "hf"))

    return copy


def refused(source: Path, *words: str, call=import_checkpoint, **options) -> str:
    """The message of the refusal; checks that nothing is left."""
    target = source.parent / "target"
    before = sorted(source.parent.iterdir())
    with pytest.raises(BevatronError) as caught:
        call(source, target, **options)
    assert caught.value.exit_status == 2
    assert sorted(source.parent.iterdir()) == before
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def shard(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def put(path: Path, header, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(path: Path, change) -> None:
    header, data = shard(path)
    change(header)
    put(path, header, data)


NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def overlap(header):
    first, second = sorted(
        (k for k in header if k[0] == "m"), key=lambda k: header[k]["data_offsets"]
    )[:2]
    n = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [0, n]
    assert first != second


def gap(header):
    del header[NORM]


def twice(path):
    header, data = shard(path)
    text = json.dumps(header)
    text = text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}' + "}"
    put(path, text.encode(), data)


FILES = {
    "truncated": (cut, "truncated"),
    "trailing": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "trailing"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "short": (lambda p: p.write_bytes(b"abc"), "3 bytes"),
    "header past the end": (lambda p: p.write_bytes(struct.pack("<Q", 9999) + b"{}"), "9999"),
    "header too long": (lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "more than"),
    "not json": (lambda p: put(p, b"{nonsense", b""), "JSON"),
    "not utf-8": (lambda p: put(p, b'{"\xff": 1}', b""), "UTF-8"),
    "nested": (lambda p: put(p, b'{"a":' + b"[" * 10**6, b""), "nested"),
    "overlap": (lambda p: change_header(p, overlap), "overlaps"),
    "gap": (lambda p: change_header(p, gap), "gap"),
    "wrong bytes": (lambda p: change_header(p, lambda h: h[NORM].update(shape=[31])), "takes 62"),
    "overflow": (
        lambda p: change_header(p, lambda h: h[NORM].update(shape=[1 << 40] * 2)),
        "larger",
    ),
    "negative": (lambda p: change_header(p, lambda h: h[NORM].update(shape=[-1])), "non-negative"),
    "unknown dtype": (lambda p: change_header(p, lambda h: h[NORM].update(dtype="F4")), "'F4'"),
    "duplicate name": (twice, "twice"),
    "lfs": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n"), "LFS"),
    "html": (lambda p: p.write_bytes(b"<!DOCTYPE html><html>401"), "web page"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "torch zip": (lambda p: torch.save({"a": 1}, p), "pickle"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_damaged_weight_file(model, fault):
    source = model()
    damage, word = FILES[fault]
    damage(source / WEIGHTS)
    refused(source, word, WEIGHTS)


def set_index(source: Path, change) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "../hf2/model.safetensors",
        "/etc/passwd",
        "..\\x.safetensors",
        "a/b.safetensors",
        "C:x",
        "",
        5,
    ],
)
def test_an_index_that_leads_elsewhere(model, file):
    source = model("many")
    set_index(source, lambda m: m.update({NORM: file}))
    refused(source, "plain name", NORM)


def test_an_index_and_shards_that_disagree(model):
    source = model("many")
    index = json.loads((source / INDEX).read_text())["weight_map"]
    file = index[NORM]
    other = next(f for f in index.values() if f != file)
    set_index(source, lambda m: m.update({NORM: other}))
    refused(source, NORM, other)
    set_index(source, lambda m: m.update({NORM: file, "x.weight": file}))
    refused(source, "x.weight", file)
    set_index(source, lambda m: (m.pop("x.weight"), m.pop(NORM)))
    refused(source, NORM, "does not list")
    set_index(source, lambda m: m.update({NORM: file}))
    (source / other).rename(source / "hidden")
    refused(source, other, "missing")
    (source / "hidden").rename(source / other)
    tensors = load_file(source / other)
    tensors[NORM] = load_file(source / file)[NORM]
    save_file(tensors, source / other)
    refused(source, NORM, "both")


def test_links_out_of_the_folder(model, tmp_path):
    source = model()
    secret = tmp_path / "secret"
    secret.write_text("x")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(secret)
    refused(source, "tokenizer.json", "symbolic link")
    (source / "tokenizer.json").unlink()
    shutil.move(source / WEIGHTS, tmp_path / WEIGHTS)
    (source / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    refused(source, WEIGHTS, "symbolic link")


def test_a_hub_cache_snapshot_is_read_through_its_links(models, tmp_path):
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


def test_pickles_only(model, tmp_path):
    source = model()
    (source / WEIGHTS).unlink()
    flag = tmp_path / "executed"
    (source / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(flag).encode() + b"'\ntR."
    )
    refused(source, "pytorch_model.bin", "safetensors")
    (source / "pytorch_model.bin").unlink()
    refused(source, "no weights")
    assert not flag.exists()


CONFIGS = {
    "duplicate": (b'{"a": 1, "a": 2}', "twice"),
    "nan": (b'{"a": NaN}', "NaN"),
    "bom": (b"\xef\xbb\xbf{}", "byte order"),
    "deep": (b'{"a":' * 10**6, "nested"),
    "not utf-8": (b'{"\xff": 1}', "UTF-8"),
    "list": (b"[]", "object"),
    "cut": (b'{"a": ', "line 1"),
    "architecture": (b'{"architectures": ["GPT9ForCausalLM"]}', "GPT9ForCausalLM"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_bad_config(model, fault):
    source = model()
    data, word = CONFIGS[fault]
    (source / "config.json").write_bytes(data)
    refused(source, word, str(source))


def test_unknown_rope_type(model):
    source = model()
    edit_config(source, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    refused(source, "spiral")


def test_tensors_that_do_not_fit_the_model(model):
    source = model()
    kept = (source / WEIGHTS).read_bytes()
    rewrite(source, lambda t: t.pop(NORM))
    refused(source, NORM, "missing")
    (source / WEIGHTS).write_bytes(kept)
    rewrite(source, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}))
    refused(source, "model.layers.0.extra.weight")
    (source / WEIGHTS).write_bytes(kept)
    rewrite(source, lambda t: t.update({NORM: torch.ones(33)}))
    refused(source, NORM, "[33]", "[32]")
    (source / WEIGHTS).write_bytes(kept)
    rewrite(source, lambda t: t.pop("lm_head.weight"))
    refused(source, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 100),
        ("intermediate_size", 64),
        ("num_key_value_heads", 4),
        ("num_attention_heads", 8),
        ("num_hidden_layers", 2),
        ("num_hidden_layers", 4),
        ("hidden_size", 64),
        ("head_dim", 16),
    ],
)
def test_a_config_that_disagrees_with_the_weights(model, field, value):
    source = model()
    edit_config(source, **{field: value})
    refused(source, "config.json")


def test_a_tied_head_that_differs(model):
    source = model("tied")
    rewrite(source, lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    refused(source, "lm_head.weight", "tie_word_embeddings")
    rewrite(source, lambda t: t.update({"lm_head.weight": t[EMBED].float()}))
    refused(source, "lm_head.weight", "F32")


def test_dtypes_that_are_not_supported(model):
    source = model()
    q = "model.layers.0.self_attn.q_proj.weight"
    rewrite(source, lambda t: t.update({q: t[q].float()}))
    refused(source, q, "different dtypes")
    rewrite(source, lambda t: t.update({q: t[q].to(torch.float8_e4m3fn)}))
    refused(source, q, "F8_E4M3", "quantised")
    rewrite(source, lambda t: t.update({q: t[q].to(torch.bfloat16)}))
    refused(source, "'int3'", dtype="int3")
    edit_config(source, quantization_config={"quant_method": "gptq"})
    refused(source, "quantization_config")


def test_targets_that_cannot_be_written(model, tmp_path):
    source = model()
    native = tmp_path / "native"
    import_checkpoint(source, native)
    for call, given in ((import_checkpoint, source), (export_checkpoint, native)):
        there = tmp_path / "there"
        there.mkdir()
        (there / "mine").write_text("x")
        with pytest.raises(BevatronError, match="already exists"):
            call(given, there)
        assert (there / "mine").read_text() == "x"
        with pytest.raises(BevatronError, match="apart from the source"):
            call(given, given / "sub")
        with pytest.raises(BevatronError, match="apart from the source"):
            call(given, given, overwrite=True)
        call(given, there, overwrite=True)
        assert not (there / "mine").exists()
        shutil.rmtree(there)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BevatronError, match="file"):
        import_checkpoint(source, tmp_path / "file" / "native")
    with pytest.raises(BevatronError, match="does not exist"):
        import_checkpoint(tmp_path / "no such", tmp_path / "x")
    with pytest.raises(BevatronError, match="is a Hugging Face folder"):
        export_checkpoint(source, tmp_path / "x")
    with pytest.raises(BevatronError, match="native checkpoint already"):
        import_checkpoint(native, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fails_midway(model, monkeypatch, code, overwrite):
    source = model()
    target = source.parent / "target"
    if overwrite:
        target.mkdir()
        (target / "old").write_text("x")
    calls = []

    def pwrite(fd, data, at):
        calls.append(at)
        if len(calls) > 5:
            raise OSError(code, os.strerror(code))
        return real(fd, data, at)

    real = os.pwrite
    monkeypatch.setattr(mover.os, "pwrite", pwrite)
    message = refused(source, os.strerror(code), overwrite=overwrite)
    assert "target" in message
    if overwrite:
        assert (target / "old").read_text() == "x"


def test_what_a_killed_import_left_is_cleared(model):
    source = model()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], check=True, capture_output=True
    )
    pid = int(dead.stdout)
    (source.parent / f".target.partial-{pid}" / "model").mkdir(parents=True)
    old = source.parent / f".target.old-{pid}"
    old.mkdir()
    (old / "kept").write_text("x")
    with pytest.raises(BevatronError, match=r"appeared|already exists"):
        import_checkpoint(source, source.parent / "target")
    assert (source.parent / "target" / "kept").exists()
    import_checkpoint(source, source.parent / "target", overwrite=True)
    assert sorted(p.name for p in source.parent.iterdir()) == ["hf", "target"]


def test_sigterm_leaves_nothing(model):
    source = model()
    code = (
        "import sys, time\n"
        "from bevatron.bridge import importer\n"
        "def stop(*a):\n    print('now', flush=True)\n    time.sleep(60)\n"
        "importer._copy_others = stop\n"
        f"importer.import_checkpoint({str(source)!r}, {str(source.parent / 'target')!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline()
    assert any(".target.partial-" in p.name for p in source.parent.iterdir())
    child.send_signal(signal.SIGTERM)
    child.wait(timeout=20)
    child.stdout.close()
    assert child.returncode == 128 + signal.SIGTERM
    assert sorted(p.name for p in source.parent.iterdir()) == ["hf"]


def test_damage_in_a_native_checkpoint(model, tmp_path):
    source = model()
    native = source.parent / "native"
    import_checkpoint(source, native)
    assert verify(source, native, logits=False).ok
    shard_file = native / "model" / "00001.safetensors"
    data = bytearray(shard_file.read_bytes())
    data[-9] ^= 1
    shard_file.write_bytes(data)
    report = verify(source, native, logits=False)
    assert not report.ok
    assert any("damaged" in d for d in report.differences)
    assert any("lm_head.weight: values differ" in d for d in report.differences)
    target = source.parent / "target"
    with pytest.raises(BevatronError, match="damaged"):
        export_checkpoint(native, target)
    shard_file.write_bytes(data[:-100])
    with pytest.raises(BevatronError, match="truncated"):
        export_checkpoint(native, target)
    (native / "manifest.json").unlink()
    with pytest.raises(BevatronError, match="no complete native checkpoint"):
        export_checkpoint(native, target)
    (native / "latest").write_text("step-00000009")
    with pytest.raises(BevatronError, match="step-00000009"):
        export_checkpoint(native, target)
    assert not target.exists()


def test_a_spec_that_the_manifest_does_not_fill(model):
    source = model()
    native = source.parent / "native"
    import_checkpoint(source, native)
    raw = json.loads((native / "manifest.json").read_text())
    del raw["tensors"]["model/final_norm.weight"]
    (native / "manifest.json").write_text(json.dumps(raw))
    refused(native, "final_norm.weight", call=export_checkpoint)


def test_overflow_to_infinity_is_told(model):
    source = model()
    rewrite(source, lambda t: t.update({NORM: torch.full((32,), 1e30, dtype=torch.bfloat16)}))
    report = import_checkpoint(source, source.parent / "target", dtype="fp16")
    assert any("final_norm.weight" in n and "32 values" in n for n in report.notes)
