"""However attention is computed, it is the softmax over the keys that a query may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bevatron.nn import attention_kernels as module
from bevatron.nn import tiled_attention
from bevatron.nn.attention_kernels import Mask, attend, make_mask
from bevatron.nn.rank_communication import Context, Run
from bevatron.nn.tiled_attention import tiled

B, H, G, D, S = 2, 6, 3, 8, 48
# Two rows of documents: several, one of a single token; one document that is all.
DOCUMENTS = torch.stack((torch.tensor([0] * 7 + [1] + [4] * 21 + [2] * 19), torch.zeros(S).long()))


class Part(Context):
    """The share of a sequence that a context-parallel rank has."""

    size = 2

    def __init__(self, runs: tuple[Run, ...]) -> None:
        self.held = runs

    def runs(self, length: int) -> tuple[Run, ...]:
        return self.held

    def starts(self, documents: Tensor) -> Tensor:
        whole = super().starts(documents)
        return torch.cat([whole[:, a:b] for a, b in self.held], dim=1)


CONTEXTS = {
    "all": Context(),
    "outer": Part(((0, 12), (36, 48))),
    "inner": Part(((12, 24), (24, 36))),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5 queries and 7 keys: none fits into a document, and the last ones are cut."""
    for name, value in {"QUERIES": 5, "KEYS": 7, "SCORES": 1}.items():
        monkeypatch.setattr(tiled_attention, name, value)


def inputs(context: Context, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, S // context.size, D), (B, G, S, D), (B, G, S, D)
    made = [torch.randn(*s, generator=generator, dtype=torch.float32) for s in shapes]
    return tuple(x.to(dtype).requires_grad_() for x in made)


def plainly(q: Tensor, k: Tensor, v: Tensor, context: Context, documents: Tensor | None) -> Tensor:
    """The definition, one query after the other."""
    runs = context.runs(S // context.size)
    rows = []
    for b in range(B):
        for at, position in enumerate(p for run in runs for p in range(*run)):
            keys = [
                j
                for j in range(position + 1)
                if documents is None or documents[b, j] == documents[b, position]
            ]
            scores = q[b, :, at].unflatten(0, (G, -1)) @ k[b][:, keys].transpose(1, 2) / D**0.5
            rows.append((scores.softmax(-1) @ v[b][:, keys]).flatten(0, 1))
    return torch.stack(rows).unflatten(0, (B, -1)).transpose(1, 2)


def mask_of(context: Context, documents: Tensor | None, *, dense: bool) -> Mask:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSE", {"cpu": 2**20 if dense else 0})
        mask = make_mask(context, torch.zeros(1), S // context.size, documents)
    assert mask is not None and (mask.dense is not None) == dense
    return mask


def both(y: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An output and the gradients of a function of it."""
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return (y, *torch.autograd.grad((y.float() * weight).sum(), of))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "tiled"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["plain", "documents"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_output_and_gradients_are_those_of_the_definition(
    name: str, documents: Tensor | None, dense: bool
) -> None:
    context = CONTEXTS[name]
    if documents is None and name == "all":
        assert make_mask(context, torch.zeros(1), S) is None
        return
    of = inputs(context)
    got = both(attend(*of, mask_of(context, documents, dense=dense)), of)
    for a, b in zip(got, both(plainly(*of, context, documents), of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["outer", "inner"])
def test_one_causal_call_per_run_is_the_same(name: str) -> None:
    """What accelerators do; a CPU only shows that the numbers are right."""
    context = CONTEXTS[name]
    of = inputs(context)
    on_accelerator = make_mask(context, torch.zeros(1, device="meta"), S // 2)
    got = both(attend(*of, on_accelerator), of)
    for a, b in zip(got, both(plainly(*of, context, None), of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_tiles_of_bf16_are_as_good_as_its_rounding() -> None:
    """The computation is fp32; the gradient that comes in and what goes out are rounded to 8 bits:
    twice 2^-8 of the largest."""
    context, of = CONTEXTS["outer"], inputs(CONTEXTS["outer"], torch.bfloat16)
    got = both(attend(*of, mask_of(context, DOCUMENTS, dense=False)), of)
    exact = tuple(x.detach().float().requires_grad_() for x in of)
    for a, b in zip(got, both(plainly(*exact, context, DOCUMENTS), exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).abs().max() <= 2**-7 * b.abs().max()


def test_what_is_hidden_from_a_tile_of_queries_is_never_touched() -> None:
    """Infinite keys and NaN values there would show, masked or not: 0 * NaN is NaN."""
    documents = torch.tensor([[0] * 20 + [1] * 28]).expand(B, -1)
    q, k, v = (x.detach() for x in inputs(Context()))
    k[:, :, :20], v[:, :, :20] = float("inf"), float("nan")
    y = attend(q, k, v, mask_of(Context(), documents, dense=False))
    assert y[:, :, 20:].isfinite().all() and not y[:, :, :20].isfinite().any()


def test_long_sequences_have_no_mask_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16K tokens: no [T, S], be it of scores or of a mask."""
    monkeypatch.undo()
    sizes = []
    scores = tiled_attention._Block.scores
    monkeypatch.setattr(
        tiled_attention._Block, "scores", lambda *a: sizes.append((y := scores(*a)).numel()) or y
    )
    q, k, v = (torch.randn(1, n, 2**14, 4, requires_grad=True) for n in (2, 1, 1))
    documents = (torch.arange(2**14) // 1000)[None]
    mask = make_mask(Context(), q, 2**14, documents)
    assert mask is not None and mask.dense is None
    attend(q, k, v, mask).sum().backward()
    assert max(sizes) <= tiled_attention.SCORES
    least = 2 * 2 * 2**14 * 1000 / 2  # scores that are seen, forward and backward
    assert sum(sizes) < 1.5 * least


def test_the_operator_is_what_compilers_and_checkpoints_expect() -> None:
    of = inputs(CONTEXTS["outer"])
    mask = mask_of(CONTEXTS["outer"], DOCUMENTS, dense=False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(tiled, (*of, mask.starts, mask.blocks), test_utils=tests)


@pytest.mark.parametrize("way", ["dense", "tiled", "by runs"])
def test_compiled_without_a_break(way: str) -> None:
    """And once: a mask is made anew for every forward."""
    context = CONTEXTS["outer"]

    def mask() -> Mask | None:
        if way == "by runs":
            return make_mask(context, torch.zeros(1, device="meta"), S // 2)
        return mask_of(context, DOCUMENTS, dense=way == "dense")

    of = inputs(context)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            got = both(compiled(*of, mask()), of)
    for a, b in zip(got, both(attend(*of, mask()), of), strict=True):
        torch.testing.assert_close(a, b)
