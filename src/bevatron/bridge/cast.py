"""Changing the dtype of tensors, and counting what is no number: a buffer at a time, with numpy
and without torch.

Rounding is to nearest, ties to even, as torch's `.to()` does. NaN stays NaN; what is too large for
float16 becomes infinity and is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bevatron.errors import BevatronError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
NAMES |= {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


# Width in bytes and the bits of infinity: what is as large or larger, the sign apart, is no number.
_INFINITY = {"F64": (8, 0x7FF << 52), "F32": (4, 0xFF << 23), "F16": (2, 0x1F << 10)}
_INFINITY |= {"BF16": (2, 0xFF << 7)}


def parse_dtype(name: str) -> str:
    """bf16, fp16 or fp32 -> as safetensors spells it."""
    if name not in NAMES:
        raise BevatronError(f"dtype {name!r} is not one of bf16, fp16, fp32")
    return NAMES[name]


class Converter:
    """Converts buffers of elements from one dtype to another; counts overflows to infinity."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        self.overflows = 0

    def __call__(self, data: memoryview) -> memoryview:
        """The converted bytes of whole elements, in a new buffer."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            values = self._decode(data)
            converted = self._encode(values)
            if self.new == "F16":
                lost = np.isinf(converted) & np.isfinite(values)
                self.overflows += int(np.count_nonzero(lost))
        return converted.view("u1").data

    def _decode(self, data: memoryview) -> NDArray[Any]:
        import numpy as np

        if self.old == "BF16":
            return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
        return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.old])

    def _encode(self, values: NDArray[Any]) -> NDArray[Any]:
        import numpy as np

        if self.new != "BF16":
            if self.old == "F64" and self.new == "F16":
                values = values.astype("<f4")  # torch rounds by way of float32, so twice
            return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.new])
        bits = values.astype("<f4").view("<u4")
        even = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype("<u2")
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        quiet = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype("<u2")
        return np.where(nan, quiet, rounded)


class NonFinite:
    """Counts NaN and infinite values in buffers of one floating dtype.

    Read as unsigned integers the negative ones are the largest of all, read as signed ones the
    positive ones are: two maxima, which cost 0.04 s per GB and no memory, tell if there are any."""

    def __init__(self, dtype: str) -> None:
        self._width, self._infinity = _INFINITY[dtype]
        self._negative = self._infinity | 1 << (8 * self._width - 1)
        self.count = 0

    def update(self, data: memoryview, /) -> None:
        """Look through the bytes of whole elements."""
        import numpy as np

        bits = np.frombuffer(data, f"<u{self._width}")
        if bits.max() >= self._negative or bits.view(f"<i{self._width}").max() >= self._infinity:
            exponent = bits.dtype.type(self._infinity)
            self.count += int(np.count_nonzero((bits & exponent) == exponent))
