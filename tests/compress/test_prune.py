"""Pruned models: what is kept, what is counted, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bevatron.bridge.assemble import AssemblyError
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.compress import prune as pruning
from bevatron.compress.importance import measure
from bevatron.compress.importance_scores import Scores, ScoresError
from bevatron.compress.prune import prune
from bevatron.compress.prune_targets import (
    LayerTarget,
    PruneError,
    Targets,
    parse_count,
    parse_layers,
    read_per_layer,
)
from bevatron.compress.pruned_spec import shape
from bevatron.errors import BevatronError
from bevatron.families import by_name
from bevatron.families.published_models import preset
from bevatron.spec import ModelSpec
from bevatron.spec.count import parameter_count
from tests.bridge.hf_folders import make, rewrite
from tests.compress.calibration import write_tokens
from tests.compress.pruned import BOTH, random_scores, sliced, source, stock
from tests.faults.refusal import command


def test_a_run_or_a_hugging_face_folder_is_pruned_as_it_is(tmp_path: Path) -> None:
    native, _, scores = source(tmp_path)
    for path, name in ((native, "a"), (tmp_path / "hf", "b")):
        prune(path, tmp_path / name, BOTH, scores=scores, show_progress=False)
    a, b = (open_native(tmp_path / n).manifest.weights() for n in "ab")
    assert {n: t.chunks[0].hash for n, t in a.items()} == {
        n: t.chunks[0].hash for n, t in b.items()
    }


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
    looked = prune(native, tmp_path / "small", BOTH, scores=scores, dry_run=True)
    assert looked.dry_run and "without --dry-run this needs --overwrite" in looked.notes[-1]
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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_no_numbers_are_refused_if_they_would_stay(
    dtype: str, value: float, tmp_path: Path
) -> None:
    make(tmp_path / "hf", dtype=dtype)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][47, 31] = value

    rewrite(tmp_path / "hf", spoil)
    import_checkpoint(tmp_path / "hf", tmp_path / "native", show_progress=False)
    scores = random_scores(open_native(tmp_path / "native").spec)
    scores.tensors["embedding.channels"][31] = 2
    scores.tensors["layers.1.mlp.neurons"][47] = 2
    targets = Targets(hidden_size=16, intermediate_size=24)
    with pytest.raises(
        AssemblyError, match=r"native: layers\.1\.mlp\.gate_up\.weight holds 1 NaN or"
    ):
        prune(tmp_path / "native", tmp_path / "x", targets, scores=scores, show_progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "native"]
    scores.tensors["layers.1.mlp.neurons"][47] = -1  # it goes
    prune(tmp_path / "native", tmp_path / "x", targets, scores=scores, show_progress=False)
    (tmp_path / "native" / "source" / "tokenizer.json").unlink()
    tokens = write_tokens(tmp_path / "tokens", 101, 600)
    with pytest.raises(
        ScoresError, match=r"native: .* holds a number that is not finite; look for"
    ):
        measure(tmp_path / "native", [tokens], samples=3)


def test_scores_of_other_weights_of_the_same_shape_are_said(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", 101, 600)
    make(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    import_checkpoint(tmp_path / "hf", tmp_path / "native", show_progress=False)
    shutil.copytree(tmp_path / "hf", tmp_path / "trained")
    rewrite(tmp_path / "trained", lambda t: t["model.layers.2.mlp.down_proj.weight"].add_(1e-4))
    measure(tmp_path / "hf", [tokens], samples=3).write(tmp_path / "scores")
    notes = {}
    for name in ("hf", "native", "trained"):
        options = {"scores": tmp_path / "scores", "dry_run": True}
        report = prune(tmp_path / name, tmp_path / "x", BOTH, **options)
        notes[name] = [note for note in report.notes if "scores" in note]
    said = f"the scores were measured on other weights of the same shape, {tmp_path / 'hf'}"
    assert notes == {"hf": [], "native": [], "trained": [said]}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


FAULTS = {
    "no scores there": ("scores", lambda path: path.unlink(), "does not exist|No such file"),
    "scores cut short": ("scores", lambda path: path.write_bytes(path.read_bytes()[:-9]), ""),
    "a bit of the scores": ("scores", flip, "damaged"),
    "no scores at all": ("scores", lambda path: path.write_text("{}"), ""),
    "no sizes there": ("sizes", lambda path: path.unlink(), "does not exist|No such file"),
    "sizes cut short": ("sizes", lambda path: path.write_text('{"0": {'), ""),
    "sizes of another kind": ("sizes", lambda path: path.write_text("[1]"), ""),
    "no weights": ("native", lambda path: next((path / "model").iterdir()).unlink(), ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing(llama, tmp_path: Path, fault: str) -> None:
    what, spoil, says = FAULTS[fault]
    native = Path(shutil.copytree(llama[0], tmp_path / "native"))
    files = {"native": native, "scores": tmp_path / "scores", "sizes": tmp_path / "sizes.json"}
    llama[2].write(files["scores"])
    files["sizes"].write_text('{"0": {"intermediate_size": 24}}')
    spoil(files[what])
    before = sorted(tmp_path.iterdir())
    options = ("--scores", files["scores"], "--per-layer", files["sizes"], "--hidden-size", "16")
    status, stdout, stderr = command("prune", native, tmp_path / "x", *options)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "unexpected" not in stderr and str(files[what]) in stderr
    assert re.search(says, stderr)
    assert sorted(tmp_path.iterdir()) == before


def test_a_source_that_changed_since_it_was_measured_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the weights are read, see tests/faults; here before the first of them is."""
    native, _, _ = source(tmp_path)
    (native / "source" / "tokenizer.json").unlink()
    tokens = write_tokens(tmp_path / "tokens", 101, 600)
    weights = next((native / "model").iterdir())

    def measured(*args: object) -> Scores:
        scores = random_scores(open_native(native).spec)
        weights.write_bytes(weights.read_bytes())
        return scores

    monkeypatch.setattr(pruning, "_measured", measured)
    with pytest.raises(BevatronError, match=rf"{weights.name}: changed while it was being read"):
        prune(native, tmp_path / "x", BOTH, data=tokens, show_progress=False)
    assert not (tmp_path / "x").exists()
