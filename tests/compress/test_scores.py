"""Scores files: what is written is read, by safetensors too; others are refused."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bevatron.compress.importance_scores import Scores, ScoresError, expected, spec_hash
from bevatron.errors import BevatronError
from tests.specs import HETEROGENEOUS, HOMOGENEOUS


def scores_of(spec):
    rng = np.random.default_rng(0)
    tensors = {n: rng.random(s, dtype=np.float32) for n, s in expected(spec).items()}
    return Scores(tensors, {"spec": spec_hash(spec), "samples": "8"})


def test_a_file_is_read_as_it_was_written(tmp_path):
    scores = scores_of(HETEROGENEOUS)
    scores.write(tmp_path / "s.safetensors")
    again = Scores.read(tmp_path / "s.safetensors")
    again.check(HETEROGENEOUS, "s")
    library = load_file(tmp_path / "s.safetensors")
    assert set(library) == set(again.tensors) == set(scores.tensors)
    for name, values in scores.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], values)
        np.testing.assert_array_equal(library[name], values)
    assert again.metadata["samples"] == "8"
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_absent_sublayers_have_no_scores():
    names = set(expected(HETEROGENEOUS))
    assert "layers.1.attention.heads" not in names  # no-op
    assert "layers.3.attention.heads" not in names  # one matrix
    assert "layers.5.mlp.neurons" not in names
    assert "layers.0.attention.heads" in names and "layers.1.mlp.neurons" in names


def test_scores_of_another_model_are_refused():
    with pytest.raises(ScoresError, match="another model"):
        scores_of(HOMOGENEOUS).check(HETEROGENEOUS, "s")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, path)
    with pytest.raises(ScoresError, match="no file of importance scores"):
        Scores.read(path)
    with pytest.raises(ScoresError, match="folder"):
        Scores.read(tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    scores = scores_of(HOMOGENEOUS)
    scores.tensors["layers.0.mlp.neurons"][3] = np.nan
    scores.write(tmp_path / "s")
    with pytest.raises(ScoresError, match=r"layers\.0\.mlp\.neurons holds a number"):
        Scores.read(tmp_path / "s")
    with pytest.raises(ScoresError, match=r"layers\.0\.mlp\.neurons holds a number"):
        scores.check(HOMOGENEOUS, "s")  # not every one comes from a file


def test_a_damaged_file_is_refused_wherever_the_damage_is(tmp_path):
    """One bit at a time, and cut short everywhere: the numbers read are those written, or none."""
    path, scores = tmp_path / "s", scores_of(HOMOGENEOUS)
    scores.write(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(8), *rng.integers(8, len(whole), 300)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            found = Scores.read(path)
            found.check(HOMOGENEOUS, "s")
        except BevatronError as error:
            assert str(path) in str(error) or str(error).startswith("s: ")
            continue
        for name, values in scores.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], values)
    for length in rng.integers(0, len(whole), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(BevatronError, match=str(path)):
            Scores.read(path)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path, scores = tmp_path / "s", scores_of(HOMOGENEOUS)
    path.write_text("old")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(ScoresError, match="cannot be written"):
            scores.write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert path.read_text() == "old"
