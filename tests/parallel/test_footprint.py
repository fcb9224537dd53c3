"""The estimates of memory against what autograd really keeps, and the counts against placements."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bevatron.nn import vocabulary_loss
from bevatron.nn.decoder import Decoder, Layer
from bevatron.nn.rank_communication import LOCAL
from bevatron.nn.rope import rotation
from bevatron.nn.vocabulary_loss import cross_entropy_sum
from bevatron.parallel.compile_and_recompute import KEPT, prepare
from bevatron.parallel.layout import Layout
from bevatron.parallel.memory_footprint import bubble, head_bytes, layer_activations
from bevatron.spec import MLP, Attention, LayerSpec, Linear, ModelSpec

H, T = 256, 128
KINDS = {
    "grouped, gated": LayerSpec(Attention(4, 2, 64), MLP(704)),
    "ungated": LayerSpec(None, MLP(704, "relu2", gated=False)),
    "attention alone": LayerSpec(Attention(8, 8, 32), None),
    "linear": LayerSpec(Linear(), Linear()),
}
SPEC = ModelSpec(300, H, tuple(KINDS.values()))


class Kept:
    """Counts the bytes of distinct storages that autograd keeps, but for `known` ones."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.kept: dict[int, torch.Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.kept[pointer] = tensor
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.kept.values())


@pytest.mark.parametrize("index", range(len(KINDS)), ids=list(KINDS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_keeps_about_what_is_estimated(index: int, dtype: torch.dtype) -> None:
    """Never more than estimated; at least three quarters of it, so that the estimate is of use.
    (In fp32 a norm keeps one copy fewer, and what it was given is the residual stream.)"""
    layer = Layer(SPEC.layers[index], SPEC, LOCAL).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    rotations = {
        a.head_dim: rotation(SPEC.rope, a.head_dim, torch.arange(T)[None], dtype)
        for a in [SPEC.layers[index].attention]
        if isinstance(a, Attention)
    }
    x = torch.randn(1, T, H, dtype=dtype, requires_grad=True)
    angles = [t for pair in rotations.values() for t in pair]
    kept = Kept([*layer.parameters(), *angles])
    with kept.hooks:
        layer.run(x, rotations, None)
    estimate = T * layer_activations(SPEC, index, Layout(), dtype.itemsize, "none")
    assert 0.75 * estimate <= kept.nbytes <= 1.01 * estimate


def test_the_head_holds_about_what_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the gradients that its forward keeps; the chunk of logits is gone by then."""
    monkeypatch.setattr(vocabulary_loss, "CHUNK_LOGITS", 300 * 16)
    x = torch.randn(1, T, H, requires_grad=True)
    weight = torch.randn(300, H, requires_grad=True)
    kept = Kept([weight])
    with kept.hooks:
        cross_entropy_sum(x, weight, torch.zeros(1, T, dtype=torch.int64), LOCAL, None, 300)
    chunk = 3 * 4 * 300 * 16
    estimate = head_bytes(SPEC, Layout(), T, 4, 300 * 16)
    norm, accumulated = T * H * (4 + 4), 300 * H * 4
    assert kept.nbytes == estimate - chunk - norm - accumulated


def test_tensor_parallel_ranks_share_what_lies_between_their_products() -> None:
    """With sequence parallelism all but the gathered inputs is divided; empty layers keep
    nothing."""
    one = layer_activations(SPEC, 0, Layout(), 2, "none")
    two = layer_activations(SPEC, 0, Layout(tp=2), 2, "none")
    alone = layer_activations(SPEC, 0, Layout(tp=2, sequence_parallel=False), 2, "none")
    gathered = 2 * H * 2
    assert two == (one - gathered) / 2 + gathered
    assert one > alone > two
    assert layer_activations(SPEC, 0, Layout(tp=2), 2, "full") == H
    empty = ModelSpec(300, H, (LayerSpec(None, None),))
    assert layer_activations(empty, 0, Layout(), 2, "none") == 0


def test_selective_recomputation_keeps_about_what_is_estimated() -> None:
    """The input and the products' outputs, through the checkpoint that a run uses."""
    decoder = Decoder(SPEC, layers=[0], embed=False, head=False)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    prepare(decoder, "selective", compiled=False)
    x = torch.randn(1, T, H, requires_grad=True)
    angles = rotation(SPEC.rope, 64, torch.arange(T)[None], torch.float32)
    kept = layer_activations(SPEC, 0, Layout(), 4, "selective")
    everything = layer_activations(SPEC, 0, Layout(), 4, "none")
    assert 0.3 * everything < kept < 0.6 * everything

    class Seen(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func in KEPT:
                outs = out if isinstance(out, tuple) else (out,)
                self.nbytes += sum(o.nbytes for o in outs if isinstance(o, torch.Tensor))
            return out

    with Seen() as seen:
        decoder.layers["0"].run(x, {64: angles}, None)
    assert seen.nbytes + x.nbytes == pytest.approx(T * kept, rel=0.01)


def test_published_formulas_of_the_bubble() -> None:
    """Narayanan et al. (arXiv 2104.04473), section 2.2: idle over ideal time is (p - 1) / (v m)."""
    for p, m, v in ((4, 8, 1), (8, 64, 1), (8, 64, 4)):
        schedule = "1f1b" if v == 1 else "interleaved_1f1b"
        share = bubble(Layout(pp=p, schedule=schedule, virtual_stages=v), m)
        assert share / (1 - share) == pytest.approx((p - 1) / (v * m))
    assert bubble(Layout(pp=8, schedule="zbv"), 64) == 0
    assert bubble(Layout(), 8) == 0
