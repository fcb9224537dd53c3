"""`bevatron merge` gives the weighted mean of its checkpoints, rounded once, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bevatron.bridge import assemble
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.merge import MergeError, merge
from bevatron.bridge.open_weights import open_weights
from bevatron.cli.main import app
from bevatron.errors import BevatronError
from tests.bridge.hf_folders import edit_config, make, rewrite

SHARES = (3.0, 1.0, 4.0)


def changed(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)

    def noise(tensors: dict[str, Tensor]) -> None:
        for value in tensors.values():
            value.add_(torch.randn(value.shape, generator=generator).to(value.dtype))

    rewrite(path, noise)
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def three(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[Path]:
    """An HF folder and two native checkpoints of one shape."""
    root = tmp_path_factory.mktemp("three")
    folders = [make(root / f"hf-{i}", dtype=request.param) for i in range(3)]
    for i, folder in enumerate(folders):
        changed(folder, i)
    for i in (1, 2):
        import_checkpoint(folders[i], root / f"native-{i}", show_progress=False)
    return [folders[0], root / "native-1", root / "native-2"]


def tensors_of(paths: list[Path]) -> list[dict[str, Tensor]]:
    return [load_file(paths[0].parent / f"hf-{i}" / "model.safetensors") for i in range(3)]


def mean(tensors: list[Tensor]) -> Tensor:
    """As torch computes it in the next wider dtype, rounded once."""
    wide = torch.float64 if tensors[0].dtype == torch.float32 else torch.float32
    total = sum(SHARES)
    out = torch.zeros_like(tensors[0], dtype=wide)
    for share, tensor in zip(SHARES, tensors, strict=True):
        out += torch.tensor(share / total, dtype=wide) * tensor.to(wide)
    return out.to(tensors[0].dtype)


def test_the_average_is_rounded_once_and_loads_in_transformers(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "BLOCK", 100)  # many blocks a tensor
    report = merge(three, tmp_path / "m", weights=SHARES, show_progress=False)
    assert sum(report.merged.values()) == 1 and list(report.merged) == list(map(str, three))
    export_checkpoint(tmp_path / "m", tmp_path / "hf", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    found, sources = dict(model.state_dict()), tensors_of(three)
    assert set(sources[0]) <= set(found)
    for name in sources[0]:
        assert torch.equal(found[name], mean([t[name] for t in sources])), name
    record = json.loads((tmp_path / "hf" / "bevatron.json").read_text())
    merged = next(done for done in record["done"] if done.startswith("merged"))
    assert f"0.375 x {three[0]} + 0.125 x {three[1]} + 0.5 x {three[2]}" in merged
    assembly = json.loads((tmp_path / "m" / "assembly.json").read_text())
    assert assembly["parameters"]["embed.weight"] == [
        [i, "embed.weight", share] for i, share in enumerate((0.375, 0.125, 0.5))
    ]
    assert open_weights(tmp_path / "m").shapes.keys() == open_weights(three[0]).shapes.keys()


def test_equal_checkpoints_are_their_own_average(three: list[Path], tmp_path: Path) -> None:
    copies = [three[1], tmp_path / "a", tmp_path / "b"]
    for copy in copies[1:]:
        shutil.copytree(three[1], copy)
    merge(copies, tmp_path / "m", show_progress=False)
    export_checkpoint(tmp_path / "m", tmp_path / "hf", show_progress=False)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, value in tensors_of(three)[1].items():
        assert torch.equal(found[name], value), name


def test_the_verb_takes_all_numbers_that_follow(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in three]
    app(["merge", *paths, str(tmp_path / "m"), "--weights", "3", "1", "4", "--json"],
        standalone_mode=False)  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert list(report["merged"].values()) == [0.375, 0.125, 0.5]
    assert report["verified"]["equal"] and report["parameters"] > 0


def test_checkpoints_without_an_average_are_refused(tmp_path: Path) -> None:
    a, same, wider, vocabulary, scaled = (
        make(tmp_path / "a"),
        make(tmp_path / "same"),
        make(tmp_path / "wider", intermediate_size=64),
        make(tmp_path / "vocabulary"),
        make(tmp_path / "scaled"),
    )
    (vocabulary / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')
    edit_config(scaled, rms_norm_eps=1e-3)
    nan = make(tmp_path / "nan")
    rewrite(nan, lambda t: next(iter(t.values())).fill_(float("nan")))
    before = sorted(p.name for p in tmp_path.iterdir())
    for others, weights, words in (
        ((wider,), (), r"another model than .*layers\.0\.mlp: MLP\(intermediate_size=48.*64"),
        ((scaled,), (), "norm: .*1e-06.*0.001"),
        ((vocabulary,), (), "another tokenizer than"),
        ((a,), (), "the same checkpoint as"),
        ((), (), "one checkpoint has no average"),
        ((same,), (1, 2, 3), "3 numbers for 2 checkpoints"),
        ((same,), (0, 0), "expected numbers from 0"),
        ((same,), (2, -1), "expected numbers from 0"),
        ((nan,), (), "nan: .* holds .* NaN or infinite"),
    ):
        with pytest.raises(BevatronError, match=words):
            merge([a, *others], tmp_path / "m", weights=weights, show_progress=False)
    with pytest.raises(MergeError):
        merge([tmp_path / "a"], tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
