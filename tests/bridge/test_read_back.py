"""A conversion reads back what it wrote, refuses what differs, and records what it saw."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.provenance import read_provenance
from bevatron.errors import BevatronError
from tests.bridge.hf_folders import make


def flip_late(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A disk that loses one bit of the write with that number."""
    real, count = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        nonlocal count
        count += 1
        if count == number and len(data):
            damaged = bytearray(data)
            damaged[-1] ^= 4
            return real(fd, damaged, at)
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("number", [3, 8, 15])
def test_a_bit_that_the_disk_lost_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source = make(tmp_path / "hf")
    with monkeypatch.context() as patch:
        flip_late(patch, number)
        with pytest.raises(BevatronError, match="came back different"):
            import_checkpoint(source, tmp_path / "native")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    import_checkpoint(source, tmp_path / "native")
    with monkeypatch.context() as patch:
        flip_late(patch, number)
        with pytest.raises(BevatronError, match="came back different"):
            export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_record_is_kept(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", tie_word_embeddings=True)
    report = import_checkpoint(source, tmp_path / "native")
    expected = {"tensors": 29, "equal": True, "by": "xxh3-128 of each, read back"}
    assert report.verified == expected
    record = read_provenance(tmp_path / "native")
    assert record is not None
    assert record.verified == expected
    report = export_checkpoint(tmp_path / "native", tmp_path / "same")
    assert report.verified == expected
    assert not (tmp_path / "same" / "bevatron.json").exists()


def test_a_changed_export_says_where_it_came_from(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "native")
    report = export_checkpoint(tmp_path / "native", tmp_path / "out", dtype="bf16")
    facts = json.loads((tmp_path / "out" / "bevatron.json").read_text())
    assert facts["source"] == str(source)
    assert facts["done"] == ["imported", "converted to bfloat16 on export"]
    assert facts["source_tensors"] == report.tensors == facts["verified"]["tensors"] == 30
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in stored.items():
        raw = tensor.view(torch.uint8).numpy().tobytes()
        assert facts["tensors"][name] == {
            "file": "model.safetensors",
            "xxh3": xxh3_128_hexdigest(raw),
        }
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(source) in card
    assert "All 30 tensors of the source were accounted for" in card
