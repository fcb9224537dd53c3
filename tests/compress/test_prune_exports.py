"""What is pruned computes the same here and, exported, in transformers: all families, all sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.cli.main import app
from bevatron.compress import prune as pruning
from bevatron.compress.kept_indices import keep
from bevatron.compress.prune import prune
from bevatron.compress.prune_targets import LayerTarget, Targets
from bevatron.errors import BevatronError
from bevatron.parallel.whole_decoder import load_decoder
from tests.compress.pruned import BOTH, IDS, native_logits, random_scores, sliced, source, stock

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BIASED = {"attention_bias": True, "mlp_bias": True}
MODELS = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"num_attention_heads": 8, "rope_parameters": LLAMA3}),
    "llama 3, tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama, biased": ("llama", BIASED),
    "llama, biased and tied": ("llama", {**BIASED, "tie_word_embeddings": True}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, bfloat16": ("llama", {"dtype": "bfloat16"}),
    "mistral": ("mistral", {"num_attention_heads": 8, "head_dim": 8}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True}),
    "nanochat": ("nanochat", {"num_key_value_heads": 4}),
    "nanochat, GQA, biased": ("nanochat", {"attention_bias": True}),
    "nanochat, tied": ("nanochat", {"tie_word_embeddings": True}),
    "nemotron": ("nemotron", {"num_attention_heads": 8}),
    "nemotron, biased": ("nemotron", BIASED),
    "nemotron, tied": ("nemotron", {"tie_word_embeddings": True}),
}
SIZES = {
    "width": Targets(hidden_size=24, intermediate_size=20),
    "depth": Targets(drop_layers=(0, 2)),
    "width, depth and heads": replace(BOTH, num_attention_heads=1),
}


def sizes_for(model: str, size: str) -> Targets:
    """Half of the query heads, where heads go and groups have several."""
    changes = MODELS[model][1]
    heads, groups = changes.get("num_attention_heads", 4), changes.get("num_key_value_heads", 2)
    targets = SIZES[size]
    if targets.num_attention_heads is None:
        return targets
    return replace(targets, num_attention_heads=max(heads // 2, groups))


def cells() -> Iterator[Any]:
    """All sizes together for every model, and each alone for one of every class."""
    alone = ("llama 3", "mistral", "nanochat, GQA, biased", "nemotron, biased")
    for model in MODELS:
        for size in SIZES:
            fast = size == "width, depth and heads" or model in alone
            yield pytest.param(model, size, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("model", "size"), [*cells()])
def test_what_is_pruned_is_an_independent_slice_and_computes_the_same_in_stock_transformers(
    model: str, size: str, tmp_path: Path
) -> None:
    maker, changes = MODELS[model]
    targets = sizes_for(model, size)
    native, spec, scores = source(tmp_path, maker, **changes)
    report = prune(native, tmp_path / "small", targets, scores=scores, show_progress=False)
    export_checkpoint(tmp_path / "small", tmp_path / "out", show_progress=False)
    new, found = stock(tmp_path / "out")
    old, before = stock(tmp_path / "hf")
    assert type(new) is type(old)
    wanted = sliced(before, spec, scores, targets)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert report.exports_as == type(old).__name__
    assert report.parameters == sum(p.numel() for p in new.parameters())
    with torch.no_grad():
        theirs = new.float()(IDS).logits
        assert theirs.std() > 0.01
    assert (native_logits(tmp_path / "small") - theirs).abs().max() <= 1e-5
    same = [tmp_path / folder / "tokenizer.json" for folder in ("out", "hf")]
    assert same[0].read_bytes() == same[1].read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_sorting_by_importance_at_full_width_changes_no_logits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last is the most important, so all come in the opposite order; by way of what prunes."""
    maker, changes = MODELS[model]
    native, spec, scores = source(tmp_path, maker, **changes)
    rising = {n: np.arange(t.size, dtype=np.float32) for n, t in scores.tensors.items()}
    scores, whole = replace(scores, tensors=rising), pruning.Shape((0, 1, 2), spec)
    ranked = keep(spec, whole, scores, ranked=True)
    monkeypatch.setattr(pruning, "keep", lambda *args: ranked)
    monkeypatch.setattr(pruning, "shape", lambda *args: whole)
    prune(native, tmp_path / "sorted", Targets(), scores=scores, show_progress=False)
    one, two = native_logits(native), native_logits(tmp_path / "sorted")
    assert one.std() > 0.01
    assert (one - two).abs().max() <= 1e-5
    a, b = (open_native(p).manifest.weights() for p in (native, tmp_path / "sorted"))
    moved = {n for n in a if a[n].chunks[0].hash != b[n].chunks[0].hash}
    still = {n for n in a if n.endswith("norm.weight") or "norm.bias" in n}  # may be all alike
    if spec.layers[0].attention.queries_per_group == 1:
        still |= {n for n in a if n.endswith("qkv.bias")}
    assert moved >= a.keys() - still


def test_the_head_of_a_classifier_loses_the_channels_that_go(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 101, "intermediate_size": 48, "num_hidden_layers": 3, "num_labels": 3}
    config = transformers.LlamaConfig(**sizes, pad_token_id=0)
    torch.manual_seed(0)
    old = transformers.LlamaForSequenceClassification(config)
    old.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "native", show_progress=False)
    scores = random_scores(open_native(tmp_path / "native").spec)
    prune(tmp_path / "native", tmp_path / "small", BOTH, scores=scores, show_progress=False)
    export_checkpoint(tmp_path / "small", tmp_path / "out", show_progress=False)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "out").eval()
    wanted = sliced(old.state_dict(), open_native(tmp_path / "native").spec, scores, BOTH)
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


WIDE = {"intermediate_size": 1024, "eos_token_id": None, "initializer_range": 0.2}
PARTS = {0: LayerTarget(intermediate_size=300), 2: LayerTarget(no_attention=True)}
PER_LAYER = {
    "width": ("llama", {}, Targets(hidden_size=24, per_layer=PARTS)),
    "depth and no MLP": (
        "llama",
        {"rope_parameters": LLAMA3, "num_attention_heads": 8, "num_hidden_layers": 4},
        Targets(drop_layers=(1,), per_layer={**PARTS, 3: LayerTarget(512, no_mlp=True)}),
    ),
    "heads, biased and tied": (
        "llama",
        {**BIASED, "tie_word_embeddings": True, "num_attention_heads": 8},
        Targets(num_attention_heads=4, per_layer={1: LayerTarget(256)}),
    ),
    "mistral": ("mistral", {"head_dim": 16}, Targets(hidden_size=20, per_layer=PARTS)),
}
# What a user of transformers types, in processes that know nothing else of this project: one after
# the import, one with the code that the export carries (which transformers passes over for a class
# that it knows).
READ = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
way, root, prompt, ids = json.loads(sys.argv[1])
if way == "import":
    import bevatron.hf
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(
        f"{root}/{name}/out", trust_remote_code=way == "carried"
    ).eval()
    module = type(model).__module__
    assert module.endswith(".modeling_decilm" if way == "carried" else "bevatron.hf"), module
    with torch.no_grad():
        torch.save(model(torch.tensor(ids)).logits, f"{root}/{name}/{way}.pt")
    given = torch.tensor([prompt])
    out = model.generate(given, max_new_tokens=12, do_sample=False, pad_token_id=0)
    tokens = out[0, len(prompt):].tolist()
    print(json.dumps([sum(p.numel() for p in model.parameters()), tokens]))
"""


def test_layers_that_differ_export_as_llama_nemotron_that_both_readers_compute_the_same(
    tmp_path: Path,
) -> None:
    """`import bevatron.hf`, and the code that the export carries."""
    reports = {}
    for name, (maker, changes, targets) in PER_LAYER.items():
        folder = tmp_path / name
        native, _, scores = source(folder, maker, **WIDE, **changes)
        add_words(native / "source")
        report = prune(native, folder / "small", targets, scores=scores, show_progress=False)
        assert report.exports_as == "DeciLMForCausalLM"
        export_checkpoint(folder / "small", folder / "out", show_progress=False)
        reports[name] = report
    prompt = [7, 11, 5, 40]
    said = {}
    for way in ("import", "carried"):
        given = json.dumps([way, str(tmp_path), prompt, IDS.tolist()])
        line = [sys.executable, "-c", READ, given, *PER_LAYER]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0, done.stderr
        said[way] = [json.loads(answer) for answer in done.stdout.splitlines()]
    for i, name in enumerate(PER_LAYER):
        folder = tmp_path / name
        ours = native_logits(folder / "small")
        assert ours.std() > 0.1
        path = str(folder / "small")
        words = " ".join(f"w{i}" for i in prompt)
        more = ("--max-new-tokens", "12", "--json")
        command = ["generate", path, "--prompt", words, *more]
        answer = CliRunner().invoke(app, command, catch_exceptions=False).stdout
        tokens = json.loads(answer)["tokens"]
        assert len(set(tokens)) > 3
        for way, answers in said.items():
            assert answers[i] == [reports[name].parameters, tokens]
            assert (ours - torch.load(folder / f"{way}.pt")).abs().max() <= 1e-5


def add_words(folder: Path) -> None:
    """A tokenizer of the words w0 to w100."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_llama_nemotron_is_pruned_again_and_its_widths_follow_hidden_size(tmp_path: Path) -> None:
    native, _, scores = source(tmp_path, intermediate_size=1024)
    targets = Targets(hidden_size=24, per_layer=PARTS)
    report = prune(native, tmp_path / "small", targets, scores=scores, show_progress=False)
    assert report.sizes["intermediate_size"] == [512, 1024, 1024]
    assert any("300 became 512" in note for note in report.notes)
    assert report.readers["vLLM"] == "yes"
    assert "head_dim" in report.readers["llama.cpp"]
    again = Targets(hidden_size=16, num_layers=2)
    small = random_scores(open_native(tmp_path / "small").spec, 3)
    prune(tmp_path / "small", tmp_path / "less", again, scores=small, show_progress=False)
    export_checkpoint(tmp_path / "less", tmp_path / "out", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    with torch.no_grad():
        theirs = model(IDS).logits
    assert (native_logits(tmp_path / "less") - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("changes", [{}, {**BIASED, "dtype": "bfloat16"}], ids=["", "biased"])
def test_one_layers_width_leaves_all_others_as_they_are(tmp_path: Path, changes: dict) -> None:
    """704 is no multiple of 256, which an export of differing layers has: zeros fill it up."""
    native, spec, scores = source(tmp_path, intermediate_size=704, **changes)
    targets = Targets(per_layer={1: LayerTarget(intermediate_size=256)})
    report = prune(native, tmp_path / "small", targets, scores=scores, show_progress=False)
    assert report.sizes["intermediate_size"] == [768, 256, 768]
    assert "layers 0, 2: intermediate_size 704 became 768, 64 of them zeros" in report.notes
    old, _ = load_decoder(native, dtype=torch.float32)
    new, _ = load_decoder(tmp_path / "small", dtype=torch.float32)
    for i, (a, b) in enumerate(zip(old.layers.values(), new.layers.values(), strict=True)):
        if i == 1:
            continue
        gate_up, down = b.mlp.gate_up.weight, b.mlp.down.weight
        assert torch.equal(gate_up.view(2, 768, -1)[:, :704], a.mlp.gate_up.weight.view(2, 704, -1))
        assert torch.equal(down[:, :704], a.mlp.down.weight)
        assert not gate_up.view(2, 768, -1)[:, 704:].any() and not down[:, 704:].any()
    x = torch.randn(1, 5, spec.hidden_size)
    with torch.no_grad():
        assert (old.layers["0"].mlp(x, {}) - new.layers["0"].mlp(x, {})).abs().max() <= 1e-6
    export_checkpoint(tmp_path / "small", tmp_path / "out", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert (native_logits(tmp_path / "small") - model(IDS).logits).abs().max() <= 1e-5


def test_a_sublayer_that_goes_needs_no_scores_whatever_the_widths(tmp_path: Path) -> None:
    native, _, _ = source(tmp_path, intermediate_size=704)
    targets = Targets(per_layer={1: LayerTarget(no_attention=True)})
    report = prune(native, tmp_path / "small", targets, show_progress=False)
    assert report.sizes["intermediate_size"] == 768
    record = json.loads((tmp_path / "small" / "pruning.json").read_text())
    assert record["neurons"][0] == [*range(704), *[-1] * 64]


@pytest.mark.parametrize(
    ("maker", "per_layer", "why"),
    [
        ("llama", {0: LayerTarget(num_attention_heads=2)}, "num_attention_heads"),
        ("nemotron", {0: LayerTarget(20)}, "layers"),
        ("nanochat", {1: LayerTarget(no_attention=True)}, "layers"),
    ],
)
def test_a_result_that_no_class_can_say_is_said_and_still_computes(
    maker: str, per_layer: dict[int, LayerTarget], why: str, tmp_path: Path
) -> None:
    native, _, scores = source(tmp_path, maker)
    targets = Targets(per_layer=per_layer)
    report = prune(native, tmp_path / "small", targets, scores=scores, show_progress=False)
    assert report.exports_as is None
    assert report.readers == {}
    assert any("no class of transformers" in note and why in note for note in report.notes)
    assert native_logits(tmp_path / "small").isfinite().all()
    with pytest.raises(BevatronError, match=why):
        export_checkpoint(tmp_path / "small", tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out").exists()
