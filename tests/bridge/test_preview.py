"""A dry run shows what the conversion then does, and touches nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bevatron.bridge.conversion_preview import folded, preview_export, preview_import
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.safetensors_file import read_header
from tests.bridge.hf_folders import make


def weights(folder: Path) -> dict[str, int]:
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*.safetensors")
    }


@pytest.mark.parametrize("tied", [True, False])
def test_an_import_is_shown_as_it_will_be(tmp_path: Path, tied: bool) -> None:
    source = make(tmp_path / "hf", dtype="bfloat16", shard="20KB", tie_word_embeddings=tied)
    seen = preview_import(source, tmp_path / "native", dtype="fp32")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    report = import_checkpoint(source, tmp_path / "native", dtype="fp32")
    manifest = read_manifest(tmp_path / "native")
    assert [line.native for line in seen.lines] == list(manifest.tensors)
    for line in seen.lines:
        tensor = manifest.tensors[line.native]
        assert (line.to, line.shape, line.nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
        assert line.files == (tensor.chunks[0].file,)
    assert seen.shards == weights(tmp_path / "native")
    assert (seen.parameters, seen.read) == (report.parameters, report.nbytes)
    assert seen.files == report.files


@pytest.mark.parametrize("shard", [None, "9KB"])
def test_an_export_is_shown_as_it_will_be(tmp_path: Path, shard: str | None) -> None:
    source = make(tmp_path / "hf", dtype="bfloat16", shard="20KB")
    import_checkpoint(source, tmp_path / "native")
    seen = preview_export(tmp_path / "native", tmp_path / "out", max_shard_size=shard)
    assert not (tmp_path / "out").exists()
    export_checkpoint(tmp_path / "native", tmp_path / "out", max_shard_size=shard)
    assert seen.shards == weights(tmp_path / "out")
    for file in seen.shards:
        names = {n for line in seen.lines if file in line.files for n in line.tensors}
        assert set(read_header(tmp_path / "out" / file).tensors) <= names


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "bevatron", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=1800)


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    done = command("import", source, tmp_path / "native", "--dry-run")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["native", "tensor"]
    qkv = next(line for line in lines if line.startswith("model/layers.0.attention.qkv.weight"))
    assert "fuse_qkv" in qkv
    assert "model.layers.0.self_attn.{q,k,v}_proj.weight" in qkv
    assert lines[-1] == "nothing was written"
    import_checkpoint(source, tmp_path / "native")
    done = command("export", tmp_path / "native", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(done.stdout)["lines"][0]["tensors"] == ["model.embed_tokens.weight"]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_fails_like_the_conversion(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    (tmp_path / "native").mkdir()
    (source / "model.safetensors").write_bytes(b"")
    done = command("import", source, tmp_path / "other", "--dry-run")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr


def test_a_dry_run_onto_what_exists_shows_the_plan_and_says_what_it_needs(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "native")
    for verb, src, dst in (("import", "hf", "native"), ("export", "native", "out")):
        (tmp_path / "out").mkdir(exist_ok=True)
        plan = (verb, tmp_path / src, tmp_path / dst, "--dry-run")
        done = command(*plan)
        assert done.returncode == 0 and "native tensor" in done.stdout
        assert done.stdout.splitlines()[-2] == (
            f"{tmp_path / dst}: already exists; without --dry-run this needs --overwrite"
        )
        assert "already exists" not in command(*plan, "--overwrite").stdout
    assert not list((tmp_path / "out").iterdir())
    done = command("import", source, source, "--dry-run")
    assert done.returncode == 2 and "apart from the source" in done.stderr


def test_names_are_folded_as_a_shell_writes_them() -> None:
    assert folded(("a.q.w", "a.k.w")) == "a.{q,k}.w"
    assert folded(("a.w",)) == "a.w"
    assert folded(("gate", "gate_up")) == "gate{,_up}"
