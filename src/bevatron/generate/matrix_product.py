"""The fastest product of a few vectors with a stored matrix, by device and dtype.

Decoding is bound by how fast weights are read, and torch's general products are far from that on
CPUs without bf16 arithmetic (gigaweights per second of one AVX2 core, 2816 x 512 ... 2048 x 8192):

    vectors                          1            8
    fp32 F.linear                  2.5-5.3      0.9-1.4
    fp32 transposed                3.7-5.7      0.7-1.3
    fp32 packed by oneDNN          2.9-3.9      1.7-2.2
    bf16 F.linear                  3.6-5.0      0.5-0.7
    int8 weights, bf16             6.7-8.8      1.8-2.4
    halves packed by FBGEMM        5.2-7.0      2.3-3.2

So fp32 matrices are kept in the layout that is fastest for one vector, and a second time, packed
for batches, if there is memory for it. 16-bit matrices are packed as halves where the CPU has no
bf16 arithmetic. Sums are fp32, and results are rounded to the dtype of the vectors, as in torch's
products.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Vectors up to which packed fp32 matrices are used. More are as fast without, and oneDNN keeps
# what it prepared for every number that it has seen.
BATCH = 16

LOST = 2.0**-16  # while a bf16 result is rounded by up to 2^-9
LARGEST = 15  # packed halves stay below 2^15

Matrix = Callable[[Tensor], Tensor]  # [N, in] -> [N, out]
ops: Any = torch.ops


class Plain:
    """As it is stored."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def fill(self, weight: Tensor) -> None:
        """Take other values, in the memory of the old ones."""
        self.weight.copy_(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Streamed:
    """fp32 on a CPU, of shape [out, in]: transposed if it is higher than wide, which one vector
    streams faster; `packed` besides, for several."""

    def __init__(self, weight: Tensor, packed: bool) -> None:
        out, width = weight.shape
        self.packed = ops.mkldnn._reorder_linear_weight(weight) if packed else None
        self.transposed = (weight.t().contiguous() if out > width else weight.t()).detach()

    def fill(self, weight: Tensor) -> None:
        """Take other values, in the memory of the old ones but for what oneDNN packs."""
        self.transposed.copy_(weight.t())
        if self.packed is not None:
            self.packed = None
            self.packed = ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None and 1 < len(x) <= BATCH:
            y: Tensor = ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
            return y
        return torch.mm(x, self.transposed)


class Halves:
    """Weights of 16 bits as fp16, packed by FBGEMM; vectors and sums are fp32 in between.

    Where fp16 would lose small weights, all are kept times a power of two, and vectors times its
    inverse, both of which are exact.

    Args:
        weight: [out, in] fp32; `factor`: that power of two, as of `halves_factor`.
    """

    def __init__(self, weight: Tensor, factor: float) -> None:
        self.undo = None if factor == 1 else torch.tensor([1 / factor])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.packed = ops.quantized.linear_prepack_fp16((weight * factor).contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float() if self.undo is None else torch.mul(x, self.undo)
        y: Tensor = ops.quantized.linear_dynamic_fp16(wide, self.packed)
        return y.to(x.dtype)


class Int8:
    """Weights rounded to 8 bits with a scale per row, on a CPU. A few vectors go through torch's
    packed kernel, which takes and gives bf16; for more, blocks of the matrix are widened again,
    with vectors and results rounded alike, so that an answer does not depend on how many run."""

    FEW, BLOCK = 16, 2**22  # vectors; elements

    def __init__(self, weight: Tensor) -> None:
        wide = weight.float()
        scale = (wide.abs().amax(1) / 127).clamp(min=1e-30)
        self.scale = scale.bfloat16()
        rounded = (wide / self.scale.float()[:, None]).round().clamp(-128, 127)
        self.weight = rounded.to(torch.int8).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        narrow = x.bfloat16()
        if len(x) <= self.FEW:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(narrow, self.weight, self.scale)
            return y.to(x.dtype)
        wide, rows = narrow.float(), max(1, self.BLOCK // self.weight.shape[1])
        parts = [F.linear(wide, block.float()) for block in self.weight.split(rows)]
        return (torch.cat(parts, 1) * self.scale.float()).bfloat16().to(x.dtype)


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 (AMX, AVX512-BF16, or ARM's)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def packs_halves() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def packs_fp32() -> bool:
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def matrix(
    weight: Tensor, *, batches: bool, int8: bool = False, old: Matrix | None = None
) -> Matrix:
    """The product with `weight` [out, in] for vectors of its dtype. What is chosen depends on the
    kind of CPU and not on a measurement: every start computes the same.

    Args:
        batches: keep fp32 weights packed for several vectors, besides: twice the memory.
        int8: round the weights.
        old: the product with weights of the same shape that are no longer needed. Its memory is
            used where its kind allows that.
    """
    if int8:
        return Int8(weight)
    if weight.device.type != "cpu":
        return _filled(old, weight) or Plain(weight)
    if weight.dtype == torch.float32:
        return _filled(old, weight) or Streamed(weight, batches and packs_fp32())
    if packs_halves() and not multiplies_bf16() and weight.numel():
        wide = weight.float()
        factor = halves_factor(wide)
        if factor is not None:
            return Halves(wide, factor)
    return Plain(weight)


def _filled(old: Matrix | None, weight: Tensor) -> Matrix | None:
    """`old` with these values, if it can take them."""
    if not isinstance(old, Plain | Streamed):
        return None
    old.fill(weight)
    return old


def halves_factor(weight: Tensor) -> float | None:
    """A power of two, 1 if that will do, times which fp16 holds weights [out, in] fp32 of 16 bits:
    every row but for at most LOST of its norm. None if there is none."""
    most = float(torch.linalg.vector_norm(weight, torch.inf))
    if not math.isfinite(most):
        return None
    least = float(torch.linalg.vector_norm(weight, dim=1).amin())
    if most < 2.0**LARGEST and least * LOST >= 2.0**-25 * math.sqrt(weight.shape[1]):
        return 1.0  # no weight is off by more than 2^-25
    full = 2.0 ** min(120, LARGEST - math.frexp(most)[1])  # the largest comes to 2^14 or more
    wide = weight * full
    norms = torch.linalg.vector_norm(wide, dim=1)
    for factor in (1.0, full):
        if most * factor < 2.0**LARGEST:
            lost = (weight * factor).half().float().mul_(full / factor).sub_(wide)
            if bool((torch.linalg.vector_norm(lost, dim=1) <= LOST * norms).all()):
                return factor
    return None
