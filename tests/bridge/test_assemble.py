"""Checkpoints made of parts of others are those parts, and models like any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from bevatron.bridge.assemble import PAD, AssemblyError, Cut, assemble
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec, ParameterSpec
from tests.bridge.hf_folders import make, rewrite

IDS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Opened, Opened]:
    """A native checkpoint and a Hugging Face folder of another model, of the same sizes."""
    root = tmp_path_factory.mktemp("two")
    make(root / "a-hf")
    make(root / "b")
    rewrite(root / "b", lambda t: [v.mul_(1.5).add_(0.01) for v in t.values()])
    import_checkpoint(root / "a-hf", root / "a", show_progress=False)
    return root, open_weights(root / "a"), open_weights(root / "b")


def exported(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The state dict of the exported model, and its logits in transformers."""
    export_checkpoint(folder, folder.parent / "out", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "out").eval()
    with torch.no_grad():
        return dict(model.state_dict()), model(IDS).logits


def stored(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return load_file(root / "a-hf" / "model.safetensors"), load_file(root / "b/model.safetensors")


def check(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Tensor by tensor, and what transformers computes with them."""
    found, logits = exported(folder)
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []
    config = transformers.AutoConfig.from_pretrained(folder.parent / "out")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(wanted)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_sublayers_of_two_checkpoints_make_one_model(
    two: tuple[Path, Opened, Opened], tmp_path: Path
) -> None:
    root, a, b = two

    def part(parameter: ParameterSpec) -> tuple[Opened, Cut]:
        return (b if ".mlp" in parameter.name else a), Cut(parameter.name)

    verified = assemble(a.spec, part, tmp_path / "x", origin=a, show_progress=False)
    assert verified["equal"] and verified["tensors"] == len(a.shapes)
    ours, theirs = stored(root)
    own = {n: theirs[n] if "mlp" in n or "post_attention" in n else t for n, t in ours.items()}
    check(tmp_path / "x", own)
    record = json.loads((tmp_path / "x" / "assembly.json").read_text())
    assert [c["path"] for c in record["checkpoints"]] == [str(root / "a"), str(root / "b")]
    assert record["parameters"]["layers.1.mlp.down.weight"] == [1, "layers.1.mlp.down.weight"]
    facts = json.loads((tmp_path / "out" / "bevatron.json").read_text())
    assert "weights changed" in facts["done"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        root / "a-hf" / "tokenizer.json"
    ).read_bytes()


def test_layers_of_another_checkpoint_go_in_between(
    two: tuple[Path, Opened, Opened], tmp_path: Path
) -> None:
    """A deeper model: a's layers 0, 1 and 2 with b's last two between, by their new order."""
    root, a, b = two
    order = [(a, 0), (b, 1), (b, 2), (a, 1), (a, 2)]
    spec = replace(a.spec, layers=tuple(o.spec.layers[i] for o, i in order))

    def part(parameter: ParameterSpec) -> tuple[Opened, Cut]:
        _, *rest = words = parameter.name.split(".")
        if words[0] != "layers":
            return a, Cut(parameter.name)
        opened, old = order[int(rest[0])]
        return opened, Cut(".".join(["layers", str(old), *rest[1:]]))

    assemble(spec, part, tmp_path / "x", origin=a, show_progress=False)
    ours, theirs = stored(root)
    wanted = {n: t for n, t in ours.items() if ".layers." not in n}
    for new, (opened, old) in enumerate(order):
        for name, tensor in (ours if opened is a else theirs).items():
            if f".layers.{old}." in name:
                wanted[name.replace(f".layers.{old}.", f".layers.{new}.")] = tensor
    check(tmp_path / "x", wanted)


def narrowed(spec: ModelSpec) -> ModelSpec:
    layers = [replace(x, mlp=replace(x.mlp, intermediate_size=20)) for x in spec.layers]
    return replace(spec, layers=tuple(layers))


def test_parts_are_cut_changed_and_filled_up(
    two: tuple[Path, Opened, Opened], tmp_path: Path
) -> None:
    """MLPs of b, 17 of their neurons in another order with zeros behind, outputs halved."""
    root, a, b = two
    kept = np.random.default_rng(0).permutation(48)[:17]
    index = np.concatenate([kept, [PAD] * 3])

    def part(parameter: ParameterSpec) -> tuple[Opened, Cut]:
        if parameter.name.endswith("gate_up.weight"):
            return b, Cut(parameter.name, (None, index, None))
        if parameter.name.endswith("down.weight"):
            return b, Cut(parameter.name, (None, index), lambda values: values / 2)
        return a, Cut(parameter.name)

    assemble(narrowed(a.spec), part, tmp_path / "x", origin=a, show_progress=False)
    wanted, theirs = stored(root)
    for name in [n for n in wanted if "_proj" in n and "mlp" in n]:
        value = theirs[name].T if "down" in name else theirs[name]
        value = torch.cat([value[kept], torch.zeros(3, 32)])
        wanted[name] = (value.T / 2).contiguous() if "down" in name else value
    check(tmp_path / "x", wanted)


def test_what_fits_together_in_no_family_can_be_used_here(
    two: tuple[Path, Opened, Opened], tmp_path: Path
) -> None:
    """A llama with a layer that is narrower: the family that can say it is chosen."""
    _, a, _ = two
    mlp = replace(a.spec.layers[0].mlp, intermediate_size=32)
    spec = replace(a.spec, layers=(replace(a.spec.layers[0], mlp=mlp), *a.spec.layers[1:]))
    index = np.arange(32)
    cuts = {"gate_up.weight": (None, index, None), "down.weight": (None, index)}

    def part(parameter: ParameterSpec) -> tuple[Opened, Cut]:
        first = parameter.name.startswith("layers.0.mlp.")
        return a, Cut(parameter.name, cuts[parameter.name[13:]] if first else None)

    assemble(spec, part, tmp_path / "x", origin=a, show_progress=False)
    made = open_native(tmp_path / "x")
    assert made.spec == spec
    assert not (tmp_path / "x" / "assembly.json").exists()  # all from one


WRONG = {
    "no such part": (lambda n: Cut(n.replace("layers.2", "layers.7")), "has no parameter layers.7"),
    "another shape": (
        lambda n: Cut(n, (np.arange(5), None)) if n.endswith("o.weight") else Cut(n),
        r"attention\.o\.weight \[32, 32\] gives \[5, 32\], but .* is \[32, 32\]",
    ),
    "another rank": (
        lambda n: Cut(n, (None,)) if n.endswith("o.weight") else Cut(n),
        "gives no cut of it",
    ),
    "an entry beyond": (
        lambda n: Cut(n, (np.arange(32) + 1,)) if n == "final_norm.weight" else Cut(n),
        r"final_norm\.weight \[32\], for final_norm\.weight: has no entry 32; expected 0 to 31",
    ),
    "zeros in between": (
        lambda n: Cut(n, (np.arange(32) - 1,)) if n == "final_norm.weight" else Cut(n),
        "can stand at the end of an index only",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_parts_that_make_no_model_are_refused_before_anything_is_written(
    two: tuple[Path, Opened, Opened], tmp_path: Path, wrong: str
) -> None:
    _, a, _ = two
    cut, says = WRONG[wrong]
    with pytest.raises(AssemblyError, match=says):
        assemble(a.spec, lambda p: (a, cut(p.name)), tmp_path / "x", origin=a)
    assert not list(tmp_path.iterdir())


def test_every_source_is_watched_and_kept_apart(
    two: tuple[Path, Opened, Opened], tmp_path: Path
) -> None:
    root, a, _ = two
    shutil.copytree(root / "b", tmp_path / "b")
    b = open_weights(tmp_path / "b")
    weights = tmp_path / "b" / "model.safetensors"

    def part(parameter: ParameterSpec) -> tuple[Opened, Cut]:
        def touched(values: np.ndarray) -> np.ndarray:
            weights.write_bytes(weights.read_bytes())
            return values

        last = parameter.name == "final_norm.weight"
        return (b, Cut(parameter.name, None, touched)) if last else (a, Cut(parameter.name))

    with pytest.raises(BevatronError, match=r"model\.safetensors: changed while it was being read"):
        assemble(a.spec, part, tmp_path / "x", origin=a, show_progress=False)
    with pytest.raises(BevatronError, match="must lie apart from the source"):
        assemble(b.spec, part, tmp_path / "b" / "x", origin=a, show_progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
