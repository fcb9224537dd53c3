"""A layer may be one of several, and a linear map more than its weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bevatron.nn.decoder import LEFT_OUT, Choice, Decoder
from bevatron.nn.linear_map import LinearMap
from bevatron.spec import MLP, Attention, LayerSpec, Linear, ModelSpec
from tests.specs import ALL, HOMOGENEOUS

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
# Of attention alone, of an MLP alone, of both; some with another head_dim and other biases.
LIBRARY = {
    "fewer_heads": LayerSpec(Attention(2, 2, 16, qkv_bias=True), None),
    "matrices": LayerSpec(Linear(), Linear()),
    "narrow": LayerSpec(None, MLP(20)),
}
# A choice, and the layer that it makes of one of HOMOGENEOUS.
CHOICES = {
    "both of their own": (Choice(), LayerSpec(Attention(4, 2, 8), MLP(48))),
    "another attention": (Choice("fewer_heads"), replace(LIBRARY["fewer_heads"], mlp=MLP(48))),
    "another MLP": (Choice(mlp="narrow"), LayerSpec(Attention(4, 2, 8), MLP(20))),
    "one of each": (Choice("fewer_heads", "narrow"), LayerSpec(Attention(2, 2, 16, True), MLP(20))),
    "one matrix": (Choice("matrices"), LayerSpec(Linear(), MLP(48))),
    "a whole variant": (Choice("matrices", "matrices"), LayerSpec(Linear(), Linear())),
    "no attention": (Choice(None), LayerSpec(None, MLP(48))),
    "no MLP": (Choice(mlp=None), LayerSpec(Attention(4, 2, 8), None)),
    "nothing": (LEFT_OUT, LayerSpec(None, None)),
}


def filled(spec: ModelSpec, **more: Any) -> Decoder:
    decoder = Decoder(spec, **more)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return decoder.requires_grad_(False)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_forward_computes_the_variants_that_it_chooses(choice: str) -> None:
    decoder = filled(HOMOGENEOUS, variants=dict.fromkeys((1, 2), LIBRARY))
    own = decoder.logits(IDS)
    chosen, layer = CHOICES[choice]
    layers = list(HOMOGENEOUS.layers)
    layers[2] = layer
    alone = Decoder(replace(HOMOGENEOUS, layers=tuple(layers))).requires_grad_(False)
    known = dict(decoder.named_parameters())
    for name, parameter in alone.named_parameters():
        source = name
        if name.startswith("layers.2."):
            which = chosen.attention if ".attention" in name else chosen.mlp
            source = name if which == "own" else f"layers.2.variants.{which}.{name[9:]}"
        parameter.copy_(known[source])
    found = decoder.logits(IDS, choices={2: chosen})
    assert torch.equal(found, alone.logits(IDS))
    assert torch.equal(found, own) == (chosen == Choice())
    assert torch.equal(decoder.logits(IDS), own)


class Adapted:
    """An adapter of a test's own: what the product of a linear map becomes with it."""

    def __init__(self, linear: LinearMap, generator: torch.Generator) -> None:
        *rows, columns = linear.weight.shape
        self.down = torch.randn(2, columns, generator=generator) * 0.1
        self.up = torch.randn(*rows, 2, generator=generator) * 0.1
        self.before, self.used = linear.product, False

    def product(self, x: Tensor, here: Any, chosen: Any = None, *, biased: bool = True) -> Tensor:
        self.used = True
        low = F.linear(x, self.down)
        up = here(self.up) if chosen is None else chosen(here(self.up))
        return self.before(x, here, chosen, biased=biased) + F.linear(low, up)


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_extends_every_linear_map_by_its_product(name: str) -> None:
    decoder, merged = filled(ALL[name]), filled(ALL[name])
    generator = torch.Generator().manual_seed(2)
    adapters = []
    for path, module in decoder.named_modules():
        if isinstance(module, LinearMap):
            adapter = Adapted(module, generator)
            module.product = adapter.product  # type: ignore[method-assign]
            adapters.append(adapter)
            merged.get_submodule(path).weight += adapter.up @ adapter.down
    torch.testing.assert_close(decoder.logits(IDS), merged.logits(IDS))
    assert adapters and all(adapter.used for adapter in adapters)
    layers = {n: p for n, p in merged.named_parameters() if n.startswith("layers.")}
    assert len(adapters) == sum(n.endswith("weight") and p.dim() > 1 for n, p in layers.items())
