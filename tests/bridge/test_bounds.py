"""What conversion does without: torch, a model, and memory that grows with the tensors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.export_plan import parse_size
from bevatron.bridge.inspect import inspect
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import verify
from tests.bridge.hf_folders import assert_same_folder, edit_config, make
from tests.faults.refusal import command


def python(code: str) -> str:
    """Run code in a fresh process; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=1800
    )
    return done.stdout


def test_no_torch(tmp_path):
    """numpy is loaded, to look for NaN and infinity."""
    source = make(tmp_path / "hf", dtype="bfloat16", shard="20KB")
    code = f"""
import sys
from bevatron.bridge.convert import import_checkpoint, export_checkpoint
from bevatron.bridge.inspect import inspect
from bevatron.evaluate.verify import verify
hf, native, out = {str(source)!r}, {str(tmp_path / "native")!r}, {str(tmp_path / "out")!r}
import_checkpoint(hf, native)
export_checkpoint(native, out)
inspect(hf), inspect(native)
assert verify(hf, native, logits=False).ok
print([m for m in ("torch", "transformers", "safetensors") if m in sys.modules])
"""
    assert python(code).strip() == "[]"
    assert_same_folder(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_memory_is_bounded_by_a_buffer_not_by_a_tensor(tmp_path, dtype):
    """One tensor of 64 MiB passes through a process that may grow by 28 MiB."""
    source = make(tmp_path / "hf", dtype="bfloat16", vocab_size=1 << 20)
    code = f"""
import resource
from bevatron.bridge.convert import import_checkpoint, export_checkpoint
import numpy
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
import_checkpoint({str(source)!r}, {str(tmp_path / "native")!r}, dtype={dtype!r})
export_checkpoint({str(tmp_path / "native")!r}, {str(tmp_path / "out")!r})
print(peak() - before)
"""
    assert int(python(code)) < 28 << 10


def test_inspect_tells_what_a_model_is(tmp_path):
    source = make(tmp_path / "hf", dtype="bfloat16")
    import_checkpoint(source, tmp_path / "native")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((source / "config.json").read_bytes())
    found = [inspect(p) for p in (source, alone, tmp_path / "native")]
    for key in ("family", "parameters", "layers", "bytes", "dtype"):
        assert len({json.dumps(f[key]) for f in found}) == 1
    assert found[0]["family"] == "llama"
    assert found[0]["layers"] == 3
    assert found[0]["bytes"] == 2 * found[0]["parameters"]
    assert found[0]["dtype"] == "bfloat16"
    assert [f["step"] for f in found] == [None, None, 0]
    with pytest.raises(BevatronError, match=r"config\.json"):
        inspect(tmp_path)
    with pytest.raises(BevatronError, match="does not exist"):
        inspect(tmp_path / "nothing")


def test_the_table_of_an_import_says_nothing_that_is_about_exports(tmp_path):
    source = make(tmp_path / "hf")
    _, table, _ = command("import", source, tmp_path / "native")
    assert "parameters" in table and "identical" not in table
    _, out, _ = command("import", source, tmp_path / "native", "--overwrite", "--json")
    assert json.loads(out)["identical"] is False
    _, table, _ = command("export", tmp_path / "native", tmp_path / "out")
    assert ["identical", "True"] in [line.split() for line in table.splitlines()]


def test_verify_names_what_differs(tmp_path):
    source = make(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "native")
    other = make(tmp_path / "other", tie_word_embeddings=True)
    report = verify(tmp_path / "native", other, logits=False)
    assert not report.ok
    assert any("lm_head.weight" in d for d in report.differences)
    edit_config(source, rms_norm_eps=1e-3)
    report = verify(source, tmp_path / "native", logits=False)
    assert [d for d in report.differences if "norm" in d] == report.differences != []


def test_shard_sizes():
    assert [parse_size(s) for s in ("5GB", "1 MiB", "7", 12, "2.5kb")] == [
        5 * 10**9,
        1 << 20,
        7,
        12,
        2500,
    ]
    for bad in ("", "5 parsecs", "0", "-1GB"):
        with pytest.raises(BevatronError, match="shard size"):
            parse_size(bad)


@pytest.mark.parametrize("family", ["llama", "nemotron", "nanochat"])
def test_logits_agree_with_transformers(tmp_path, family):
    pytest.importorskip("bevatron.parallel.whole_decoder")
    source = make(tmp_path / "hf", family)
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    report = verify(tmp_path / "native", tmp_path / "out")
    assert report.ok
    assert report.logits is not None
    assert (report.logits["a"], report.logits["b"]) == ("bevatron", "transformers")
    assert report.logits["max_abs_difference"] < 1e-5
