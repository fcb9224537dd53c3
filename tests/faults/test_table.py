"""The list of faults, complete so far: each has a test, here or where it says."""

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
    41: "killed at each stage of a save",
    42: "killed while the pointer is moved",
    43: "temporary folder that a killed save left",
    44: "partial folder under the next step's name",
    45: "pointer to a missing step",
    46: "damaged newest step",
    47: "resume between all layouts",
    48: "optimizer, schedule, random state and data position, each deleted",
    49: "changed batch or sequence length",
    50: "changed tokenizer or data",
    51: "checkpoint of a newer format",
    52: "one rank raises",
    53: "one rank hangs",
    54: "SIGTERM in warm-up, validation, save and wait for data",
    55: "disk full in a save",
    56: "clock that goes back",
    57: "retention and the only good step",
    58: "NaN loss on one rank only",
    59: "infinite gradient",
    60: "spike of the loss",
    61: "empty and long documents, ids outside of the vocabulary, truncated files, bad index",
    62: "dataset shorter than a batch",
    63: "world size that is not the product",
    64: "replicas that drift",
    65: "bit flip in a gradient",
    66: "template that reaches for Python",
    67: "template that loops",
    68: "template that builds a giant string",
    69: "template with a mistake",
    70: "missing template",
    71: "special tokens in what a user says",
    72: "messages and bodies that are none",
    73: "sampling values out of range",
    74: "token ids that the model has not",
    75: "prompt longer than the context",
    76: "client that leaves in the middle",
    77: "slow clients, many clients",
    78: "cancelling frees the cache",
    79: "model without an end token",
    80: "loopback, and a key compared in constant time",
}
# Promises kept by tests that are not named after a fault.
ELSEWHERE = {
    25: ("bridge/test_round_trip.py", "test_rotary_buffers_are_carried"),
    26: ("families/test_families.py", "test_rope_spellings_have_transformers_precedence"),
    27: ("parallel/test_layouts.py", "test_training_equals_one_process"),
    28: ("parallel/test_layouts.py", "test_training_equals_one_process"),
    29: ("parallel/test_split.py", "test_every_layer_is_in_exactly_one_stage"),
    30: ("bridge/test_properties.py", "test_any_model_comes_back_as_it_was"),
    47: ("train/test_resume.py", "test_every_layout_continues_what_every_other_saved"),
    50: ("train/test_feed.py", "test_a_store_that_changed_since_the_checkpoint_is_found"),
    52: ("train/test_life.py", "test_one_of_four_ranks_that_fails_stops_all_with_its_message"),
    53: ("train/test_life.py", "test_a_rank_that_hangs_is_named"),
    54: ("train/test_life.py", "test_sigterm_saves_and_the_run_goes_on_from_there"),
    58: ("train/test_guard.py", "test_nan_on_one_rank_stops_all_before_the_update"),
    59: ("train/test_guard.py", "test_a_skipped_step_leaves_weights_and_moments_as_they_were"),
    60: ("train/test_guard.py", "test_a_spike_is_judged_alike_on_all_ranks_and_after_a_resume"),
    61: ("data/test_store.py", "test_a_truncated_file_is_named"),
    62: (
        "train/test_feed.py",
        "test_a_store_shorter_than_a_batch_works_by_epochs_and_is_announced",
    ),
    63: ("train/test_dry_run.py", "test_refuses_with_the_words_of_a_real_start"),
    64: ("parallel/test_sameness.py", "test_a_flipped_bit_in_one_copy_names_parameter_and_ranks"),
    65: (
        "parallel/test_sameness.py",
        "test_a_bit_that_flips_in_a_gradient_is_caught_by_the_replay",
    ),
}


def numbers_named() -> set[int]:
    """Faults that a test has in its name or in the name of a case."""
    text = "".join(path.read_text() for path in HERE.parent.rglob("test_*.py"))
    return {
        int(n)
        for found in re.findall(r'(?:def test_faults?_|"fault-)(\d\d(?:_\d\d)*)', text)
        for n in found.split("_")
    }


@pytest.mark.parametrize("number", TABLE)
def test_every_fault_has_a_test(number: int) -> None:
    if number in ELSEWHERE:
        file, name = ELSEWHERE[number]
        assert f"def {name}(" in (HERE.parent / file).read_text()
    else:
        assert number in numbers_named()


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
