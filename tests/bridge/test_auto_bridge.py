"""AutoBridge, as users of Megatron-Bridge call it: one process, gloo ranks, and torchrun itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bevatron import AutoBridge
from bevatron.errors import BevatronError
from bevatron.families import for_spec
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import MLP, Attention, LayerSpec, Linear, ModelSpec
from tests.bridge import bridge_ranks as ranks
from tests.bridge.hf_folders import (
    add_others,
    assert_same_folder,
    edit_config,
    llama,
    make,
    rewrite,
)
from tests.bridge.test_heads import save
from tests.processes import Pool

REPOSITORY = Path(__file__).resolve().parents[2]
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, {**TP2, "sequence_parallel": True}),
    "pp2": (2, PP2),
    "fsdp2": (2, {}),
    "tp2-pp2": (4, {**TP2, **PP2}),
}
HETEROGENEOUS = ModelSpec(
    101,
    32,
    (
        LayerSpec(Attention(4, 1, 8), MLP(256)),
        LayerSpec(Linear(), None),
        LayerSpec(None, MLP(512)),
        LayerSpec(None, None),
        LayerSpec(Attention(4, 4, 8), Linear()),
    ),
)


def from_spec(folder: Path, spec: ModelSpec, dtype: torch.dtype) -> Path:
    """An HF folder with random weights, written by safetensors itself."""
    folder.mkdir()
    family = for_spec(spec)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        source.name: torch.randn(source.shape, generator=generator).mul_(0.1).to(dtype)
        for entry in family.weight_map(spec)
        for source in entry.sources
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = family.config(spec, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config))
    add_others(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("bridge")
    return {
        "llama": make(work / "llama", "llama", "float32", shard="20KB"),
        "tied": make(work / "tied", "llama", "bfloat16", tie_word_embeddings=True),
        "heterogeneous": from_spec(work / "heterogeneous", HETEROGENEOUS, torch.bfloat16),
    }


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def expected_logits(folder: Path, name: str) -> torch.Tensor:
    """By transformers; of a heterogeneous model by one process."""
    with torch.no_grad():
        if name == "heterogeneous":
            return load_decoder(folder)[0].logits(ranks.IDS)
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(folder, dtype=torch.float32)(ranks.IDS).logits


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, "llama") for layout in LAYOUTS]
    + [(x, "heterogeneous") for x in ("tp2", "pp2", "fsdp2")]
    + [("pp2", "tied"), ("tp2", "tied")],
)
def test_a_model_goes_in_computes_and_comes_back_byte_for_byte(
    pool: Pool, folders: dict[str, Path], tmp_path: Path, layout: str, name: str
) -> None:
    """Logits on every rank; every tensor bit-equal on every rank; the folder as it was."""
    world, fields = LAYOUTS[layout]
    hf, out = folders[name], tmp_path / "out"
    found = pool.run(world, ranks.round_trip, hf, out, fields)
    reference = stored(hf)
    expected = expected_logits(hf, name).float().numpy()
    # fp32 differs by the order of sums alone; bf16 has 8 bits of mantissa.
    tolerance = 1e-5 if name == "llama" else 3e-2
    for logits, weights in found:
        assert np.abs(logits - expected).max() < tolerance
        assert weights.keys() == reference.keys()
        for key, (dtype, data) in weights.items():
            tensor = reference[key]
            assert dtype == str(tensor.dtype)
            assert data == tensor.flatten().view(torch.uint8).numpy().tobytes(), key
    assert_same_folder(hf, out)
    assert not [p for p in tmp_path.iterdir() if p.name != "out"], "nothing else is left"


@pytest.mark.parametrize("fields", [TP2, PP2, {}], ids=["tp2", "pp2", "fsdp2"])
def test_each_rank_reads_its_own_half_of_the_weights(
    pool: Pool, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """Wide rows, so that a rank's part of one is worth a read of its own (see boxes.DIRECT)."""
    hf = make(tmp_path / "wide", intermediate_size=32768, num_hidden_layers=2, hidden_size=64)
    whole = sum(p.stat().st_size for p in hf.glob("*.safetensors"))
    alone = pool.run(1, ranks.bytes_read, hf, {})[0]
    assert 0.99 * whole < alone < 1.01 * whole
    for read in pool.run(2, ranks.bytes_read, hf, fields):
        assert read < 0.51 * whole


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "fsdp2"])
def test_plain_torch_trains_it_alike_at_every_layout(
    pool: Pool, folders: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    """fp32: only the order of sums may differ. What is saved is what was trained."""
    expected = pool.run(1, ranks.plain_training, folders["llama"], tmp_path / "one", {})[0]
    assert expected[2] != expected[0]
    world, fields = LAYOUTS[layout]
    for losses in pool.run(world, ranks.plain_training, folders["llama"], tmp_path / "two", fields):
        assert losses == pytest.approx(expected, rel=1e-5)
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    original = stored(folders["llama"])
    for name, tensor in one.items():
        assert not torch.equal(tensor, original[name]), name
        assert torch.allclose(tensor, two[name], atol=1e-4), name
    assert (tmp_path / "two" / "bevatron.json").is_file(), "it is no longer the source"
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "two" / name).read_bytes() == (folders["llama"] / name).read_bytes()


HEADS = ["LlamaForSequenceClassification", "NemotronForTokenClassification"]
HEADS += ["MistralForQuestionAnswering", "NanoChatModel"]


@pytest.mark.parametrize("layout", ["one", "tp2", "tp2-sp", "pp2", "fsdp2"])
def test_other_heads_are_computed_and_saved_at_every_layout(
    pool: Pool, tmp_path: Path, layout: str
) -> None:
    world, fields = LAYOUTS[layout]
    for name in HEADS:
        hf = save(name, tmp_path / name)
        model = getattr(transformers, name).from_pretrained(hf, dtype=torch.bfloat16)
        with torch.no_grad():
            out = model(input_ids=ranks.IDS)
        if "start_logits" in out:
            expected = torch.stack((out.start_logits, out.end_logits), -1)
        else:
            expected = out.logits if "logits" in out else out.last_hidden_state
        target = tmp_path / f"{name}-out"
        for logits, weights in pool.run(world, ranks.round_trip, hf, target, fields):
            assert np.abs(logits - expected.float().numpy()).max() < 3e-2  # bf16
            assert weights.keys() == stored(hf).keys()
        assert_same_folder(hf, target)


def test_a_native_checkpoint_of_one_layout_loads_at_another(
    pool: Pool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """And says the same as an import: it exports to the source's bytes."""
    native = tmp_path / "native"
    load = {"tensor_model_parallel_size": 1, **PP2}
    assert all(pool.run(2, ranks.native_round_trip, folders["llama"], native, TP2, load))
    AutoBridge.export_ckpt(native, tmp_path / "out")
    assert_same_folder(folders["llama"], tmp_path / "out")
    assert pool.run(2, ranks.layout_of_loaded, folders["llama"], native) == [(2, 1)] * 2


def test_random_weights_are_the_same_at_every_layout(pool: Pool) -> None:
    config = json.loads(llama().config.to_json_string())
    fields = {"num_layers": 2, "ffn_hidden_size": 56, "num_query_groups": 4}
    expected = pool.run(1, ranks.random_tensors, config, fields)[0]
    assert len(expected["model.layers.1.mlp.up_proj.weight"]) == 56 * 32 * 4
    assert len(expected["model.layers.1.self_attn.k_proj.weight"]) == 32 * 32 * 4
    assert "model.layers.2.input_layernorm.weight" not in expected
    for found in pool.run(2, ranks.random_tensors, config, {**fields, **TP2}):
        assert found == expected


def test_what_fails_on_one_rank_stops_all_with_its_message(
    pool: Pool, folders: dict[str, Path], tmp_path: Path
) -> None:
    hf, damaged = folders["llama"], tmp_path / "damaged"
    shutil.copytree(hf, damaged)
    shard = sorted(damaged.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    said = pool.run(2, ranks.load_from, hf, [hf, damaged])
    assert said[0] == said[1]
    assert str(shard) in said[0]
    (tmp_path / "there").mkdir()
    said = pool.run(2, ranks.save_over, hf, tmp_path / "there")
    assert said[0] == said[1]
    assert "already exists" in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "there"]


def test_a_pipeline_carries_no_gradients_and_says_so(pool: Pool, folders: dict[str, Path]) -> None:
    for said in pool.run(2, ranks.pipeline_with_gradients, folders["llama"]):
        assert "torch.no_grad()" in said


def test_a_tied_head_that_differs_is_refused_as_an_import_does(
    pool: Pool, folders: dict[str, Path], tmp_path: Path
) -> None:
    hf = tmp_path / "untied"
    shutil.copytree(folders["tied"], hf)
    rewrite(hf, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    for said in pool.run(2, ranks.load_from, folders["tied"], [hf, hf]):
        assert "their values differ" in said


def test_dtype_tasks_masks_and_positions(
    pool: Pool, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = pool.run(1, ranks.in_one_process, folders["llama"], tmp_path)[0]
    assert found["computes in"] == "torch.float16"
    assert found["exports"] == {"torch.float16"}
    assert found["files"] == ["model.safetensors"]
    prefix = "model.layers.0.self_attn."
    assert found["task"] == {p: f"{prefix}{p}_proj.weight" for p in "qkv"}
    assert found["some"] == [*found["task"].values()]
    assert "without padding" in found["mask"]
    assert found["positions"] and not found["shifted"]
    assert "num_layers was changed" in found["smaller"]


def test_whole_checkpoints_need_no_model(folders: dict[str, Path], tmp_path: Path) -> None:
    hf, native = folders["llama"], tmp_path / "native"
    AutoBridge.import_ckpt(hf_model_id=hf, megatron_path=native)
    bridge = AutoBridge.from_hf_pretrained(hf, trust_remote_code=True)
    bridge.export_ckpt(megatron_path=native, hf_path=tmp_path / "a", show_progress=False)
    AutoBridge.export_ckpt(native, tmp_path / "b")
    for out in ("a", "b"):
        assert_same_folder(hf, tmp_path / out)
    AutoBridge.import_ckpt(str(hf), str(tmp_path / "bf16"), torch_dtype=torch.bfloat16)
    AutoBridge.export_ckpt(tmp_path / "bf16", tmp_path / "rounded")
    for name, tensor in stored(tmp_path / "rounded").items():
        assert torch.equal(tensor, stored(hf)[name].to(torch.bfloat16))
    assert AutoBridge.from_checkpoint(native).transformer_config.num_layers == 3
    with pytest.raises(BevatronError, match="overwrite=True"):
        AutoBridge.import_ckpt(hf, native)
    AutoBridge.import_ckpt(hf, native, overwrite=True)


def test_what_is_supported_is_known_from_config_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    assert AutoBridge.list_supported_models() == sorted(AutoBridge.list_supported_models())
    assert {"LlamaForCausalLM", "DeciLMForCausalLM"} <= set(AutoBridge.list_supported_models())
    assert AutoBridge.can_handle(folders["heterogeneous"], trust_remote_code=True)
    assert not AutoBridge.can_handle(tmp_path / "missing")
    assert AutoBridge.supports(transformers.LlamaConfig())
    assert not AutoBridge.supports(transformers.GPT2Config())
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folders["llama"] / "config.json", other)
    edit_config(other, sliding_window=12)
    assert not AutoBridge.can_handle(other), "a field that changes the numbers"
    with pytest.raises(BevatronError, match=f"{other}.*sliding_window"):
        AutoBridge.from_hf_pretrained(other)


def test_a_provider_takes_what_it_knows_and_refuses_the_rest(folders: dict[str, Path]) -> None:
    provider = AutoBridge.from_hf_pretrained(folders["llama"]).to_provider()
    read = (provider.num_layers, provider.hidden_size, provider.ffn_hidden_size)
    read += (provider.num_attention_heads, provider.num_query_groups, provider.kv_channels)
    assert read == (3, 32, 48, 4, 2, 8)
    assert (provider.vocab_size, provider.seq_length) == (101, 64)
    assert provider.params_dtype == torch.float32 and not provider.bf16
    provider.pipeline_dtype = torch.bfloat16
    provider.bias_dropout_fusion = True
    provider.expert_model_parallel_size = 1
    provider.virtual_pipeline_model_parallel_size = None
    provider.num_attention_heads = 6  # does not go with 2 groups of ... until the next line
    provider.num_query_groups = 3
    assert provider.spec.layers[2].attention == Attention(6, 3, 8)
    with pytest.raises(BevatronError, match="context_parallel_size is 2, but only 1"):
        provider.context_parallel_size = 2
    with pytest.raises(AttributeError, match="did you mean tensor_model_parallel_size"):
        provider.tensor_model_paralel_size = 2
    with pytest.raises(TypeError, match="load_in_8bit"):
        AutoBridge.from_hf_pretrained(folders["llama"], load_in_8bit=True)
    provider.tensor_model_parallel_size = 2
    with pytest.raises(BevatronError, match="1 processes cannot be divided"):
        provider.finalize()
    uneven = AutoBridge.from_hf_pretrained(folders["heterogeneous"]).to_provider()
    assert (uneven.num_layers, uneven.hidden_size) == (5, 32)
    with pytest.raises(BevatronError, match=r"not all alike.*provider\.spec"):
        _ = uneven.num_attention_heads
    uneven.num_layers = 2
    with pytest.raises(BevatronError, match="not all alike"):
        uneven.finalize()


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


@pytest.fixture
def hub(tmp_path: Path, folders: dict[str, Path]) -> Path:
    """A working folder in which the id that the documents use is a path."""
    shutil.copytree(folders["tied"], tmp_path / "meta-llama" / "Llama-3.2-1B")
    return tmp_path


def snippets() -> dict[str, str]:
    """The Python of docs/autobridge.md by the comment on its first line."""
    text = (REPOSITORY / "docs" / "autobridge.md").read_text()
    blocks = re.findall(r"```python\n# (.*?)\n(.*?)```", text, re.DOTALL)
    return dict(blocks)


def test_every_documented_snippet_runs_as_it_stands(hub: Path) -> None:
    script = "\n".join(code for name, code in snippets().items() if name != "two.py")
    ran = python(hub, "-c", f"{script}\n{script}")  # whoever follows a page runs some of it again
    assert ran.returncode == 0, ran.stderr
    assert_same_folder(hub / "meta-llama/Llama-3.2-1B", hub / "hf_exports/llama32_1b")


def test_the_documented_script_runs_under_torchrun(hub: Path) -> None:
    (hub / "two.py").write_text(snippets()["two.py"])
    ran = python(hub, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                 "two.py")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert_same_folder(hub / "meta-llama/Llama-3.2-1B", hub / "hf_exports/tp2")
    assert (hub / "megatron_checkpoints/llama32_1b/manifest.json").is_file()


def test_importing_the_package_loads_nothing(tmp_path: Path) -> None:
    script = "import sys, bevatron; assert not {'torch', 'numpy'} & set(sys.modules);"
    script += "from bevatron import AutoBridge; assert 'torch' not in sys.modules"
    ran = python(tmp_path, "-c", script)
    assert ran.returncode == 0, ran.stderr
