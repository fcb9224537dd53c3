"""Native checkpoints behind URLs: the memory:// filesystem stands for s3:// and gs://."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.inspect import inspect
from bevatron.bridge.open_weights import open_weights
from bevatron.checkpoint.storage import located
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import verify
from bevatron.parallel.whole_decoder import load_decoder
from tests.bridge.hf_folders import assert_same_folder, make


@pytest.fixture
def url() -> str:
    return f"memory://bucket-{uuid.uuid4().hex}/models/native"


def test_there_and_back_through_a_url(tmp_path: Path, url: str) -> None:
    source = make(tmp_path / "hf", dtype="bfloat16", shard="20KB")
    import_checkpoint(source, url)
    assert inspect(url)["parameters"] == inspect(source)["parameters"]
    assert verify(source, url, logits=False).ok
    report = export_checkpoint(url, tmp_path / "out")
    assert report.identical
    (source / "empty").rmdir()  # object stores have no empty folders
    if (tmp_path / "out" / "empty").exists():
        (tmp_path / "out" / "empty").rmdir()
    assert_same_folder(source, tmp_path / "out")


def test_models_load_from_a_url(tmp_path: Path, url: str) -> None:
    source = make(tmp_path / "hf")
    import_checkpoint(source, url)
    decoder, _ = load_decoder(url)
    stored = load_file(source / "model.safetensors")
    assert torch.equal(decoder.state_dict()["embed.weight"], stored["model.embed_tokens.weight"])
    open_weights(url).copy_source(tmp_path / "copied")
    assert (tmp_path / "copied" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


def test_what_is_at_a_url_is_never_replaced(tmp_path: Path, url: str) -> None:
    source = make(tmp_path / "hf")
    import_checkpoint(source, url)
    before = sorted(map(str, located(url).rglob("*")))
    for overwrite in (False, True):
        with pytest.raises(BevatronError, match="already exists"):
            import_checkpoint(source, url, overwrite=overwrite)
    assert sorted(map(str, located(url).rglob("*"))) == before


def test_the_manifest_comes_last_and_a_failed_upload_leaves_nothing(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "hf")
    order: list[str] = []
    real = MemoryFileSystem.put_file

    def put_file(self: MemoryFileSystem, left: str, right: str, **kwargs: object) -> None:
        order.append(right.rpartition("/")[2])
        if fail_at is not None and len(order) == fail_at:
            raise ConnectionError("the bucket went away")
        real(self, left, right, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    fail_at = 5
    with pytest.raises(BevatronError, match="the bucket went away"):
        import_checkpoint(source, url)
    assert not located(url).exists()
    fail_at = None
    order.clear()
    import_checkpoint(source, url)
    assert order.index("manifest.json") < len(order) - 1  # the source's own file of that name
    assert order[-1] == "manifest.json"


def test_a_truncated_object_is_named(tmp_path: Path, url: str) -> None:
    import_checkpoint(make(tmp_path / "hf"), url)
    weights = located(url) / "model" / "00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BevatronError, match=r"00001\.safetensors.*truncated"):
        export_checkpoint(url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_urls_that_cannot_be_used_are_refused(tmp_path: Path, url: str) -> None:
    source = make(tmp_path / "hf")
    with pytest.raises(BevatronError, match="folder on disk"):
        export_checkpoint(source, url)
    with pytest.raises(BevatronError, match="no native checkpoint"):
        import_checkpoint(url, tmp_path / "native")
    with pytest.raises(BevatronError, match="nosuch"):
        export_checkpoint("nosuch://bucket/x", tmp_path / "out")
    with pytest.raises(BevatronError, match="does not exist"):
        export_checkpoint(url, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
