"""Values that are damaged, no numbers, or rare: found, reported, and never changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.manifest import read_manifest
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import verify
from tests.bridge.hf_folders import assert_same_folder, make, rewrite
from tests.faults.refusal import EMBED, NORM, WEIGHTS, command, refused

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def native_of(source: Path) -> Path:
    import_checkpoint(source, source.parent / "native")
    return source.parent / "native"


def test_fault_20_any_flipped_bit_is_found_and_named(model) -> None:
    source = model("many")
    native = native_of(source)
    assert verify(source, native, logits=False).ok
    for number, (name, tensor) in enumerate(read_manifest(native).tensors.items()):
        (chunk,) = tensor.chunks
        path = native / chunk.file
        kept = path.read_bytes()
        data = bytearray(kept)
        nbytes = np.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
        data[chunk.at + number * 7919 % nbytes] ^= 1 << number % 8
        path.write_bytes(data)
        report = verify(source, native, logits=False)
        damaged = [d for d in report.differences if "damaged" in d]
        assert len(damaged) == 1 and damaged[0].startswith(f"{name}: damaged in {path}")
        assert any("values differ" in d for d in report.differences)
        if number % 4 == 0:
            refused(native, "damaged", name, str(path), verb="export")
        path.write_bytes(kept)
    assert verify(source, native, logits=False).ok


def test_fault_20_a_native_checkpoint_that_is_incomplete(model) -> None:
    native = native_of(model())
    path = native / "model" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(native, "truncated", str(path), verb="export")
    path.unlink()
    refused(native, "cannot be opened", str(path), verb="export")
    raw = json.loads((native / "manifest.json").read_text())
    del raw["tensors"]["model/final_norm.weight"]
    (native / "manifest.json").write_text(json.dumps(raw))
    refused(native, "final_norm.weight", verb="export")
    (native / "manifest.json").unlink()
    refused(native, "no complete native checkpoint", verb="export")
    (native / "latest").write_text("step-00000009")
    refused(native, "step-00000009", verb="export")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_fault_21_nan_and_infinity_are_reported_and_kept(tmp_path: Path, dtype: str) -> None:
    source = make(tmp_path / "hf", dtype=dtype)
    k, bad = "model.layers.1.self_attn.k_proj.weight", [float("nan"), float("inf")]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][-1] = -bad[0]
        tensors[k].view(-1)[[0, 7, 100]] = torch.tensor([*bad, -bad[1]], dtype=tensors[k].dtype)

    report = import_checkpoint(source, tmp_path / "clean")
    assert report.non_finite == {} and report.notes == []
    rewrite(source, spoil)
    status, out, _ = command("import", source, tmp_path / "native", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["non_finite"] == {k: 3, NORM: 1}
    assert found["notes"] == [
        f"2 tensors hold NaN or infinite values: {k} (3), {NORM} (1); they were kept as they are"
    ]
    provenance = json.loads((tmp_path / "native" / "provenance.json").read_text())
    assert provenance["non_finite"] == {k: 3, NORM: 1}
    report = export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert report.non_finite == {k: 3, NORM: 1}
    assert_same_folder(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_fault_21_the_count_is_torch_s(model, dtype: torch.dtype, seed: int) -> None:
    """Random bits, so that every kind of value occurs, over more than one buffer."""
    source = model()
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.iinfo(torch.int16).min, torch.iinfo(torch.int16).max
    bits = torch.randint(low, high + 1, (101, 32 * 4), dtype=torch.int16, generator=generator)
    values = bits.view(-1).view(dtype)[: 101 * 32].reshape(101, 32).contiguous()
    if seed == 0:  # nothing but zeros, the largest finite value, and one infinity
        values.fill_(0.0)
        values[0, 0] = torch.finfo(dtype).max
        values[50, 3] = -float("inf")
    rewrite(source, lambda t: t.update({EMBED: values}))
    report = import_checkpoint(source, source.parent / "target")
    assert report.non_finite.get(EMBED, 0) == int((~torch.isfinite(values)).sum())


def test_fault_21_overflow_to_infinity_is_told(model) -> None:
    source = model()
    rewrite(source, lambda t: t.update({NORM: torch.full((32,), 1e30, dtype=torch.bfloat16)}))
    report = import_checkpoint(source, source.parent / "target", dtype="fp16")
    assert any("final_norm.weight" in n and "32 values" in n for n in report.notes)
    assert report.non_finite == {}, "the source is sound"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fault_32_every_kind_of_bits_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    """Negative zero, subnormals, infinities, quiet and signalling NaNs with every payload: all
    65536 patterns of 16 bits; for wider dtypes each of them at the top and at the bottom."""
    source = make(tmp_path / "hf", dtype="bfloat16", vocab_size=4096)
    size = dtype.itemsize
    patterns = np.arange(65536, dtype=f"u{size}")
    low = patterns | (np.uint64(0x7FF80000 << 32 | 1).astype(f"u{size}") if size > 2 else 0)
    bits = np.concatenate([patterns << (8 * size - 16), low]).view(f"i{size}").reshape(4096, 32)
    values = torch.from_numpy(bits).view(dtype)
    rewrite(source, lambda t: t.update({EMBED: values}))
    import_checkpoint(source, tmp_path / "native")
    stored = load_file(tmp_path / "native" / "model" / "00001.safetensors")["embed.weight"]
    assert torch.equal(stored.view(INTEGERS[size]), values.view(INTEGERS[size]))
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert_same_folder(source, tmp_path / "out")


def test_verify_does_not_take_damage_for_a_match(model, tmp_path: Path) -> None:
    """One bit of the source, changed after the import, is a difference as well."""
    source = model()
    native = native_of(source)
    tensors = load_file(source / WEIGHTS)
    tensors[NORM].view(torch.int16)[5] ^= 1
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    report = verify(source, native, logits=False)
    assert [d.split(":")[0] for d in report.differences] == [NORM]
    assert command("verify", source, native, "--no-logits")[0] == 1
    with pytest.raises(BevatronError, match="already exists"):
        import_checkpoint(source, native)
