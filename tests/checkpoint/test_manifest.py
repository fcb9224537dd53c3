"""manifest.json is read strictly, and its chunks tile every tensor exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.bridge.hf_folders import make
from tests.checkpoint.test_boxes_bytes import split
from tests.faults.refusal import command, refused

from bevatron.bridge.convert import import_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.checkpoint.manifest import Chunk, Manifest, TensorEntry, read_manifest, tiling_problem
from bevatron.errors import CheckpointError

GOOD: dict[str, Any] = {
    "version": 1,
    "family": "llama",
    "step": 0,
    "files": {"spec.json": "xxh3:", "source/any\nname\\\udcff": "xxh3:"},
    "tensors": {
        "model/x": {
            "dtype": "F32",
            "shape": [4, 2],
            "chunks": [
                {"offset": [0, 0], "shape": [1, 2], "file": "model/a", "at": 0, "hash": "h"},
                {"offset": [1, 0], "shape": [3, 2], "file": "model/a", "at": 8, "hash": "h"},
            ],
        }
    },
}


@pytest.fixture
def native(tmp_path: Path) -> Path:
    import_checkpoint(make(tmp_path / "hf"), tmp_path / "native", show_progress=False)
    return tmp_path / "native"


def test_chunks_that_overlap_and_leave_an_equal_gap_are_refused(native: Path) -> None:
    """They hold as many elements as the tensor, and whoever read the gap got what lay in memory."""
    raw = json.loads((native / "manifest.json").read_text())
    entry = raw["tensors"]["model/embed.weight"]
    (whole,), (rows, width) = entry["chunks"], entry["shape"]
    first = {**whole, "shape": [60, width]}
    second = {**whole, "offset": [50, 0], "shape": [rows - 60, width], "at": whole["at"] + 50}
    entry["chunks"] = [first, second]
    (native / "manifest.json").write_text(json.dumps(raw))
    refused(native, "embed.weight", "overlap", verb="export")
    for arguments in (("generate", native, "--prompt", "a"), ("inspect", native)):
        status, _, stderr = command(*arguments)
        assert (status, stderr.count("\n")) == (2, 1)
        assert "overlap" in stderr


def no_weights(native: Path) -> None:
    edit(native / "manifest.json", lambda raw: raw.update(tensors={}))


def whole_numbers(native: Path) -> None:
    edit(native / "manifest.json", lambda raw: raw["tensors"]["model/embed.weight"].update(I32))


I32 = {"dtype": "I32"}
DISAGREE = {
    "tensors": (no_weights, "manifest.json and spec.json disagree; missing: embed.weight"),
    "dtype": (whole_numbers, "embed.weight has dtype I32, expected one of F64"),
    "family": (
        lambda n: edit(n / "manifest.json", lambda raw: raw.update(family="bogus")),
        "manifest.json: unknown family 'bogus'",
    ),
    "spec": (
        lambda n: edit(n / "spec.json", lambda raw: raw["norm"].update(kind="layer")),
        'spec.json: norm.kind: found "layer"',
    ),
}


@pytest.mark.parametrize("fault", DISAGREE)
def test_inspect_refuses_what_export_refuses(native: Path, fault: str) -> None:
    """It showed a family that nobody knows, and failed on a model without weights."""
    damage, told = DISAGREE[fault]
    damage(native)
    refused(native, f"{native}", told, verb="export")
    status, out, stderr = command("inspect", native)
    assert (status, out, stderr.count("\n")) == (2, "", 1)
    assert told in stderr and str(native) in stderr


def edit(file: Path, act: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(file.read_text())
    act(raw)
    file.write_text(json.dumps(raw))


def change(where: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def act(raw: dict[str, Any]) -> None:
        *path, last = where.split(".")
        found: Any = raw
        for key in path:
            found = found[int(key)] if isinstance(found, list) else found[key]
        found[int(last) if isinstance(found, list) else last] = value

    return act


X, C = "tensors.model/x", "tensors.model/x.chunks.0"
FAULTS = {
    "version": change("version", True),
    "family": change("family", 3),
    "step": change("step", -1),
    "files": change("files", {"../x": "h"}),
    "tensors": change("tensors", []),
    "exactly dtype": change(f"{X}.more", 1),
    "dtype": change(f"{X}.dtype", ["F32"]),
    "the shape": change(f"{X}.shape", [4, True]),
    "shape": change(f"{X}.shape", [4, 2] + [1] * 100),
    "list of chunks": change(f"{X}.chunks", {}),
    "each with": change(f"{C}.more", 1),
    "wrong types": change(f"{C}.hash", None),
    "types": change(f"{C}.offset", "00"),
    "sizes": change(f"{C}.at", -1),
    "that are none": change(f"{C}.at", 10**30),
    "are none": change(f"{C}.offset", [0.0, 0]),
    "dimensions": change(f"{C}.offset", [0, 0, 0]),
    "outside of its shape": change(f"{C}.offset", [4, 0]),
    "outside of the folder": change(f"{C}.file", "/etc/passwd"),
    "outside of": change(f"{C}.file", "model/../../x"),
    "points outside": change(f"{C}.file", "model/\0x"),
    "hold 7 elements": change(f"{C}.shape", [1, 1]),
    "overlap": change(f"{C}.offset", [1, 0]),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_manifest_of_wrong_types_or_places_is_refused(words: str, tmp_path: Path) -> None:
    raw = json.loads(json.dumps(GOOD))
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    assert read_manifest(tmp_path).weights()["x"].shape == (4, 2)
    FAULTS[words](raw)
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"version": 1, "version": 1}', "twice"),
        ('{"version": NaN}', "NaN"),
        ('{"version":' * 10**5, "nested"),
        ("\ufeff{}", "byte order"),
        ("[]", "object"),
        ('{"version": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_a_manifest_is_strict_json(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("headers", []), ("source", None), ("accepted", "x"), ("folders", {}), ("weights", 3)],
)
def test_a_provenance_of_wrong_types_is_refused(native: Path, key: str, value: Any) -> None:
    raw = json.loads((native / "provenance.json").read_text())
    (native / "provenance.json").write_text(json.dumps({**raw, key: value}))
    refused(native, "provenance.json", key, verb="export")


def entry_of(shape: tuple[int, ...], boxes: list[Any]) -> TensorEntry:
    return TensorEntry("F32", shape, tuple(Chunk(o, s, "f", 0, "") for o, s in boxes))


@pytest.mark.parametrize("seed", range(60))
def test_tiling_is_what_counting_every_element_finds(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
    boxes = split(rng, (0,) * len(shape), shape, 5)
    rng.shuffle(boxes)
    assert tiling_problem(entry_of(shape, boxes)) is None
    for _ in range(20):
        moved = list(boxes)
        i = rng.randrange(len(moved))
        size = moved[i][1]
        moved[i] = (tuple(rng.randint(0, n - m) for n, m in zip(shape, size, strict=True)), size)
        counts = np.zeros(shape, dtype=int)
        for offset, box in moved:
            counts[tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))] += 1
        assert (tiling_problem(entry_of(shape, moved)) is None) == bool((counts == 1).all())


def test_a_pinwheel_that_no_plane_parts_is_a_tiling() -> None:
    around = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1))]
    assert tiling_problem(entry_of((3, 3), [*around, ((1, 1), (1, 1))])) is None


def test_scalars_and_empty_tensors_tile(tmp_path: Path) -> None:
    scalar = TensorEntry("F32", (), (Chunk((), (), "model/a", 0, "h"),))
    tensors = {"model/a": scalar, "model/b": TensorEntry("F32", (0, 3), ())}
    (tmp_path / "manifest.json").write_text(Manifest("llama", 0, tensors).to_json())
    assert read_manifest(tmp_path).tensors == tensors


def test_an_imported_manifest_is_read_as_it_was_written(native: Path) -> None:
    manifest = open_native(native).manifest
    assert manifest.to_json() == (native / "manifest.json").read_text()
