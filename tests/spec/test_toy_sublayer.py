"""A kind of sublayer from outside: all that a file of one's own can do without touching the
library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bevatron.bridge.inspect import inspect
from bevatron.checkpoint.rank_tables import merge_tables
from bevatron.checkpoint.save_and_load import Saved, write_rank
from bevatron.compress.importance_scores import Scores, expected
from bevatron.compress.kept_indices import cut, keep
from bevatron.compress.pruned_spec import Shape
from bevatron.errors import BevatronError
from bevatron.families import FamilyError, by_name
from bevatron.generate.decoding_sublayers import DECODINGS, Place
from bevatron.generate.decoding_weights import Reader
from bevatron.generate.engine import Engine
from bevatron.generate.request import Request
from bevatron.nn.decoder import MODULES, Decoder
from bevatron.nn.linear_map import LinearMap
from bevatron.nn.rank_communication import Comm
from bevatron.nn.rope import Rotations
from bevatron.parallel.layout import Layout, LayoutError, check
from bevatron.parallel.memory_footprint import layer_activations
from bevatron.parallel.random_weights import fill
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import MLP, Attention, Init, LayerSpec, ModelSpec, ParameterSpec, SpecError
from bevatron.spec.count import layer_flops, parameter_count
from bevatron.spec.json import from_json, to_json
from bevatron.spec.sublayer import KINDS, Sublayer, uneven_cut

# --- what a user writes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank(Sublayer, kind="low_rank", places=("attention", "mlp")):
    """down(tanh(up(x))) in `rank` dimensions."""

    unit = "ranks"
    unit_field = "rank"

    rank: int

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        up, down = (self.rank, hidden_size), (hidden_size, self.rank)
        yield ParameterSpec(f"{prefix}.up.weight", up, "up", ("units", "hidden"))
        yield ParameterSpec(f"{prefix}.down.weight", down, "down", ("hidden", "units"))

    def cut(self, name: str, tp: int) -> int | None:
        return 0 if name == "up.weight" else 1

    def cut_problem(self, place: str, tp: int) -> str | None:
        return uneven_cut(f"{place}: rank", self.rank, tp)

    def activation_bytes(self, itemsize: int, tp: int, cp: int) -> float:
        return self.rank * itemsize / tp

    def product_bytes(self, itemsize: int, tp: int) -> float:
        return self.rank * itemsize / tp

    def describe(self) -> str:
        return f"rank {self.rank}"


class LowRankModule(nn.Module):
    tap: Any = None

    def __init__(self, spec: LowRank, model: ModelSpec, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.up = LinearMap(spec.rank, model.hidden_size)
        self.down = LinearMap(model.hidden_size, spec.rank)

    def forward(self, x: Tensor, rotations: Rotations, mask: Any = None) -> Tensor:
        y = self.up.product(self.comm.enter(x), self.comm.view).tanh()
        if self.tap is not None:
            self.tap(y)
        return self.down.reduced(y, self.comm)


class DecodeLowRank:
    def __init__(self, spec: LowRank, index: int, part: str, reader: Reader) -> None:
        self.up = reader.matrix(f"layers.{index}.{part}.up.weight")
        self.down = reader.matrix(f"layers.{index}.{part}.down.weight")

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        return place.ranks.sum_(self.down(self.up(x).tanh()))


# --------------------------------------------------------------------------------------------------

SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    layers=(
        LayerSpec(Attention(4, 2, 8), LowRank(6)),
        LayerSpec(LowRank(5), MLP(48)),
        LayerSpec(Attention(4, 4, 8), None),
    ),
    init=Init(std=0.3),
)
IDS = [3, 14, 15, 9, 26, 5]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "low_rank", LowRankModule)
    monkeypatch.setitem(DECODINGS, "low_rank", DecodeLowRank)


@pytest.fixture
def native(tmp_path: Path, registered: None) -> Path:
    decoder, known = Decoder(SPEC), {p.name: p for p in SPEC.parameters()}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            fill(parameter, known[name], SPEC, 1)
    saved = [
        Saved(f"model/{name}", p, p.detach(), torch.float32)
        for name, p in decoder.named_parameters()
    ]
    write_rank(tmp_path, saved, 0)
    manifest = merge_tables(tmp_path, 1, "llama_nemotron", 0)
    (tmp_path / "spec.json").write_text(to_json(SPEC))
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def test_a_kind_of_ones_own_is_written_counted_cut_and_described(native: Path) -> None:
    assert '{"kind": "low_rank", "rank": 6}' in to_json(SPEC)
    assert from_json(to_json(SPEC)) == SPEC
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.rank: missing"):
        from_json(to_json(SPEC).replace(', "rank": 6', ""))
    assert parameter_count(SPEC) == sum(p.numel() for p in Decoder(SPEC).parameters())
    attention = Attention(4, 2, 8).flops(32, 10, True)
    assert layer_flops(SPEC, 0, 10, causal=True) == attention + 2 * 2 * 6 * 32
    cuts = {p.name: SPEC.cut(p, 2) for p in SPEC.parameters() if "mlp" in p.name}
    assert cuts["layers.0.mlp.up.weight"] == 0
    assert cuts["layers.0.mlp.down.weight"] == 1
    assert cuts["layers.0.mlp_norm.weight"] is None
    sizes = {"seq_len": 8, "global_batch": 4, "micro": 1}
    check(Layout(tp=2), SPEC, **sizes)
    with pytest.raises(LayoutError, match=r"layers\.0\.mlp: rank 6 leaves a rank of tp=4"):
        check(Layout(tp=4), SPEC, **sizes)
    one, two = (layer_activations(SPEC, 0, Layout(tp=tp), 2, "selective") for tp in (1, 2))
    assert one > two > 0
    found = inspect(native)
    assert found["attention"]["rank 5"] == found["mlp"]["rank 6"] == 1


def test_the_decoder_and_the_engine_compute_it_alike(native: Path) -> None:
    decoder, _ = load_decoder(native)
    ids = list(IDS)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(decoder.logits(torch.tensor([ids]))[0, -1].argmax()))
    with Engine.open(native) as engine:
        requests = [Request(tuple(IDS), 12), Request((7, 7), 5)]
        assert engine.complete(requests)[0].tokens == ids[len(IDS) :]


def test_it_is_trained(registered: None) -> None:
    decoder, known = Decoder(SPEC), {p.name: p for p in SPEC.parameters()}
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            fill(parameter, known[name], SPEC, 1)
    decoder.logits(torch.tensor([IDS])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_what_does_not_know_it_says_so(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FamilyError, match=r"layers\.0\.mlp is low_rank"):
        by_name("llama_nemotron").config(SPEC, "float32")
    monkeypatch.delitem(DECODINGS, "low_rank")
    with pytest.raises(BevatronError, match=r"layers\.0\.mlp is of kind 'low_rank'"):
        Engine.open(native)
    monkeypatch.delitem(MODULES, "low_rank")
    with pytest.raises(BevatronError, match="nothing computes sublayers of kind 'low_rank'"):
        Decoder(SPEC)
    monkeypatch.delitem(KINDS, "low_rank")
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.kind: found \"low_rank\""):
        from_json(to_json(SPEC))


def test_a_kind_has_one_class_and_its_places() -> None:
    with pytest.raises(SpecError, match="'mlp' is MLP already"):
        type("Other", (LowRank,), {}, kind="mlp", places=("mlp",))
    with pytest.raises(SpecError, match="'mlp' is no attention"):
        LayerSpec(MLP(8), None)


def test_pruning_leaves_out_its_units_and_its_hidden_channels() -> None:
    """Which rows and columns of it stay follows from what its parameters say of their axes."""
    narrow = replace(
        SPEC, hidden_size=16, layers=(LayerSpec(Attention(2, 2, 8), LowRank(4)), *SPEC.layers[1:])
    )
    rng = np.random.default_rng(0)
    tensors = {n: rng.random(s, dtype=np.float32) for n, s in expected(SPEC).items()}
    assert tensors["layers.0.mlp.ranks"].shape == (6,)
    kept = keep(SPEC, Shape((0, 1, 2), narrow), Scores(tensors))
    best = np.sort(np.argsort(-tensors["layers.0.mlp.ranks"])[:4])
    assert kept.units[0]["mlp"].tolist() == best.tolist()
    cuts = {p.name: cut(SPEC, kept, "none", p).index for p in narrow.parameters()}
    up, down = cuts["layers.0.mlp.up.weight"], cuts["layers.0.mlp.down.weight"]
    assert [i.tolist() for i in up if i is not None] == [best.tolist(), kept.hidden.tolist()]
    assert [i.tolist() for i in down if i is not None] == [kept.hidden.tolist(), best.tolist()]
    whole, hidden = cuts["layers.1.attention.up.weight"]  # as wide as it was
    assert whole is None and hidden is not None and len(hidden) == 16
