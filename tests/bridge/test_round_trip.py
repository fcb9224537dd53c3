"""Nothing changed, nothing rewritten: an unmodified import exports to identical files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.manifest import Chunk, read_manifest
from bevatron.checkpoint.read_boxes import read_box, verify_chunk
from bevatron.checkpoint.safetensors_file import read_header
from bevatron.compress.prune import prune
from bevatron.compress.prune_targets import Targets
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import verify
from bevatron.families.registry import by_name
from bevatron.spec import MLP, Attention, LayerSpec, Linear
from bevatron.spec.json import from_json
from tests.bridge.hf_folders import (
    add_others,
    assert_same_folder,
    edit_config,
    make,
    rewrite,
)
from tests.faults.refusal import command

CASES = [
    ("llama", "float32", "20KB", {}),
    ("llama", "bfloat16", "5GB", {"tie_word_embeddings": True}),
    ("llama", "float16", "5GB", {"attention_bias": True, "mlp_bias": True}),
    ("nemotron", "bfloat16", "20KB", {}),
    ("nemotron", "float32", "5GB", {"tie_word_embeddings": True}),
    ("nanochat", "float32", "5GB", {}),
    ("nanochat", "bfloat16", "10KB", {}),
    ("nanochat", "float16", "5GB", {}),
]


@pytest.mark.parametrize(("family", "dtype", "shard", "changes"), CASES)
def test_round_trip_is_identical(tmp_path, family, dtype, shard, changes):
    source = make(tmp_path / "hf", family, dtype, shard, **changes)
    report = import_checkpoint(source, tmp_path / "native")
    assert report.family == family
    assert report.dtype == dtype
    assert report.skipped == {}
    report = export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert report.identical
    assert_same_folder(source, tmp_path / "out")
    assert verify(source, tmp_path / "native", logits=False).ok


def heterogeneous(path: Path, tied: bool = False) -> Path:
    """A Llama-Nemotron folder written from its weight map, remote code and all."""
    layers = (
        LayerSpec(None, MLP(256)),
        LayerSpec(Attention(4, 1, 8), None),
        LayerSpec(Linear(), MLP(512)),
        LayerSpec(None, None),
        LayerSpec(Attention(4, 4, 8), Linear()),
        LayerSpec(Attention(4, 2, 8), MLP(256)),
    )
    llama = by_name("llama")
    base = make(path.parent / "base", hidden_size=32, num_hidden_layers=6)
    spec = replace(
        llama.spec(json.loads((base / "config.json").read_text())),
        layers=layers,
        tie_word_embeddings=tied,
    )
    family = by_name("llama_nemotron")
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        s.name: torch.randn(s.shape, generator=generator).bfloat16()
        for e in family.weight_map(spec)
        for s in e.sources
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = family.config(spec, "bfloat16")
    assert family.spec(config) == spec
    (path / "config.json").write_text(json.dumps(config))
    add_others(path)
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_heterogeneous_round_trip_is_identical(tmp_path, tied):
    source = heterogeneous(tmp_path / "hf", tied)
    assert import_checkpoint(source, tmp_path / "native").family == "llama_nemotron"
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")


def test_native_weights_are_where_the_manifest_says(tmp_path):
    """The QKV rows lie by group, and every chunk's hash is that of its bytes."""
    source = make(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "native")
    manifest = read_manifest(tmp_path / "native")
    for tensor in manifest.tensors.values():
        for chunk in tensor.chunks:
            verify_chunk(tmp_path / "native", chunk, ITEMSIZE[tensor.dtype])
    hf = load_file(source / "model.safetensors")
    native = load_file(tmp_path / "native" / "model" / "00001.safetensors")
    prefix = "model.layers.1.self_attn."
    q, k, v = (hf[f"{prefix}{x}_proj.weight"].view(2, -1, 8, 32) for x in "qkv")
    want = torch.cat([q, k, v], dim=1).reshape(-1, 32)
    assert torch.equal(native["layers.1.attention.qkv.weight"], want)
    entry = manifest.weights()["layers.1.attention.qkv.weight"]
    box = read_box(tmp_path / "native", entry, (3, 5), (9, 11))
    assert torch.equal(torch.from_numpy(box.view("f4")), want[3:12, 5:16])


def test_a_tied_head_that_is_stored_comes_back(tmp_path):
    source = make(tmp_path / "hf", tie_word_embeddings=True)
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")
    export_checkpoint(tmp_path / "native", tmp_path / "split", max_shard_size="20KB")
    assert verify(source, tmp_path / "split", logits=False).ok


def test_a_field_accepted_by_name_is_recorded_and_comes_back(tmp_path):
    source = make(tmp_path / "hf")
    edit_config(source, house_style="brisk", is_llama_config=True, pad_token_id=-1)
    with pytest.raises(BevatronError, match="--accept-field house_style"):
        import_checkpoint(source, tmp_path / "native")
    seen = verify(source, source)
    assert "--accept-field house_style" in seen.logits["reason"]
    assert seen.text().count("house_style") == 2  # the field and the option, in one note
    assert "logits were not compared, for the same reason" in seen.text()
    arguments = ["import", source, tmp_path / "native", "--accept-field", "house_style", "--json"]
    status, out, _ = command(*arguments)
    assert status == 0
    assert "house_style = 'brisk'" in json.loads(out)["notes"][0]
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")
    assert verify(tmp_path / "native", tmp_path / "out").logits["ok"]  # transformers ignores it
    new = trained(tmp_path / "native", tmp_path / "new")
    export_checkpoint(new, tmp_path / "after")
    config = (tmp_path / "after" / "config.json").read_bytes()
    assert config == (source / "config.json").read_bytes()
    facts = json.loads((tmp_path / "after" / "bevatron.json").read_text())
    assert facts["accepted"] == {"house_style": "brisk"}
    assert "`house_style`: `'brisk'`" in (tmp_path / "after" / "README.md").read_text()


def test_rotary_buffers_are_carried(tmp_path):
    source = make(tmp_path / "hf", dtype="bfloat16")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(source, lambda t: t.update({name: torch.rand(4)}))
    import_checkpoint(source, tmp_path / "native")
    assert read_manifest(tmp_path / "native").tensors[f"carried/{name}"].dtype == "F32"
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")


def test_mixed_dtypes_are_kept(tmp_path):
    source = make(tmp_path / "hf", dtype="bfloat16")
    rewrite(source, lambda t: t.update({"model.norm.weight": torch.rand(32)}))
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")


def test_foreign_weights_are_skipped_by_name(tmp_path):
    source = make(tmp_path / "hf")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "m.gguf", "old.safetensors"):
        (source / name).write_bytes(b"x")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("secret")
    report = import_checkpoint(source, tmp_path / "native")
    assert sorted(report.skipped) == [
        ".git/",
        "consolidated.00.pth",
        "m.gguf",
        "old.safetensors",
        "pytorch_model.bin",
    ]
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert (tmp_path / "out" / "provenance.json").read_text() == "not ours"


def test_new_shards_hold_the_same_tensors(tmp_path):
    source = make(tmp_path / "hf", dtype="bfloat16")
    import_checkpoint(source, tmp_path / "native")
    report = export_checkpoint(tmp_path / "native", tmp_path / "out", max_shard_size="20KB")
    assert not report.identical
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    hf = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in hf.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in hf.values())
    assert len(set(index["weight_map"].values())) > 2
    got = {}
    for file in set(index["weight_map"].values()):
        got |= load_file(tmp_path / "out" / file)
    assert all(torch.equal(got[n], t) for n, t in hf.items()) and len(got) == len(hf)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("old", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("new", ["fp32", "fp16", "bf16"])
def test_a_new_dtype_is_what_torch_makes_of_it(tmp_path, old, new):
    source = make(tmp_path / "hf", dtype=old)
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[new]
    want = {n: t.to(torch_dtype) for n, t in load_file(source / "model.safetensors").items()}
    import_checkpoint(source, tmp_path / "a", dtype=new)
    export_checkpoint(tmp_path / "a", tmp_path / "out_a")
    import_checkpoint(source, tmp_path / "b")
    export_checkpoint(tmp_path / "b", tmp_path / "out_b", dtype=new)
    for out in ("out_a", "out_b"):
        got = load_file(tmp_path / out / "model.safetensors")
        assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in want.items())
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert config["dtype"] == str(torch_dtype).removeprefix("torch.")


def trained(native: Path, folder: Path, *, keep_source: bool = True) -> Path:
    """A run folder whose latest step holds the model with other numbers, in uneven boxes."""
    step = folder / "step-00000007"
    shutil.copytree(native, step)
    (folder / "latest").write_text("step-00000007\n")
    if not keep_source:
        shutil.rmtree(step / "source")
        (step / "provenance.json").unlink()
    manifest = read_manifest(native)
    shutil.rmtree(step / "model")
    (step / "model").mkdir()
    tensors, data = {}, bytearray()
    for name, tensor in manifest.tensors.items():
        array = read_box(native, tensor, (0,) * len(tensor.shape), tensor.shape) ^ 1
        cuts = [slice(0, n // 3) if n > 2 else slice(0, n) for n in tensor.shape]
        boxes = [((0,) * array.ndim, array)]
        for d, cut in enumerate(cuts):
            parts = []
            for offset, box in boxes:
                low, high = np.split(box, [cut.stop], axis=d)
                moved = (*offset[:d], offset[d] + cut.stop, *offset[d + 1 :])
                parts += [(offset, low), (moved, high)]
            boxes = [(o, b) for o, b in parts if b.size]
        chunks = []
        for offset, box in reversed(boxes):
            import xxhash

            digest = "xxh3:" + xxhash.xxh3_128_hexdigest(box.tobytes())
            chunks.append(Chunk(offset, box.shape, "model/x.bin", len(data), digest))
            data += box.tobytes()
        tensors[name] = replace(tensor, chunks=tuple(chunks))
    (step / "model" / "x.bin").write_bytes(data)
    (step / "manifest.json").write_text(replace(manifest, step=7, tensors=tensors).to_json())
    return folder


def test_a_trained_run_exports_with_the_old_layout(tmp_path):
    """Chunks cut in every dimension come together; only the numbers in the shards differ."""
    source = make(tmp_path / "hf", dtype="bfloat16", shard="20KB")
    import_checkpoint(source, tmp_path / "native")
    run = trained(tmp_path / "native", tmp_path / "run")
    report = export_checkpoint(run, tmp_path / "out")
    assert (report.step, report.identical) == (7, False), "other numbers in the same files"
    for path in source.glob("*"):
        out = tmp_path / "out" / path.name
        if path.suffix == ".safetensors":
            want, got = load_file(path), load_file(out)
            for name, tensor in want.items():
                assert torch.equal(tensor.view(torch.int16) ^ 1, got[name].view(torch.int16))
        elif path.is_file():
            assert path.read_bytes() == out.read_bytes()
    assert json.loads((tmp_path / "out" / "bevatron.json").read_text())["step"] == 7
    assert (tmp_path / "out" / "README.md").exists()
    assert verify(run, tmp_path / "out", logits=False).ok
    assert not verify(source, run, logits=False).ok


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_new_weights_are_written_as_transformers_reads_them(tmp_path, shard):
    """A source without metadata comes back as it was; with other weights it has what it lacked."""
    source = make(tmp_path / "hf", shard=shard)
    want = {}
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        want |= tensors
        save_file(tensors, path)
    index = source / "model.safetensors.index.json"
    if index.exists():
        raw = json.loads(index.read_text())
        index.write_text(json.dumps({"weight_map": raw["weight_map"]}))
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "same")
    assert_same_folder(source, tmp_path / "same")
    run = trained(tmp_path / "native", tmp_path / "run")
    export_checkpoint(run, tmp_path / "out")
    assert verify(run, tmp_path / "out", logits=False).ok
    files = sorted(p.name for p in source.glob("*.safetensors"))
    assert files == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    for file in files:
        assert read_header(tmp_path / "out" / file).metadata == {"format": "pt"}
    if index.exists():
        made = json.loads((tmp_path / "out" / index.name).read_text())
        assert made == {**raw, "metadata": {"total_size": sum(t.nbytes for t in want.values())}}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), want[name].view(torch.int32) ^ 1), name


def test_a_model_without_source_exports_whole(tmp_path):
    source = make(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "native")
    run = trained(tmp_path / "native", tmp_path / "run", keep_source=False)
    export_checkpoint(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    spec = from_json((tmp_path / "native" / "spec.json").read_text())
    assert by_name("llama").spec(config) == spec
    assert verify(run, tmp_path / "out", logits=False).ok
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


LICENSE = "\n## License\n\nNone.\n"


def test_the_record_and_card_of_an_export_are_never_those_of_its_source(tmp_path):
    """An own bevatron.json and README.md are written anew; a foreign card stays, but for what it
    says of the weights' origin if it was built around one of ours."""
    import_checkpoint(make(tmp_path / "hf", dtype="bfloat16"), tmp_path / "first")
    run = trained(tmp_path / "first", tmp_path / "run")
    export_checkpoint(run, tmp_path / "ours")
    old = json.loads((tmp_path / "ours" / "bevatron.json").read_text())
    card = (tmp_path / "ours" / "README.md").read_text()
    cards = {
        "own": card,
        "foreign": "# A fine model\n\nWritten by Bevatron, or not.\n",
        "around": card.replace("# llama,", "# Our\n\nBuy it.\n\n# llama,")
        + "\n## License\n\nNone.\n",
    }
    for kind, text in cards.items():
        source = tmp_path / kind
        shutil.copytree(tmp_path / "ours", source)
        (source / "README.md").write_text(text)
        native = tmp_path / f"{kind}-native"
        import_checkpoint(source, native)
        export_checkpoint(native, tmp_path / f"{kind}-same")
        assert_same_folder(source, tmp_path / f"{kind}-same")
        pruned = tmp_path / f"{kind}-pruned"
        prune(native, pruned, Targets(drop_layers=(1,)), show_progress=False)
        for changed in (trained(native, tmp_path / f"{kind}-run"), pruned):
            out = tmp_path / f"{changed.name}-out"
            export_checkpoint(changed, out)
            facts = json.loads((out / "bevatron.json").read_text())
            stored = load_file(out / "model.safetensors")
            assert facts["source"] == str(source)
            assert set(facts["tensors"]) == set(stored)
            assert facts["parameters"] == sum(t.numel() for t in stored.values())
            assert facts["weights"] != old["weights"]
            new = (out / "README.md").read_text()
            if kind == "foreign":
                assert new == text
                continue
            assert facts["weights"] in new and old["weights"] not in new
            assert f"from `{source}`" in new
            if kind == "own":
                assert f"| parameters | {facts['parameters']:,} |" in new
            else:
                assert "Buy it." in new and new.endswith(LICENSE)
    foreign = tmp_path / "own" / "bevatron.json"
    foreign.write_text('{"mine": 1}')
    import_checkpoint(tmp_path / "own", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "again-out", dtype="fp32")
    assert (tmp_path / "again-out" / "bevatron.json").read_text() == '{"mine": 1}'
