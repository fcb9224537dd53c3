"""Nanotron checkpoints come in and go out without a number changed, whatever their layout."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bevatron.bridge.conversion_preview import preview_export, preview_import
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.inspect import inspect
from bevatron.bridge.open_weights import open_weights
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import verify
from bevatron.families.nanotron_config import read_model_config
from bevatron.generate.sampling_options import defaults_of
from bevatron.parallel.whole_decoder import load_decoder
from tests.bridge import hf_folders
from tests.bridge.nanotron_folders import llama, model_config, qwen2, read, whole, write

LAYOUTS = [
    {"tp": 1, "pp": 1},
    {"tp": 1, "pp": 2, "interleaved": True},
    {"tp": 2, "pp": 1, "numpy": True},
    {"tp": 2, "pp": 2, "interleaved": True, "numpy": True},
    {"tp": 4, "pp": 2},
    {"tp": 4, "pp": 1, "interleaved": True},
]
QKV = "7/model/model/decoder/1/pp_block/attn/qkv_proj"


def shown(layout) -> str:
    return "-".join(f"{k}{int(v)}" for k, v in layout.items())


def logits(model, vocab_size=96):
    ids = torch.randint(vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.logits(ids) if hasattr(model, "logits") else model(ids).logits


def assert_same_tensors(got: dict, wanted: dict) -> None:
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def assembled(model, interleaved=False) -> dict:
    found = whole(model, interleaved)
    return {name: torch.cat(parts) for name, (parts, _) in found.items()}


# --- in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=shown)
def test_any_layout_comes_in_bit_for_bit(tmp_path, layout):
    """Through native to transformers: the same state dict, the same logits."""
    model = llama()
    root = write(tmp_path / "nt", model, **layout)
    report = import_checkpoint(root, tmp_path / "native")
    assert (report.family, report.step, report.dtype) == ("llama", 0, "float32")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    expected = logits(model)
    assert expected.std() > 0.1, "the model is too flat to tell"
    decoder, _ = load_decoder(tmp_path / "native")
    assert (logits(decoder) - expected).abs().max() <= 1e-5
    export_checkpoint(tmp_path / "native", tmp_path / "hf")
    assert_same_tensors(load_file(tmp_path / "hf" / "model.safetensors"), model.state_dict())
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(back) is transformers.LlamaForCausalLM
    assert torch.equal(logits(back), expected)
    assert (back.config.bos_token_id, back.config.eos_token_id) == (3, 5)


def test_tied_bf16_checkpoints_have_one_embedding(tmp_path):
    model = llama(torch.bfloat16, tie_word_embeddings=True)
    root = write(tmp_path / "nt", model, tp=2, pp=2)
    import_checkpoint(root, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert_same_tensors(back.state_dict(), model.state_dict())
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize("interleaved", [False, True])
def test_biases_on_q_k_and_v_alone(tmp_path, interleaved):
    """What Qwen2 has: it comes in, is used, goes back out to Nanotron, and no Llama can say it."""
    model = qwen2()
    root = write(tmp_path / "nt", model, tp=2, interleaved=interleaved)
    import_checkpoint(root, tmp_path / "native")
    decoder, spec = load_decoder(tmp_path / "native")
    assert spec.layers[0].attention.qkv_bias and not spec.layers[0].attention.o_bias
    assert (logits(decoder) - logits(model)).abs().max() <= 1e-5
    export_checkpoint(tmp_path / "native", tmp_path / "out", target_format="nanotron")
    assert_same_tensors(read(tmp_path / "out"), assembled(model))
    with pytest.raises(BevatronError, match="o_bias"):
        export_checkpoint(tmp_path / "native", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "native" / "source")
    assert isinstance(config, transformers.Qwen2Config)
    assert defaults_of(open_weights(tmp_path / "native")).stop_tokens == {5}


def test_a_nanotron_folder_is_used_where_it_lies(tmp_path):
    """Training and generation open it without an import; verify and inspect know it."""
    model = llama()
    root = write(tmp_path / "nt", model, tp=2, pp=2, interleaved=True)
    decoder, _ = load_decoder(root)
    assert (logits(decoder) - logits(model)).abs().max() <= 1e-5
    opened = open_weights(root / "7")
    assert defaults_of(opened).stop_tokens == {5}
    opened.copy_source(tmp_path / "source")
    assert json.loads((tmp_path / "source" / "config.json").read_text())["eos_token_id"] == 5
    model.save_pretrained(tmp_path / "hf")
    assert verify(root, tmp_path / "hf").ok
    found = inspect(root)
    assert (found["kind"], found["family"], found["layers"]) == ("nanotron", "llama", 3)
    assert (found["step"], found["dtype"]) == (7, "float32")
    assert found["parameters"] * 4 == found["bytes"]
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1
    model.save_pretrained(tmp_path / "other")
    assert "up_proj" in str(verify(root, tmp_path / "other", logits=False).differences)


def test_dtypes_are_converted_on_the_way(tmp_path):
    model = llama(torch.bfloat16)
    root = write(tmp_path / "nt", model, tp=2)
    report = import_checkpoint(root, tmp_path / "native", dtype="fp32")
    assert report.dtype == "float32"
    export_checkpoint(tmp_path / "native", tmp_path / "hf")
    assert_same_tensors(
        load_file(tmp_path / "hf" / "model.safetensors"), model.float().state_dict()
    )
    export_checkpoint(tmp_path / "native", tmp_path / "out", dtype="bf16", target_format="nanotron")
    assert_same_tensors(read(tmp_path / "out"), assembled(model.bfloat16()))
    run = yaml.safe_load((tmp_path / "out" / "0" / "config.yaml").read_text())
    assert run["model"]["dtype"] == "bfloat16"


def test_rope_scaling_is_dropped_and_said_so(tmp_path):
    """Nanotron never applies it, so a model that it trained does not have it."""
    model = llama()
    scaling = {"rope_type": "linear", "factor": 4.0}
    root = write(tmp_path / "nt", model, rope_scaling=scaling)
    report = import_checkpoint(root, tmp_path / "native")
    assert any("rope_scaling" in note and "never applies" in note for note in report.notes)
    decoder, _ = load_decoder(tmp_path / "native")
    assert (logits(decoder) - logits(model)).abs().max() <= 1e-5


def test_what_is_left_out_is_listed(tmp_path):
    root = write(tmp_path / "nt", llama())
    (root / "7" / "notes.md").write_text("mine")
    report = import_checkpoint(root, tmp_path / "native")
    assert set(report.skipped) == {
        "optimizer/",
        "lr_scheduler/",
        "random/",
        "config.yaml",
        "notes.md",
    }
    record = json.loads((tmp_path / "native" / "provenance.json").read_text())
    assert record["skipped"] == report.skipped
    assert len(record["tensors"]) == report.tensors
    assert {p.name for p in (tmp_path / "native" / "source").iterdir()} == {"config.json"}


def test_numbers_that_are_none_are_kept_and_counted(tmp_path):
    model = llama()
    model.model.layers[1].self_attn.k_proj.weight.data[3, 4:6] = float("nan")
    model.model.layers[2].mlp.down_proj.weight.data[60, 47] = float("inf")
    report = import_checkpoint(write(tmp_path / "nt", model, tp=4), tmp_path / "native")
    assert report.non_finite == {
        "model.layers.1.self_attn.k_proj.weight": 2,
        "model.layers.2.mlp.down_proj.weight": 1,
    }
    assert report.verified["equal"] is True
    export_checkpoint(tmp_path / "native", tmp_path / "out", target_format="nanotron")
    got, wanted = read(tmp_path / "out"), assembled(model)
    for name, tensor in wanted.items():
        assert torch.equal(got[name].view(torch.int32), tensor.view(torch.int32)), name


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    root = write(tmp_path / "nt", llama(), tp=2)
    from bevatron.bridge import foreign_checkpoint

    late = root / QKV / "model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
    copy = foreign_checkpoint.read_back
    monkeypatch.setattr(
        foreign_checkpoint,
        "read_back",
        lambda *args: late.write_bytes(late.read_bytes()) and copy(*args),
    )
    refused(root, "changed while it was being read", late.name)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[0]).parent / "never",)


def test_pickles_are_never_opened(tmp_path, monkeypatch):
    root = write(tmp_path / "nt", llama())
    for file in (root / "7").rglob("*.pt"):
        file.write_bytes(pickle.dumps(Bomb()))
        file.chmod(0)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    import_checkpoint(root, tmp_path / "native")
    assert inspect(root)["step"] == 7


def test_no_torch_and_no_model_in_either_direction(tmp_path):
    root = write(tmp_path / "nt", llama(torch.bfloat16), tp=2, interleaved=True)
    code = f"""
import sys
from bevatron.bridge.convert import import_checkpoint, export_checkpoint
from bevatron.bridge.inspect import inspect
from bevatron.families.nanotron_config import read_model_config
from bevatron.bridge.conversion_preview import preview_export, preview_import
from bevatron.evaluate.verify import verify
nt, native, out = {str(root)!r}, {str(tmp_path / "native")!r}, {str(tmp_path / "out")!r}
import_checkpoint(nt, native)
export_checkpoint(native, out, target_format="nanotron")
inspect(nt)
assert verify(nt, out, logits=False).ok
import_checkpoint(out, native, dtype="fp32", overwrite=True)
print([m for m in ("torch", "transformers", "safetensors") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """Tensors of 24 MiB pass through a process that may grow by 12 MiB, as cut columns as well."""
    model = llama(torch.bfloat16, intermediate_size=196608, num_hidden_layers=1)
    root = write(tmp_path / "nt", model, tp=4)
    code = f"""
import resource
from bevatron.bridge.convert import import_checkpoint, export_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
import_checkpoint({str(root)!r}, {str(tmp_path / "native")!r})
export_checkpoint({str(tmp_path / "native")!r}, {str(tmp_path / "out")!r}, target_format="nanotron")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 << 10
    assert_same_tensors(read(tmp_path / "out"), assembled(model))


# --- out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_what_goes_out_is_what_nanotron_reads(tmp_path, tied):
    """Read back by its slice pairs; names, metadata and configuration as Nanotron has them."""
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf")
    hf_folders.add_others(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "native")
    report = export_checkpoint(tmp_path / "native", tmp_path / "out", target_format="nanotron")
    assert_same_tensors(read(tmp_path / "out"), assembled(model))
    same = write(tmp_path / "same", model, step=0)
    ours, theirs = tmp_path / "out" / "0", same / "0"
    files = sorted(p.relative_to(theirs) for p in theirs.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(ours) for p in ours.rglob("*.safetensors"))
    assert report.tensors == len(files)
    for file in files:
        with safe_open(ours / file, "pt") as a, safe_open(theirs / file, "pt") as b:
            assert list(a.keys()) == ["data"]
            assert (a.metadata() or {}) == (b.metadata() or {})
    config = json.loads((ours / "model_config.json").read_text())
    wanted = model_config(model)
    assert {k: wanted[k] for k in config} == config
    assert {"rope_theta", "tie_word_embeddings", "eos_token_id", "is_qwen2_config"} <= set(config)
    run = yaml.safe_load((ours / "config.yaml").read_text())
    assert run["model"]["model_config"] == config
    assert run["parallelism"] == {"dp": 1, "pp": 1, "tp": 1}
    tokenizer = Path(run["tokenizer"]["tokenizer_name_or_path"])
    assert (tokenizer / "tokenizer.json").read_bytes() == (
        tmp_path / "hf" / "tokenizer.json"
    ).read_bytes()
    metas = json.loads((ours / "checkpoint_metadata.json").read_text())
    assert (metas["version"], metas["tp"], metas["metas"]["last_train_step"]) == ("1.5", 1, 0)
    assert "source/modeling_x.py" in report.skipped


def test_there_and_back_is_the_same_checkpoint(tmp_path):
    """nanotron -> native -> nanotron -> native: equal manifests, chunk hashes included."""
    root = write(tmp_path / "nt", llama(torch.bfloat16), tp=4, pp=2, interleaved=True)
    (root / "7" / "tokenizer").mkdir()
    (root / "7" / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    import_checkpoint(root, tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "out", target_format="nanotron")
    import_checkpoint(tmp_path / "out" / "0", tmp_path / "b", source_format="nanotron")
    for name in ("manifest.json", "spec.json", "source/config.json", "source/tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert verify(root, tmp_path / "out").ok


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("maker", "changes", "named"),
    [
        ("llama", {"rope_parameters": LLAMA3}, "rope.kind is llama3"),
        ("llama", {"rope_parameters": LINEAR}, "rope.kind is linear"),
        ("llama", {"head_dim": 16}, "head_dim is 16; it can only be 8"),
        ("llama", {"attention_bias": True}, "o_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp.bias is True"),
        ("nanochat", {}, "nanochat model cannot be written for Nanotron: .*qk_norm"),
        ("nemotron", {}, "nemotron model cannot be written for Nanotron: .*relu2"),
    ],
)
def test_what_nanotron_cannot_say_is_refused_by_name(tmp_path, maker, changes, named):
    hf_folders.make(tmp_path / "hf", maker, **changes)
    import_checkpoint(tmp_path / "hf", tmp_path / "native")
    with pytest.raises(BevatronError, match=named):
        export_checkpoint(tmp_path / "native", tmp_path / "out", target_format="nanotron")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "native"]


def test_layers_that_differ_are_refused_by_name(tmp_path):
    from dataclasses import replace

    from bevatron.families.nanotron_config import model_config as write_config
    from bevatron.families.registry import by_name
    from bevatron.spec.model import LayerSpec, Rope

    spec = by_name("llama").spec(llama().config.to_dict())
    assert write_config(spec, None)[0]["num_hidden_layers"] == 3
    first, second, third = spec.layers
    wide = replace(second, mlp=replace(second.mlp, intermediate_size=99))
    cases = {
        "layers.1.mlp.intermediate_size is 99": (first, wide, third),
        "layers.1.attention is None": (first, LayerSpec(None, second.mlp), third),
        "no attention": (LayerSpec(None, second.mlp),),
    }
    for named, layers in cases.items():
        with pytest.raises(BevatronError, match=named.replace(".", r"\.")):
            write_config(replace(spec, layers=layers), None)
    with pytest.raises(BevatronError, match=r"rope\.partial is 0\.5"):
        write_config(replace(spec, rope=Rope(partial=0.5)), None)


def test_shard_sizes_have_no_meaning_there(tmp_path):
    import_checkpoint(hf_folders.make(tmp_path / "hf"), tmp_path / "native")
    with pytest.raises(BevatronError, match="--max-shard-size has no meaning"):
        export_checkpoint(
            tmp_path / "native", tmp_path / "out", max_shard_size="1GB", target_format="nanotron"
        )


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_a_dry_run_shows_what_then_happens(tmp_path, dtype):
    root = write(tmp_path / "nt", llama(torch.bfloat16), tp=2, pp=2)
    seen = preview_import(root, tmp_path / "native", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["nt"]
    report = import_checkpoint(root, tmp_path / "native", dtype=dtype)
    assert seen.shards == sizes(tmp_path / "native")
    assert (seen.read, seen.parameters) == (report.nbytes, report.parameters)
    assert "fuse_qkv" in seen.text() and "optimizer/: skipped" in seen.text()
    seen = preview_export(tmp_path / "native", tmp_path / "out", target_format="nanotron")
    assert not (tmp_path / "out").exists()
    report = export_checkpoint(tmp_path / "native", tmp_path / "out", target_format="nanotron")
    assert seen.shards == sizes(tmp_path / "out")
    assert report.verified["equal"] is True
    assert report.verified["tensors"] == 30, "of Hugging Face"


def sizes(folder: Path) -> dict:
    files = folder.rglob("*.safetensors")
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


# --- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "nt", llama(), tp=2)


@pytest.fixture
def nt(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "nt", symlinks=True))


def refused(root: Path, *words: str) -> None:
    """The import fails with one sentence that has all the words, and leaves nothing behind."""
    before = sorted(root.parent.iterdir())
    with pytest.raises(BevatronError) as raised:
        import_checkpoint(root, root.parent / "native", source_format="nanotron")
    for word in words:
        assert word in str(raised.value), str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(root.parent.iterdir()) == before


def edit(file: Path, metadata=None, **changes) -> None:
    """Rewrite a weight file with other metadata, data or tensors."""
    with safe_open(file, "pt") as old:
        kept = {**(old.metadata() or {}), **(metadata or {})}
    tensors = {**load_file(file), **changes}
    save_file(tensors, file, metadata={k: v for k, v in kept.items() if v is not None})


def configure(root: Path, **changes) -> None:
    file = root / "7" / "model_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("moe_config", {"num_experts": 8}),
        ("moe_config", {"layers": [0], "num_experts": 8}),
        ("moe_num_experts", 4),
        ("sliding_window_size", 127),
        ("sliding_window_size", "512"),
        ("no_rope_layer", 3),
        ("rope_seq_len_interpolation_factor", 4.0),
        ("use_mla", True),
        ("kv_lora_rank", 64),
        ("flex_attention_mask", "sliding_window"),
        ("_is_using_mup", True),
        ("hidden_act", "gelu"),
        ("is_starcoder2_config", True),
        ("rope_interleaved", "yes"),
        ("vocab_size", "many"),
        ("logit_cap", 30.0),
    ],
)
def test_fields_that_change_numbers_are_refused_by_name(nt, field, value):
    configure(nt, **{field: value})
    refused(nt, "model_config.json", field)


@pytest.mark.parametrize(
    "fields",
    [
        {"log_attn_probs": True},
        {"log_attn_probs": False},
        {"ring_attn_heads_k_stride": 1, "_attn_implementation": "llama3_ring_attention"},
        {"moe_config": {"num_experts": 8, "top_k": 2, "layers": []}},
        {"moe_num_experts": 1, "num_experts_per_tok": 1, "moe_loss_weight": 0.01},
        {"moe_z_loss_weight": 0.001, "for_inference": True, "intra_doc_attention": True},
        {"sliding_window_size": 128},
        {"rope_seq_len_interpolation_factor": 1.0},
        {"use_mla": False, "kv_lora_rank": None, "v_head_dim": 128},
        {"hybrid_bp_loss_enabled": True, "hybrid_bp_loss_k": 6, "hybrid_bp_dna_oov_id": 3},
        {"is_qwen2_config": None, "is_llama_config": True, "attention_bias": True},
        {"rope_interleaved": True, "interleaved_rotary": False},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_of_any_version_that_do_nothing_are_inert(fields):
    """Those of its config classes, main and branches, 2023 to 2026."""
    plain = model_config(llama())
    found, wanted = read_model_config({**plain, **fields}), read_model_config(plain)
    assert (found.spec, found.interleaved) == (wanted.spec, False)


def test_the_rope_field_of_march_2025_is_read():
    old = {k: v for k, v in model_config(llama()).items() if k != "rope_interleaved"}
    assert read_model_config(old | {"interleaved_rotary": True}).interleaved
    assert not read_model_config(old | {"interleaved_rotary": False}).notes


def test_sizes_that_disagree_with_the_weights(nt):
    configure(nt, intermediate_size=50)
    refused(nt, "gate_up_proj.weight has shape [96, 64], expected [100, 64]")


def test_more_layers_than_there_are(nt):
    configure(nt, num_hidden_layers=4)
    refused(nt, "model.decoder.3.pp_block", "is missing")


def test_fewer_layers_than_there_are(nt):
    configure(nt, num_hidden_layers=2)
    refused(nt, "belong to no parameter", "model/model/decoder/2/pp_block")


def test_an_unknown_parameter(nt):
    place = nt / "7" / "model" / "model" / "decoder" / "0" / "pp_block" / "router"
    place.mkdir()
    save_file({"data": torch.zeros(2)}, place / "model_weight.safetensors")
    refused(nt, "1 files belong to no parameter", "pp_block/router/model_weight.safetensors")


def test_a_head_in_a_tied_model(nt):
    configure(nt, tie_word_embeddings=True)
    refused(nt, "belong to no parameter", "lm_head")


def test_biases_without_the_field_and_the_field_without_biases(nt, tmp_path):
    configure(nt, attention_bias=True)
    refused(nt, "qkv_proj.bias is missing")
    biased = write(tmp_path / "b" / "nt", qwen2(), attention_bias=False)
    refused(biased, "belong to no parameter", "model_bias")


def test_a_missing_shard(nt):
    (nt / QKV / "model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors").unlink()
    refused(nt, "qkv_proj.weight has tensor ranks [0] of 2")


def test_shards_of_two_layouts(nt):
    file = nt / QKV / "model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
    file.rename(file.with_name("model_weight_pp-rank-0-of-1_tp-rank-1-of-4.safetensors"))
    refused(nt, "qkv_proj.weight has tensor ranks [0, 1] of 2 and 4")


def test_two_files_for_one_rank(nt):
    file = nt / QKV / "model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
    shutil.copy(file, file.with_name("model_weight_pp-rank-1-of-2_tp-rank-1-of-2.safetensors"))
    refused(nt, "are both tensor rank 1")


def test_an_expert_and_a_norm_that_is_cut(nt):
    file = nt / QKV / "model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
    name = "model_weight_pp-rank-0-of-1_tp-rank-1-of-2_exp-rank-0-of-2.safetensors"
    file.rename(file.with_name(name))
    refused(nt, "expert")
    file.with_name(name).rename(file)
    norm = nt / "7/model/model/final_layer_norm/pp_block/model_weight.safetensors"
    norm.rename(norm.with_name("model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors"))
    refused(nt, "is never cut")


PAIRS = "local_global_slices_pairs"


@pytest.mark.parametrize(
    ("rank", "metadata", "says"),
    [
        (1, {PAIRS: "__import__('os').system('true')"}, "expected local#global"),
        (1, {PAIRS: "__import__('os'),1,None|None,None,None#0,1,None|None,None,None"}, "no slice"),
        (1, {PAIRS: ""}, "expected local#global"),
        (1, {PAIRS: None}, f"has no {PAIRS}"),
        (1, {PAIRS: "0,64,None#64,128,None"}, "2 slices each"),
        (1, {PAIRS: "0,64,None|None,None,None#-64,None,None|None,None,None"}, "no slice"),
        (1, {PAIRS: "0,64,2|None,None,None#64,128,2|None,None,None"}, "no slice"),
        (1, {PAIRS: "0,64,None|None,None,None#90,154,None|None,None,None"}, "lies outside"),
        (1, {PAIRS: "0,64,None|None,None,None#64,120,None|None,None,None"}, "64 and 56"),
        (1, {PAIRS: "0,64,None|0,32,None#64,128,None|0,32,None"}, "it cuts dimension 1"),
        (1, {PAIRS: "0,32,None|None,None,None#64,96,None|None,None,None"}, "use 32 of the shard's"),
        (0, {PAIRS: "0,64,None|None,None,None#64,128,None|None,None,None"}, "leave a gap"),
        (1, {PAIRS: "0,64,None|None,None,None#0,64,None|None,None,None"}, "overlap"),
        (1, {PAIRS: "0,64,None|None,None,None#32,96,None|None,None,None"}, "overlap"),
        (0, {"unsharded_shape": "__import__('os').getcwd()"}, "expected a tuple"),
        (0, {"unsharded_shape": "(128, 64, )"}, "expected a tuple"),
        (0, {"unsharded_shape": "(64, 64)"}, "has shape [64, 64], expected [128, 64]"),
        (0, {"unsharded_shape": None}, "has no unsharded_shape"),
    ],
)
def test_hostile_or_wrong_metadata(nt, rank, metadata, says):
    file = nt / QKV / f"model_weight_pp-rank-0-of-1_tp-rank-{rank}-of-2.safetensors"
    with safe_open(file, "pt") as good:
        assert good.get_tensor("data").shape == (64, 64)
    edit(file, metadata)
    refused(nt, says, "qkv_proj")


def test_wrong_tensors_in_a_file(nt):
    file = nt / QKV / "model_weight_pp-rank-0-of-1_tp-rank-0-of-2.safetensors"
    good = file.read_bytes()
    edit(file, data=torch.zeros(64, 65))
    refused(nt, "shape [64, 65] does not fit into [128, 64]")
    file.write_bytes(good)
    edit(file, data=torch.zeros(64, 64, dtype=torch.bfloat16))
    refused(nt, "dtype BF16 and F32")
    file.write_bytes(good)
    edit(file, data=torch.zeros(64, 64, dtype=torch.int8))
    refused(nt, "dtype F32 and I8")
    file.write_bytes(good)
    edit(file, other=torch.zeros(2))
    refused(nt, "data, other", "expected data alone")
    file.write_bytes(good[:-1])
    refused(nt, "truncated")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(nt, "Git LFS pointer")


def test_links_out_of_the_folder(nt, tmp_path):
    file = nt / QKV / "model_weight_pp-rank-0-of-1_tp-rank-0-of-2.safetensors"
    outside = tmp_path / "nt-outside"
    outside.mkdir()
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)
    refused(nt, "symbolic link out of the folder")
    file.unlink()
    shutil.move(outside / file.name, file)
    folder = file.parent
    shutil.move(folder, outside / "qkv_proj")
    folder.symlink_to(outside / "qkv_proj")
    refused(nt, "symbolic link out of the folder")


@pytest.mark.parametrize("text", ["../nt/7", "/etc", "7/../7", "..", "", "7 8", "٧", "7\x00"])
def test_latest_names_a_step_and_nothing_else(nt, text):
    (nt / "latest.txt").write_text(text)
    refused(nt, "latest.txt", "expected the number of a step")


def test_what_is_no_checkpoint(nt, tmp_path):
    (nt / "latest.txt").write_text("8")
    refused(nt, "names step 8, which is missing", "steps here: 7")
    (nt / "latest.txt").unlink()
    refused(nt, "neither latest.txt nor model_config.json", "name one of its steps: 7")
    (nt / "7" / "model_config.json").unlink()
    refused(nt / "7", "has no model_config.json")
    refused(tmp_path / "nowhere", "does not exist")
    (nt / "8").symlink_to("/etc")
    (nt / "latest.txt").write_text("8")
    refused(nt, "symbolic link out of the folder")


def test_mup_is_refused(nt):
    text = "model:\n  init_method:\n    use_mup: true\n"
    (nt / "7" / "config.yaml").write_text(text)
    refused(nt, "use_mup")


def test_a_revision_has_no_meaning(nt):
    with pytest.raises(BevatronError, match="--revision"):
        import_checkpoint(nt, nt.parent / "native", revision="main")


# --- the command ---------------------------------------------------------------------------------


def bevatron(*arguments) -> dict:
    command = [sys.executable, "-m", "bevatron", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_commands(good, tmp_path):
    native, out = tmp_path / "native", tmp_path / "out"
    assert bevatron("import", good, native, "--from", "nanotron")["family"] == "llama"
    assert bevatron("export", native, out, "--to", "nanotron")["tensors"] == 21
    assert bevatron("inspect", out)["kind"] == "nanotron"
    assert bevatron("verify", out, good, "--no-logits")["ok"] is True
