"""Any model of any family comes back as it was, whatever its layers, dtypes and files.

`pytest tests/bridge/test_properties.py --hypothesis-profile=long` tries many more.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.read_boxes import read_box
from bevatron.evaluate.verify import verify
from bevatron.spec.json import from_json
from tests.bridge.hf_folders import assert_same_folder
from tests.bridge.random_models import BITS, DTYPES, FAMILIES, fused, models

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="properties-")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, by which NaNs can be compared."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def native_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a native checkpoint, by its manifest."""
    found = {}
    for name, entry in read_manifest(path).weights().items():
        box = read_box(path, entry, (0,) * len(entry.shape), entry.shape)
        signed = torch.from_numpy(box.view(f"i{box.itemsize}"))
        found[name] = signed.view(DTYPES[entry.dtype])
    return found


def hf_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, by the safetensors library."""
    files = sorted(path.glob("*.safetensors"))
    found = [load_file(file) for file in files]
    merged = {name: tensor for tensors in found for name, tensor in tensors.items()}
    assert len(merged) == sum(map(len, found)), "a tensor is in two files"
    return merged


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(got[name]), bits(tensor)), name


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_any_model_comes_back_as_it_was(family: str, data: st.DataObject) -> None:
    model = data.draw(models(family))
    with folder() as name:
        root = Path(name)
        source = model.write(root / "hf")
        report = import_checkpoint(source, root / "native")
        assert report.family == model.family
        assert from_json((root / "native" / "spec.json").read_text()) == model.spec
        assert_equal(native_tensors(root / "native"), dict(fused(model)))
        tied = {"lm_head.weight"} if model.spec.tie_word_embeddings else set()  # a mere copy
        bad = {n: int((~torch.isfinite(t)).sum()) for n, t in model.tensors.items()}
        assert report.non_finite == {
            n: count for n, count in bad.items() if count and n not in tied
        }
        assert export_checkpoint(root / "native", root / "out").identical
        assert_same_folder(source, root / "out")


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), share=st.floats(0.0, 1.0))
def test_other_shards_hold_the_same_tensors(family: str, data: st.DataObject, share: float) -> None:
    model = data.draw(models(family))
    with folder() as name:
        root = Path(name)
        source = model.write(root / "hf")
        import_checkpoint(source, root / "native")
        total = sum(t.nbytes for t in model.tensors.values())
        limit = max(1, int(total * share))
        export_checkpoint(root / "native", root / "out", max_shard_size=limit)
        got = hf_tensors(root / "out")
        assert_equal(got, model.tensors)
        sizes = [[t.nbytes for t in load_file(f).values()] for f in root.glob("out/*.safetensors")]
        assert all(len(s) == 1 or sum(s) <= limit for s in sizes)
        index = root / "out" / "model.safetensors.index.json"
        if index.exists():
            found = json.loads(index.read_text())
            assert found["metadata"]["total_size"] == total
            assert set(found["weight_map"]) == set(got)
        assert index.exists() == (len(sizes) > 1)
        assert verify(source, root / "out", logits=False).ok
        import_checkpoint(root / "out", root / "again")
        assert_equal(native_tensors(root / "again"), dict(fused(model)))


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), to=st.sampled_from(sorted(NAMES)), early=st.booleans())
def test_another_dtype_is_what_torch_makes_of_it(
    family: str, data: st.DataObject, to: str, early: bool
) -> None:
    """Converted at import or at export; a rotary buffer that is carried along keeps its own."""
    model = data.draw(models(family, any_bits=False))
    with folder() as name:
        root = Path(name)
        source = model.write(root / "hf")
        import_checkpoint(source, root / "native", dtype=to if early else None)
        want = {
            n: t if n.endswith("inv_freq") else t.to(NAMES[to]) for n, t in model.tensors.items()
        }
        if early:
            converted = {n: t.to(NAMES[to]) for n, t in fused(model)}
            assert_equal(native_tensors(root / "native"), converted)
        export_checkpoint(root / "native", root / "out", dtype=None if early else to)
        assert_equal(hf_tensors(root / "out"), want)
        config = json.loads((root / "out" / "config.json").read_text())
        assert config["dtype"] == str(NAMES[to]).removeprefix("torch.")
