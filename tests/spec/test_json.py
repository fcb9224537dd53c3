"""spec.json gives back the spec that was written, and refuses whatever else it is given."""

from __future__ import annotations

import json
import re

import pytest

from bevatron.families.published_models import PRESETS, preset
from bevatron.spec import ModelSpec, SpecError
from bevatron.spec.json import from_json, to_json
from tests.specs import ALL, HETEROGENEOUS


@pytest.mark.parametrize("name", ALL)
def test_round_trip(name: str) -> None:
    assert from_json(to_json(ALL[name])) == ALL[name]


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_published_models(name: str) -> None:
    assert from_json(to_json(preset(name))) == preset(name)


def test_one_layer_a_line() -> None:
    lines = to_json(HETEROGENEOUS).splitlines()
    assert sum('"attention"' in line for line in lines) == len(HETEROGENEOUS.layers)


def set_at(data: object, path: str, value: object) -> None:
    *way, last = path.split(".")
    for key in way:
        data = data[int(key)] if isinstance(data, list) else data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vocab_size", "97"),
        ("vocab_size", 97.0),
        ("vocab_size", True),
        ("vocab_size", 0),
        ("layers", {}),
        ("layers", []),
        ("tie_word_embeddings", 1),
        ("logit_softcap", "15"),
        ("norm", None),
        ("norm.eps", None),
        ("norm.kind", "batch"),
        ("rope.kind", ["llama3"]),
        ("rope.factor", None),
        ("surprise", 1),
        ("init.mean", 0.0),
        ("layers.0.attention.head_dim", "8"),
        ("layers.0.attention.head_dim", 7),
        ("layers.0.attention.num_key_value_heads", 3),
        ("layers.0.attention.kind", "mlp"),
        ("layers.0.attention.kind", None),
        ("layers.0.attention", None),
        ("layers.0.mlp.gated", "yes"),
        ("layers.0.mlp.widths", 3),
        ("layers.3.attention.rank", 8),
        ("layers.1.attention.head_dim", 8),
        ("layers.2.norm", {}),
        ("head.kind", "multiple_choice"),
        ("head.kind", "sequence_classification"),
        ("head.labels", [1]),
        ("head.labels", ["a"]),
        ("head.labels", "a"),
        ("head.problem_type", 1),
    ],
)
def test_wrong_values_are_refused_by_path(path: str, value: object) -> None:
    data = json.loads(to_json(HETEROGENEOUS))
    set_at(data, path, value)
    with pytest.raises(SpecError) as caught:
        from_json(json.dumps(data))
    assert path.split(".", maxsplit=1)[0] in str(caught.value) or "model" in str(caught.value)
    if path.startswith("layers."):
        assert ".".join(path.split(".")[:2]) in str(caught.value)


def paths(value: object, prefix: str = "") -> list[str]:
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    found = []
    for key, inner in items:
        found += [f"{prefix}{key}"] * isinstance(value, dict) + paths(inner, f"{prefix}{key}.")
    return found


def test_every_key_is_required_and_named() -> None:
    text = to_json(HETEROGENEOUS)
    added = re.compile(r"head|rope\.(beta_.*|attention_factor|truncate)|init\.depth_scaled")
    for path in paths(json.loads(text)):
        data = json.loads(text)
        at, (*way, last) = data, path.split(".")
        for key in way:
            at = at[int(key)] if isinstance(at, list) else at[key]
        del at[last]
        if added.fullmatch(path):
            assert from_json(json.dumps(data)) == HETEROGENEOUS  # an older file
            continue
        with pytest.raises(SpecError, match=f"^{path}: missing|^{path}: .*missing"):
            from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"vocab_size": NaN}', '{"a": 1, "a": 1}', "9" * 5000],
)
def test_no_spec_at_all(text: str) -> None:
    with pytest.raises(SpecError):
        from_json(text)


def test_infinity_is_refused() -> None:
    text = to_json(HETEROGENEOUS).replace('"theta": 500000.0', '"theta": 1e999')
    with pytest.raises(SpecError, match=r"rope\.theta"):
        from_json(text)


def test_integers_pass_for_numbers() -> None:
    text = to_json(HETEROGENEOUS).replace('"theta": 500000.0', '"theta": 500000')
    spec: ModelSpec = from_json(text)
    assert spec == HETEROGENEOUS
    assert isinstance(spec.rope.theta, float)
