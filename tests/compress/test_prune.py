"""Pruned models: what is kept, what is counted, and that stock transformers computes the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.native import open_native
from bevatron.compress import prune as pruning
from bevatron.compress.importance import measure
from bevatron.compress.options import parse_count, parse_layers, read_per_layer
from bevatron.compress.prune import prune
from bevatron.compress.scores import Scores, ScoresError, expected, spec_hash
from bevatron.compress.sizes import LayerTarget, PruneError, Targets
from bevatron.compress.trim import keep
from bevatron.compress.widths import shape
from bevatron.errors import BevatronError
from bevatron.families import by_name
from bevatron.families.published import preset
from bevatron.generate.load import load_decoder
from bevatron.spec import ModelSpec
from bevatron.spec.count import parameter_count
from tests.bridge.hf_folders import make
from tests.compress.calibration import write_tokens

IDS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))


def random_scores(spec: ModelSpec, seed: int = 0, **more: np.ndarray) -> Scores:
    rng = np.random.default_rng(seed)
    tensors = {n: rng.random(s, dtype=np.float32) for n, s in expected(spec).items()}
    return Scores({**tensors, **more}, {"spec": spec_hash(spec)})


def source(tmp_path: Path, maker: str = "llama", **changes) -> tuple[Path, ModelSpec, Scores]:
    """A native checkpoint, and scores for it."""
    make(tmp_path / "hf", maker, **changes)
    import_checkpoint(tmp_path / "hf", tmp_path / "native", show_progress=False)
    spec = open_native(tmp_path / "native").spec
    return tmp_path / "native", spec, random_scores(spec)


def stock(folder: Path) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), dict(model.state_dict())


def native_logits(folder: Path) -> torch.Tensor:
    decoder, _ = load_decoder(folder, dtype=torch.float32)
    with torch.no_grad():
        return decoder.logits(IDS)


def sliced(
    old: dict[str, torch.Tensor], spec: ModelSpec, scores: Scores, targets: Targets
) -> dict[str, torch.Tensor]:
    """The pruned state dict, from the names of transformers alone."""
    t = {k: torch.from_numpy(np.array(v)) for k, v in scores.tensors.items()}

    def best(values: torch.Tensor, count: int) -> torch.Tensor:
        return values.topk(count).indices.sort().values

    h = best(t["embedding.channels"], targets.hidden_size or spec.hidden_size)
    layers = [i for i in range(len(spec.layers)) if i not in targets.drop_layers]
    new = {}
    for name, whole in old.items():
        value = whole
        parts = name.split(".")
        if "layers" not in parts:
            new[name] = value[..., h] if parts[-2] != "classifier" else value
            continue
        i = int(parts[2])
        if i not in layers:
            continue
        a, m = spec.layers[i].attention, spec.layers[i].mlp
        q, groups = a.num_attention_heads, a.num_key_value_heads
        wanted = targets.num_attention_heads or q
        per_group = t[f"layers.{i}.attention.heads"].reshape(groups, -1)
        heads = torch.cat(
            [best(per_group[g], wanted // groups) + g * (q // groups) for g in range(groups)]
        )
        rows = torch.cat([torch.arange(x * a.head_dim, (x + 1) * a.head_dim) for x in heads])
        f = best(t[f"layers.{i}.mlp.neurons"], targets.intermediate_size or m.intermediate_size)
        kind, weight = parts[-2], parts[-1] == "weight"
        if kind == "q_proj":
            value = value[rows]
        if kind in ("gate_proj", "up_proj", "fc1"):
            value = value[f]
        if kind in ("o_proj", "down_proj", "fc2"):
            if weight:
                value = value[:, rows if kind == "o_proj" else f]
            value = value[h]
        elif "norm" in kind or weight:
            value = value[..., h]
        parts[2] = str(layers.index(i))
        new[".".join(parts)] = value
    return new


BOTH = Targets(hidden_size=16, intermediate_size=24, drop_layers=(1,))
CASES = {
    "width": ("llama", {}, Targets(hidden_size=24, intermediate_size=20)),
    "depth": ("llama", {}, Targets(drop_layers=(0, 2))),
    "both": ("llama", {}, BOTH),
    "tied": ("llama", {"tie_word_embeddings": True}, BOTH),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}, BOTH),
    "heads": (
        "llama",
        {"num_attention_heads": 8, "head_dim": 8},
        Targets(num_attention_heads=4, hidden_size=24),
    ),
    "heads and biases": (
        "llama",
        {"num_attention_heads": 8, "head_dim": 8, "attention_bias": True},
        Targets(num_attention_heads=2, intermediate_size=20),
    ),
    "bfloat16": ("llama", {"dtype": "bfloat16"}, BOTH),
    "nemotron": ("nemotron", {"num_attention_heads": 8}, replace(BOTH, num_attention_heads=4)),
    "nanochat": ("nanochat", {}, replace(BOTH, num_attention_heads=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_pruned_is_an_independent_slice_and_computes_the_same_in_stock_transformers(
    case: str, tmp_path: Path
) -> None:
    maker, changes, targets = CASES[case]
    native, spec, scores = source(tmp_path, maker, **changes)
    report = prune(native, tmp_path / "small", targets, scores=scores, show_progress=False)
    export_checkpoint(tmp_path / "small", tmp_path / "out", show_progress=False)
    model, found = stock(tmp_path / "out")
    old, before = stock(tmp_path / "hf")
    assert type(model) is type(old)
    wanted = sliced(before, spec, scores, targets)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    counted = sum(p.numel() for p in model.parameters())
    assert report.parameters == counted
    with torch.no_grad():
        theirs = model.float()(IDS).logits
    assert (native_logits(tmp_path / "small") - theirs).abs().max() <= 1e-5
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tmp_path / "hf" / "tokenizer.json"
    ).read_bytes()


def test_sorting_by_importance_at_full_width_changes_no_logits(tmp_path: Path, monkeypatch) -> None:
    changes = {"num_attention_heads": 8, "head_dim": 8, "attention_bias": True}
    native, spec, scores = source(tmp_path, "llama", **changes)
    ranked = keep(spec, pruning.Shape((0, 1, 2), spec), scores, ranked=True)
    assert not np.array_equal(ranked.hidden, np.arange(32))
    monkeypatch.setattr(pruning, "keep", lambda *a: ranked)
    monkeypatch.setattr(pruning, "shape", lambda *a: pruning.Shape((0, 1, 2), spec))
    prune(native, tmp_path / "sorted", Targets(), scores=scores, show_progress=False)
    one, two = native_logits(native), native_logits(tmp_path / "sorted")
    assert (one - two).abs().max() <= 1e-5
    a, b = (open_native(p).manifest.weights() for p in (native, tmp_path / "sorted"))
    assert all(a[n].chunks[0].hash != b[n].chunks[0].hash for n in a if "norm" not in n)


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


def test_a_run_or_a_hugging_face_folder_is_pruned_as_it_is(tmp_path: Path) -> None:
    native, _, scores = source(tmp_path)
    for path, name in ((native, "a"), (tmp_path / "hf", "b")):
        prune(path, tmp_path / name, BOTH, scores=scores, show_progress=False)
    a, b = (open_native(tmp_path / n).manifest.weights() for n in "ab")
    assert {n: t.chunks[0].hash for n, t in a.items()} == {
        n: t.chunks[0].hash for n, t in b.items()
    }


def test_layers_that_differ_export_as_llama_nemotron_and_load_with_its_code(tmp_path: Path) -> None:
    native, _, scores = source(tmp_path, intermediate_size=1024)
    per_layer = {0: LayerTarget(intermediate_size=300), 2: LayerTarget(no_attention=True)}
    targets = Targets(hidden_size=24, per_layer=per_layer)
    report = prune(native, tmp_path / "small", targets, scores=scores, show_progress=False)
    assert report.exports_as == "DeciLMForCausalLM"
    assert report.sizes["intermediate_size"] == [512, 1024, 1024]
    assert any("300 became 512" in note for note in report.notes)
    assert report.readers["vLLM"] == "yes"
    assert "head_dim" in report.readers["llama.cpp"]
    export_checkpoint(tmp_path / "small", tmp_path / "out", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == report.parameters
    with torch.no_grad():
        theirs = model(IDS).logits
    assert (native_logits(tmp_path / "small") - theirs).abs().max() <= 1e-5
    # a second time, from what is now a Llama-Nemotron, whose ffn_mult must follow hidden_size
    again = Targets(hidden_size=16, num_layers=2)
    small = random_scores(open_native(tmp_path / "small").spec, 3)
    prune(tmp_path / "small", tmp_path / "less", again, scores=small, show_progress=False)
    export_checkpoint(tmp_path / "less", tmp_path / "out2", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out2", trust_remote_code=True
    ).eval()
    with torch.no_grad():
        theirs = model(IDS).logits
    assert (native_logits(tmp_path / "less") - theirs).abs().max() <= 1e-5


def test_the_published_counts_follow_from_the_8b_spec() -> None:
    spec, llama = preset("llama3.1-8b"), by_name("llama")
    width = shape(spec, Targets(hidden_size=3072, intermediate_size=9216), None, llama)
    depth = shape(spec, Targets(drop_layers=tuple(range(15, 31))), None, llama)
    assert parameter_count(width.spec) == 4_512_746_496
    assert parameter_count(depth.spec) == 4_540_469_248
    assert depth.layers == (*range(15), 31)
    assert width.spec.layers[0].attention == spec.layers[0].attention


def test_a_parameter_count_is_met_by_even_widths_of_useful_multiples() -> None:
    spec = preset("llama3.1-8b")
    found = shape(spec, Targets(parameters=4_500_000_000), None, by_name("llama")).spec
    count, f = parameter_count(found), found.layers[0].mlp.intermediate_size
    assert abs(count / 4.5e9 - 1) < 0.01
    assert found.hidden_size % 64 == 0 == f % 64
    assert abs(found.hidden_size / 4096 - f / 14336) < 0.02
    fixed = Targets(parameters=4_500_000_000, hidden_size=3072)
    assert shape(spec, fixed, None, by_name("llama")).spec.layers[0].mlp.intermediate_size == 9152


def test_merging_heads_sums_outputs_or_mirrors_queries(tmp_path: Path) -> None:
    native, spec, scores = source(tmp_path, num_attention_heads=8, head_dim=8)
    targets = Targets(num_attention_heads=4)
    _, old = stock(tmp_path / "hf")
    for mode, kind in (("sum", "o_proj"), ("residual", "q_proj")):
        options = {"scores": scores, "merge_heads": mode, "show_progress": False}
        prune(native, tmp_path / mode, targets, **options)
        export_checkpoint(tmp_path / mode, tmp_path / f"{mode}-out", show_progress=False)
        _, found = stock(tmp_path / f"{mode}-out")
        plain = sliced(old, spec, scores, targets)
        assert [n for n in plain if not torch.equal(plain[n], found[n])] == [
            f"model.layers.{i}.self_attn.{kind}.weight" for i in range(3)
        ]
        name = f"model.layers.1.self_attn.{kind}.weight"
        values = scores.heads(1).reshape(2, 4)
        order = [int(i) for i in np.argsort(-values[0])]  # the first group
        slot = sorted(order[:2]).index(order[1])  # the last survivor pairs with the first that goes
        a, b = (slice(order[i] * 8, order[i] * 8 + 8) for i in (1, 2))
        own = slice(slot * 8, slot * 8 + 8)
        if mode == "sum":
            assert torch.equal(found[name][:, own], old[name][:, a] + old[name][:, b])
        else:
            assert torch.equal(found[name][own], 2 * old[name][a] - old[name][b])
    with pytest.raises(BevatronError, match="at least half"):
        few = Targets(num_attention_heads=2)
        prune(native, tmp_path / "x", few, scores=scores, merge_heads="residual")


def test_depth_goes_by_influence_loss_or_neighbours() -> None:
    spec = preset("llama3.1-8b")
    spec = replace(spec, layers=spec.layers[:5])
    more = {
        "layers.block_influence": np.array([0.9, 0.1, 0.5, 0.2, 0.3], "f4"),
        "layers.loss_without": np.array([9, 5, 3, 4, 8], "f4"),
        "spans.2.loss_without": np.array([9, 8, 7, 6], "f4"),
    }
    scores, llama = random_scores(replace(spec, hidden_size=4096), **more), by_name("llama")

    def kept(by: str, count: int = 3) -> tuple[int, ...]:
        return shape(spec, Targets(num_layers=count, depth_by=by), scores, llama).layers

    assert kept("influence") == (0, 2, 4)
    assert kept("loss") == (0, 1, 4)
    assert kept("span") == (0, 1, 2)
    assert kept("span", 2) == (0, 4)  # no losses of three: the least influence in sum


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (Targets(hidden_size=64), "--hidden-size is 64, expected 1 to 32"),
        (Targets(intermediate_size=0), "--intermediate-size is 0"),
        (Targets(num_attention_heads=3), "use 2 or 4"),
        (Targets(hidden_size=30), "multiple of|divisor of"),
        (Targets(num_layers=9), "--num-layers is 9, expected 1 to 3"),
        (Targets(drop_layers=(3,)), "layers 0 to 2"),
        (Targets(drop_layers=(0, 1, 2)), "leave at least one"),
        (Targets(drop_layers=(0,), num_layers=1), "give one of the two"),
        (Targets(per_layer={7: LayerTarget(1)}), "layer 7: does not exist"),
        (Targets(parameters=100), "no nearer than"),
        (Targets(parameters=9**9, hidden_size=8, intermediate_size=8), "nothing to choose"),
        (Targets(), "nothing to prune"),
        (Targets(num_layers=2, depth_by="loss"), "no loss without each layer"),
        (Targets(num_layers=2, depth_by="luck"), "--depth-by is luck"),
    ],
)
def test_impossible_sizes_are_refused_in_one_sentence(
    targets: Targets, says: str, llama: tuple[Path, ModelSpec, Scores], tmp_path: Path
) -> None:
    native, _, scores = llama
    with pytest.raises(PruneError, match=says):
        prune(native, tmp_path / "x", targets, scores=scores)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec, Scores]:
    return source(tmp_path_factory.mktemp("llama"))


def test_scores_of_another_model_and_none_at_all_are_refused(llama, tmp_path: Path) -> None:
    native, spec, _ = llama
    other = random_scores(replace(spec, hidden_size=16))
    other.write(tmp_path / "scores.safetensors")
    with pytest.raises(ScoresError, match="another model"):
        prune(native, tmp_path / "x", BOTH, scores=tmp_path / "scores.safetensors")
    with pytest.raises(PruneError, match="--data"):
        prune(native, tmp_path / "x", BOTH)
    with pytest.raises(PruneError, match="--data or --scores"):
        prune(native, tmp_path / "x", Targets(num_layers=1))
    assert not (tmp_path / "x").exists()


def test_importance_is_measured_first_if_text_is_given(llama, tmp_path: Path) -> None:
    native = tmp_path / "native"
    shutil.copytree(llama[0], native)
    (native / "source" / "tokenizer.json").unlink()  # no real one
    tokens = write_tokens(tmp_path / "tokens", 101, 600)
    targets = Targets(hidden_size=16, num_layers=2, depth_by="span")
    options = {"samples": 3, "show_progress": False}
    prune(native, tmp_path / "a", targets, data=tokens, **options)
    scores = measure(native, [tokens], samples=3, layers="spans", spans=(1,))
    prune(native, tmp_path / "b", targets, scores=scores, show_progress=False)
    kept = [json.loads((tmp_path / n / "pruning.json").read_text()) for n in "ab"]
    assert kept[0]["hidden"] == kept[1]["hidden"] == sorted(np.argsort(-scores.channels)[:16])
    assert kept[0]["layers"] == kept[1]["layers"]
    with pytest.raises(PruneError, match="--hidden-size is 99"):
        prune(native, tmp_path / "c", Targets(hidden_size=99), data=tmp_path / "none")


def test_damage_is_noticed_and_the_old_target_stays(tmp_path: Path) -> None:
    native, _, scores = source(tmp_path)
    prune(native, tmp_path / "small", BOTH, scores=scores, show_progress=False)
    before = (tmp_path / "small" / "manifest.json").read_bytes()
    with pytest.raises(BevatronError, match="already exists"):
        prune(native, tmp_path / "small", BOTH, scores=scores)
    weights = next((native / "model").iterdir())
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(BevatronError, match="damaged"):
        prune(native, tmp_path / "small", BOTH, scores=scores, overwrite=True, show_progress=False)
    assert (tmp_path / "small" / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


def test_the_command_says_all_and_a_dry_run_writes_nothing(llama, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bevatron.cli.main import app

    native, _, scores = llama
    scores.write(tmp_path / "s.safetensors")
    command = ["prune", str(native), str(tmp_path / "small"), "--scores"]
    command += [str(tmp_path / "s.safetensors"), "--hidden-size", "16", "--drop-layers", "1"]
    seen = CliRunner().invoke(app, [*command, "--dry-run", "--json"], catch_exceptions=False)
    assert not (tmp_path / "small").exists()
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    seen, done = json.loads(seen.stdout), json.loads(done.stdout)
    assert seen.pop("dry_run") and not done.pop("dry_run")
    assert (
        seen["parameters"]
        == done["parameters"]
        == parameter_count(open_native(tmp_path / "small").spec)
    )
    assert done["dropped_layers"] == [1]
    assert done["readers"]["vLLM"] == "yes"
    assert done["verified"]["equal"]


def test_options_are_read_strictly(tmp_path: Path) -> None:
    assert parse_count("4.5B") == 4_500_000_000
    assert parse_count("4512746496") == 4_512_746_496
    assert parse_layers("3,16-18") == (3, 16, 17, 18)
    for call, text in ((parse_count, "many"), (parse_count, "0"), (parse_layers, "5-3")):
        with pytest.raises(PruneError):
            call(text)
    path = tmp_path / "sizes.json"
    path.write_text('{"0-1": {"intermediate_size": 256}, "2": {"attention": "no-op"}}')
    assert read_per_layer(path) == {
        0: LayerTarget(256),
        1: LayerTarget(256),
        2: LayerTarget(no_attention=True),
    }
    path.write_text('{"0": {"width": 256}}')
    with pytest.raises(PruneError, match="width is unknown"):
        read_per_layer(path)
