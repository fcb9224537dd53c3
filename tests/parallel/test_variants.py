"""The loss with a block replaced is that of a model built with it, at every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bevatron.bridge.assemble import Cut, assemble
from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.nn.decoder import LEFT_OUT, Choice, Choices
from bevatron.parallel.forward_pass import forward, token_log_probabilities
from bevatron.parallel.layout import Layout
from bevatron.parallel.placed_weights import stream, stream_variants
from bevatron.parallel.placement import place
from bevatron.parallel.process_groups import mesh
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec, ParameterSpec
from tests.bridge.hf_folders import make
from tests.processes import Pool

IDS = torch.randint(0, 101, (2, 10), generator=torch.Generator().manual_seed(1))
# Made of some rows and columns of another model.
BLOCK = LayerSpec(Attention(2, 2, 8), MLP(20))
VARIANTS = {1: {"small": BLOCK}}
CHOICES: dict[str, Choices] = {
    "own": {},
    "small": {1: Choice("small", "small")},
    "its MLP": {1: Choice(mlp="small")},
    "its attention, no MLP": {1: Choice("small", None), 2: LEFT_OUT},
}


def block(source: ModelSpec, folder: Path, opened: Opened) -> Opened:
    """A checkpoint that has the block as its layer 1."""
    layers = (source.layers[0], BLOCK, source.layers[2])

    def part(parameter: ParameterSpec) -> tuple[Opened, Cut]:
        sizes = zip(opened.shapes[parameter.name], parameter.shape, strict=True)
        index = tuple(None if old == new else np.arange(new) for old, new in sizes)
        return opened, Cut(parameter.name, index)

    spec = replace(source, layers=layers)
    assemble(spec, part, folder, origin=opened, show_progress=False)
    return open_weights(folder)


def losses_at(root: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """As one of the ranks of a process group: log-probabilities of the next token, by choice."""
    model, small = open_weights(root / "model"), open_weights(root / "small")
    device = torch.device("cpu")
    options = {"device": device, "precision": "fp32", "seq_len": 10, "variants": VARIANTS}
    placed = place(model.spec, layout, mesh(layout, device), None, **options)
    stream(placed, model)
    stream_variants(placed, VARIANTS, lambda n: (small, n.replace(".variants.small", "")))
    assert not any("variants" in name for name in placed.trained)
    found = {}
    for name, choices in CHOICES.items():
        batch = {"labels": IDS.roll(-1, 1)}
        asked = forward(placed, [(IDS, batch)], token_log_probabilities, choices=choices)
        [one] = [f.end for f in asked]
        if one is not None:
            found[name] = one
    assert dist.is_initialized()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    make(root / "model", initializer_range=0.2)
    make(root / "other", initializer_range=0.2)
    opened = open_weights(root / "model")
    block(opened.spec, root / "small", open_weights(root / "other"))
    return root


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, dp_shard=2), Layout(pp=2)], ids=str)
def test_a_block_is_replaced_in_a_placed_model(root: Path, layout: Layout, pool: Pool) -> None:

    found = [f for f in pool.run(layout.world_size, losses_at, root, layout) if f]
    assert found
    model, _ = load_decoder(root / "model", dtype=torch.float32)
    small, _ = load_decoder(root / "small", dtype=torch.float32)
    wanted = {}
    for name, choices in CHOICES.items():
        with torch.no_grad():
            x = model.embed(IDS)
            rotations = model.rotations(torch.arange(10)[None], x.dtype, 10)
            for i, layer in model.layers.items():
                choice = choices.get(int(i), Choice())
                parts = {"own": layer, "small": small.layers[i]}
                if choice.attention is not None:
                    x = parts[choice.attention].attend(x, rotations, None)
                if choice.mlp is not None:
                    x = parts[choice.mlp].feed(x, rotations, None)
            logits = model.head(model.final_norm(x), model.to_logits)
        wanted[name] = logits.log_softmax(-1).gather(-1, IDS.roll(-1, 1)[..., None])[..., 0]
    assert len({tuple(w.flatten().tolist()) for w in wanted.values()}) == len(CHOICES)
    for each in found:
        for name, values in each.items():
            torch.testing.assert_close(values, wanted[name], rtol=1e-5, atol=1e-5)
