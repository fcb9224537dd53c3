"""The list of bad inputs to the converter, complete: each has a test, here or where it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = {
    1: "truncated shard",
    2: "trailing bytes",
    3: "zero-byte shard",
    4: "header longer than the file",
    5: "header over the cap",
    6: "overlapping offsets",
    7: "gap in offsets",
    8: "shape and dtype do not make the bytes",
    9: "shape overflow",
    10: "duplicate tensor name in a header",
    11: "tensor in two shards",
    12: "tensor in the index but not in the shard",
    13: "tensor in the shard but not in the index",
    14: "missing shard",
    15: "index or link that leads out of the folder",
    16: "Git LFS pointer or web page instead of weights",
    17: "pickles only",
    18: "malicious pickle",
    19: "remote code",
    20: "bit flip",
    21: "NaN and infinity",
    22: "unknown architecture",
    23: "config and weights disagree",
    24: "tied flag and head disagree",
    25: "unknown extra tensors",
    26: "rope variants",
    27: "KV heads that TP does not divide",
    28: "vocabulary that TP does not divide",
    29: "layers that PP does not divide",
    30: "absent and replaced sublayers, other KV heads and widths per layer",
    31: "mixed and quantised dtypes",
    32: "negative zero, subnormals, NaN payloads",
    33: "disk full in the middle",
    34: "killed at every write, then run again",
    35: "read-only and existing target",
    36: "little memory",
    37: "two converters on one target",
    38: "source that changes while it is read",
    39: "JSON that readers disagree about",
    40: "tensor names that are not UTF-8, or very long",
}
# Promises of training and of the families, kept by their own tests.
ELSEWHERE = {
    25: ("bridge/test_round_trip.py", "test_rotary_buffers_are_carried"),
    26: ("families/test_families.py", "test_rope_spellings_have_transformers_precedence"),
    27: ("parallel/test_layouts.py", "test_training_equals_one_process"),
    28: ("parallel/test_layouts.py", "test_training_equals_one_process"),
    29: ("parallel/test_split.py", "test_every_layer_is_in_exactly_one_stage"),
    30: ("bridge/test_properties.py", "test_any_model_comes_back_as_it_was"),
}


def numbers_here() -> set[int]:
    """Faults that a test of this folder has in its name or in the name of a case."""
    text = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    return {int(n) for n in re.findall(r'(?:def test_fault_|"fault-)(\d\d)', text)}


@pytest.mark.parametrize("number", TABLE)
def test_every_fault_has_a_test(number: int) -> None:
    if number in ELSEWHERE:
        file, name = ELSEWHERE[number]
        assert f"def {name}(" in (HERE.parent / file).read_text()
    else:
        assert number in numbers_here()


def test_layouts_have_what_their_faults_are_about() -> None:
    """27, 28 and 30: TP of two meets an odd vocabulary, 1 and 3 KV heads, and every layer kind."""
    from bevatron.spec import Attention, Linear
    from tests.parallel.layouts import LAYOUTS
    from tests.specs import HETEROGENEOUS, HOMOGENEOUS

    assert any(layout.tp == 2 and layout.pp == 2 for layout in LAYOUTS)
    assert HOMOGENEOUS.vocab_size % 2 == HETEROGENEOUS.vocab_size % 2 == 1
    assert len(HETEROGENEOUS.layers) % 2 == 1
    heads = {
        layer.attention.num_key_value_heads
        for layer in HETEROGENEOUS.layers
        if isinstance(layer.attention, Attention)
    }
    assert {1, 3} <= heads
    kinds = [(type(x.attention), type(x.mlp)) for x in HETEROGENEOUS.layers]
    for sublayer in zip(*kinds, strict=True):
        assert {type(None), Linear} <= set(sublayer)
