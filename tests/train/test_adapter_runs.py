"""A run that trains an adapter: its steps hold the adapter alone, and mean the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevatron.bridge.convert import export_checkpoint
from bevatron.bridge.merge import merge
from bevatron.bridge.open_weights import open_step, open_weights
from bevatron.checkpoint.save_and_load import box_reader
from bevatron.errors import BevatronError
from bevatron.evaluate.verify import verify
from bevatron.generate.engine import Engine
from bevatron.generate.request import Request
from bevatron.parallel.whole_decoder import load_opened
from bevatron.spec.count import adapter_parameters
from tests.commands import bevatron
from tests.labelled_data import save_llama
from tests.processes import Pool
from tests.train.tiny_run import metrics, prepare, train

ADAPTER = "adapter={kind: dora, rank: 4, alpha: 8, targets: [q, v, o, gate_up, down]}"
CHANGES = ("model={init: hf}", ADAPTER, "optimizer.lr=1.0e-2", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    """One run in one process (`whole`), one that goes on at tp 2 x pp 2 after three steps."""
    folder = prepare(tmp_path_factory.mktemp("adapter") / "run")
    save_llama(folder / "hf")
    for file in (folder / "tokenizer").iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    pool.run(1, train, folder, *CHANGES, "run.dir=whole")
    pool.run(1, train, folder, *CHANGES, "run.dir=parts", "train.steps=3")
    at = ("parallel={tp: 2, pp: 2}", "run.dir=parts")
    pool.run(4, train, folder, *CHANGES, *at)
    return folder


def test_it_learns_and_goes_on_at_another_layout(folder: Path) -> None:
    alone, parts = metrics(folder / "whole"), metrics(folder / "parts")
    assert len(parts) == 6 and alone[-1][1] < 0.97 * alone[0][1]
    for found, expected in zip(parts, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_step_holds_the_adapter_alone(folder: Path) -> None:
    step = open_step(folder / "parts")
    own = sum(entry.nbytes for entry in step.manifest.tensors.values())
    assert own == 3 * 4 * adapter_parameters(step.spec), "weights and two moments, in fp32"
    assert {name.rpartition(".")[2] for name in step.shapes} == {"lora_a", "lora_b", "magnitude"}
    status, said = bevatron(folder, "inspect", "parts", "--json")
    told = json.loads(said)
    assert status == 0 and told["parameters"] == 80_112 and told["base"] == str(folder / "hf")
    assert "dora of rank 4 (alpha 8) beside 8 linear maps" in told["adapter"]


def test_it_reads_exports_and_merges_as_the_whole_model(folder: Path, tmp_path: Path) -> None:
    """The merged model computes what the decoder with the adapter does; all ways agree to the
    bit."""
    run, hf, native = folder / "parts", tmp_path / "hf", tmp_path / "native"
    report = export_checkpoint(run, hf, show_progress=False)
    assert "merged into its base" in report.notes[0]
    merge([run], native, show_progress=False)
    for a, b in ((run, hf), (native, hf)):
        found = verify(a, b)
        assert found.ok and found.logits and found.logits["max_abs_difference"] < 1e-5
    merged, step = open_weights(run), open_step(run)
    assert merged.spec == step.spec.base == open_weights(native).spec
    decoder, _ = load_opened(merged, "cpu", torch.float32)
    ids = torch.arange(24)[None] * 7 % 400
    adapted = load_adapted(step.spec, merged.base, step)
    torch.testing.assert_close(decoder.logits(ids), adapted.logits(ids), rtol=1e-5, atol=1e-5)
    request = Request(tuple(ids[0].tolist()), 5, logprobs=0)
    with Engine.open(run) as engine, Engine.open(hf) as other:
        assert engine.complete([request]) == other.complete([request])


def load_adapted(spec: object, base: object, step: object) -> torch.nn.Module:
    """The decoder with its adapter, filled by name."""
    from bevatron.nn.decoder import Decoder

    decoder = Decoder(spec)  # type: ignore[arg-type]
    for name, parameter in decoder.named_parameters():
        source = step if spec.adapter.owns(name) else base  # type: ignore[attr-defined]
        read = box_reader(source.folder, source.manifest, "model/")  # type: ignore[attr-defined]
        shape = tuple(parameter.shape)
        parameter.data.copy_(read(name, (0,) * len(shape), shape))
    return decoder


def test_another_base_is_refused(folder: Path, tmp_path: Path, pool: Pool) -> None:
    """At a resume and when it is read; a base that only moved is found where model.init says."""
    weights, moved = folder / "hf/model.safetensors", folder / "moved"
    kept = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    try:
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(BevatronError, match="is another model than it was"):
            open_weights(folder / "parts")
        with pytest.raises(AssertionError, match="is another model than it was"):
            pool.run(1, train, folder, *CHANGES, "run.dir=parts", "train.steps=7")
    finally:
        weights.write_bytes(kept)
    (folder / "hf").rename(moved)
    try:
        with pytest.raises(BevatronError, match="its base cannot be opened"):
            open_weights(folder / "parts")
        there = ("model={init: moved}", *CHANGES[1:], "run.dir=parts", "train.steps=7")
        pool.run(1, train, folder, *there)
        assert len(metrics(folder / "parts")) == 7
        assert open_weights(folder / "parts").base is not None
    finally:
        moved.rename(folder / "hf")


def test_what_cannot_be_is_refused_in_one_line(folder: Path) -> None:
    for options, says in (
        (
            ("adapter.rank=8", "run.dir=whole"),
            "whole/step-00000006 has other parameters",
        ),
        (("adapter.alpha=9", "run.dir=whole"), "other values of adapter.alpha"),
        (("adapter=null", "run.dir=whole"), "whole/step-00000006 has an adapter, and the config"),
        (("adapter.targets=[linear]",), "targets names linear, which no such layer has"),
        (("adapter.targets=[q_proj]",), "adapter.targets.0: Input should be 'qkv', 'o'"),
        (("adapter.layers=1-2",), "there is no layer 2; layers are 0 to 1"),
        (("adapter.layers=b",), "expected numbers of layers such as 16-31 or 3,5"),
        (("adapter.whole=[hed.*]",), "adapter.whole: hed.* is not a parameter of the model"),
        (("model={spec: spec.json}",), "adapter needs weights to adapt"),
    ):
        status, said = bevatron(folder, "train", "run.yaml", *CHANGES, "train.steps=9", *options)
        assert status == 2 and says in said and "Traceback" not in said, said
    for verb in ("merge", "export"):
        status, said = bevatron(folder, verb, "whole", "hf", "--overwrite")
        assert status == 2 and "must lie apart from the source" in said
