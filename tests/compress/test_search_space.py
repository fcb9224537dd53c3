"""Which shapes a search compares: against a brute force of its own counts, and published ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from typer.testing import CliRunner

from bevatron.cli.main import app
from bevatron.compress.prune_targets import PruneError, Targets, parse_share, parse_sizes
from bevatron.compress.pruned_spec import shape
from bevatron.compress.search.search_request import dry_run, outline
from bevatron.compress.search.search_space import Space, enumerate_space, grid
from bevatron.compress.verb_options import Axes, Goal, SearchOptions
from bevatron.errors import BevatronError
from bevatron.families import by_name, for_spec
from bevatron.families.published_models import preset
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.spec.count import parameter_count
from tests.compress.test_prune import random_scores
from tests.specs import HETEROGENEOUS, HOMOGENEOUS

LLAMA = by_name("llama")
SMALL = replace(HOMOGENEOUS, layers=(LayerSpec(Attention(8, 4, 8), MLP(96)),) * 4, hidden_size=64)


def space(spec: ModelSpec, axes: Axes, goal: Goal) -> Space:
    return enumerate_space(spec, LLAMA, axes, goal, random_scores(spec))


def llama_count(layers: int, hidden: int, heads: int, ffn: int) -> int:
    """Of transformers' own model of these sizes, on paper."""
    config = transformers.LlamaConfig(
        vocab_size=SMALL.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=ffn,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return sum(p.numel() for p in model.parameters())


def test_candidates_are_all_combinations_near_the_target_and_no_others():
    axes = Axes((2, 3), (4, 8), (32, 48, 64), (32, 96))
    counts = {
        sizes: llama_count(*sizes)
        for sizes in product(
            axes.num_layers, axes.hidden_size, axes.num_attention_heads, axes.intermediate_size
        )
    }
    wanted = 60_000
    near = {s for s, n in counts.items() if abs(n - wanted) <= 0.2 * wanted and s[1] % s[2] == 0}
    assert 3 < len(near) < len(counts) / 2
    found = space(SMALL, axes, Goal(wanted, 0.2, max_candidates=99))
    sizes = {
        (t.num_layers, t.hidden_size, t.num_attention_heads, t.intermediate_size): c.parameters
        for c in found.candidates
        for t in [c.targets]
    }
    assert sizes == {s: counts[s] for s in near}
    assert found.combinations == 24
    assert sum(n for _, n in found.dropped) + len(found.candidates) == 24
    assert [c.parameters for c in found.candidates] == sorted(sizes.values(), reverse=True)


def test_a_candidate_is_what_prune_makes_of_the_same_sizes():
    scores = random_scores(SMALL)
    found = enumerate_space(SMALL, LLAMA, Axes(), Goal(60_000, 0.2, multiple=8), scores)
    for c in found.candidates:
        made = shape(SMALL, c.targets, scores, LLAMA)
        assert (c.spec, c.layers, c.parameters) == (
            made.spec,
            made.layers,
            parameter_count(made.spec),
        )


def test_the_cap_keeps_the_nearest_and_says_how_many_went():
    axes = Axes((2, 3, 4), (4, 8), (32, 48, 64), (32, 64, 96))
    goal = Goal(60_000, 0.2, max_candidates=99)
    every = space(SMALL, axes, goal).candidates
    kept = space(SMALL, axes, replace(goal, max_candidates=3))
    off = sorted(abs(c.parameters - 60_000) for c in every)
    assert sorted(abs(c.parameters - 60_000) for c in kept.candidates) == off[:3]
    [(rule, count)] = [d for d in kept.dropped if "--max-candidates 3" in d[0]]
    assert count == len(every) - 3 and "nearest" in rule


def test_sizes_that_the_class_cannot_say_are_counted_with_a_reason():
    goal = Goal(110_000, 0.2, max_candidates=99)
    found = space(SMALL, Axes((4,), (8,), (60, 64), (64, 96)), goal)
    assert {c.targets.hidden_size for c in found.candidates} == {64}
    assert any("divisor of hidden_size 60" in rule for rule, _ in found.dropped)


@pytest.mark.parametrize("depth_by", ["influence", "loss", "span"])
def test_layers_go_as_prune_chooses_them(depth_by):
    scores = random_scores(SMALL)
    tensors = {**scores.tensors, "layers.loss_without": scores.block_influence[::-1].copy()}
    scores = replace(scores, tensors=tensors)
    goal = Goal(60_000, 0.3, depth_by=depth_by)
    found = enumerate_space(SMALL, LLAMA, Axes((2,), (8,), (64,), (64, 96)), goal, scores)
    targets = Targets(num_layers=2, intermediate_size=64, depth_by=depth_by)
    assert {c.layers for c in found.candidates} == {shape(SMALL, targets, scores, LLAMA).layers}


@pytest.mark.parametrize(
    ("name", "wanted", "sizes", "count"),
    [
        ("llama3.1-8b", 4_500_000_000, (32, 3072, 32, 9216), 4_512_746_496),
        ("nemotron4-15b", 8_270_000_000, (32, 4096, 48, 16384), 8_271_699_968),
        ("nemotron4-15b", 4_190_000_000, (32, 3072, 24, 9216), None),
    ],
)
def test_the_default_grid_holds_the_published_results(name, wanted, sizes, count):
    spec = preset(name)
    goal = Goal(wanted, max_candidates=999)
    found = enumerate_space(spec, for_spec(spec), Axes(), goal, None).candidates
    [same] = [
        c
        for c in found
        for t in [c.targets]
        if (t.num_layers, t.hidden_size, t.num_attention_heads, t.intermediate_size) == sizes
    ]
    assert count in (None, same.parameters) and same.layers == tuple(range(32))


def test_the_default_grid_holds_minitrons_published_space():
    """Table 9 of arXiv 2407.14679, of its 15B model."""
    spec = preset("nemotron4-15b")
    tried = {
        (t.num_layers, t.num_attention_heads, t.hidden_size, t.intermediate_size)
        for t in grid(spec, for_spec(spec), Axes(), Goal(8_000_000_000))
    }
    hidden = (2560, 3072, 3584, 4096, 4608, 5120, 5632)
    for n, a, h, ratio in product(range(29, 33), (24, 32, 48), hidden, (2.5, 3, 3.5, 4)):
        assert (n, a, h, int(h * ratio)) in tried


def test_layers_that_differ_need_scores_to_be_counted():
    goal = Goal(parameter_count(HETEROGENEOUS) * 3 // 4, 0.2, multiple=8)
    family = by_name("llama_nemotron")
    with pytest.raises(PruneError, match=r"layers differ.*--num-layers 7"):
        enumerate_space(HETEROGENEOUS, family, Axes(), goal, None)
    found = enumerate_space(HETEROGENEOUS, family, Axes((7,)), goal, None)
    assert found.candidates and all(len(c.layers) == 7 for c in found.candidates)


@pytest.mark.parametrize(
    ("axes", "goal", "said"),
    [
        (Axes(), Goal(200_000), "the model has 135,872; a search looks for smaller ones"),
        (Axes((5,)), Goal(60_000), "--num-layers is 5, expected 1 to 4"),
        (Axes(None, (6,)), Goal(60_000, 0.3), "cannot be shared out among the 4 key/value heads"),
        (Axes(None, None, (65,)), Goal(60_000), "--hidden-size is 65, expected 1 to 64"),
        (Axes(None, None, (64,), (97,)), Goal(60_000), "--intermediate-size is 97"),
        (Axes((4,), (8,), (64,), (96, 88)), Goal(50_000), "the nearest is L4-H64-A8-F88 with"),
        (Axes(), Goal(60_000, 0.0), "--within is 0%"),
        (Axes(), Goal(60_000, multiple=0), "--multiple is 0"),
        (Axes(), Goal(60_000, depth_by="luck"), "--depth-by is luck"),
    ],
)
def test_what_cannot_be_searched_is_refused(axes, goal, said):
    with pytest.raises(PruneError) as refused:
        space(SMALL, axes, goal)
    assert said in str(refused.value)


def test_a_dry_run_needs_a_config_json_alone(tmp_path):
    transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, intermediate_size=96, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    asked = SearchOptions(60_000, 0.1, multiple=8, steps=4, short=2, long_steps=0, long=1)
    found = dry_run(str(tmp_path), asked)
    assert json.loads(json.dumps(found)) == found and found["dry_run"]
    for c in found["candidates"]:
        sizes = [c[k] for k in ("num_layers", "hidden_size", "num_attention_heads")]
        assert c["parameters"] == llama_count(*sizes, c["intermediate_size"])
        assert c["losses"] == {} and (c["layers"] is None) == (c["num_layers"] < 4)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_the_command_line_says_what_it_would_try():
    words = ["search", "llama3.1-8b", "x", "--params", "4.5B", "--hidden-size", "3072,4096"]
    words += ["--within", "2.5%", "--dry-run"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"L32-H3072-A32-F9216 .* 4,512,746,496 +\+0.28%", shown.stdout)
    assert "of 96 combinations are candidates" in shown.stdout
    assert "nothing was computed or written" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert {c["hidden_size"] for c in found["candidates"]} <= {3072, 4096}
    assert all(abs(c["off"]) <= 0.025 for c in found["candidates"])


@pytest.mark.parametrize("text", ["", "a", "3072,", "0", "1e3", "-4", "3072 4096"])
def test_lists_of_sizes_are_read_strictly(text):
    with pytest.raises(PruneError, match="--hidden-size is"):
        parse_sizes("--hidden-size", text)
    with pytest.raises(PruneError, match="--within is"):
        parse_share("--within", f"{text}%%")


def test_sizes_and_shares_as_they_are_written():
    assert parse_sizes("x", "3072, 4096,3072") == (3072, 4096)
    assert parse_sizes("x", None) is None
    assert parse_share("x", "5%") == parse_share("x", "0.05") == 0.05


def test_an_outline_of_nothing_says_so(tmp_path):
    with pytest.raises(BevatronError, match=r"has no config\.json"):
        outline(str(tmp_path))
