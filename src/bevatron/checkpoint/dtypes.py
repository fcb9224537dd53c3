"""Dtypes: their names and sizes, rounding from one to another, and counting NaN and infinity.

Everything here works on bytes, a buffer at a time, with numpy and without torch. Rounding is to
nearest, ties to even, as in torch's `.to()`. NaN stays NaN; a value that is too large for float16
becomes infinity and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from bevatron.errors import BevatronError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Kind(NamedTuple):
    """A dtype. `name`: torch's, which config.json has too; `nbytes`: of one element; `numpy`:
    numpy's name, or of bits that numpy has no numbers for (bfloat16), the integer's."""

    name: str
    nbytes: int
    numpy: str


# Every dtype that occupies whole bytes, under the name that safetensors gives it, as all code here
# calls it. (A packed one is refused by the reader of headers.)
KINDS = {
    "F64": Kind("float64", 8, "<f8"),
    "F32": Kind("float32", 4, "<f4"),
    "F16": Kind("float16", 2, "<f2"),
    "BF16": Kind("bfloat16", 2, "<u2"),
    "I64": Kind("int64", 8, "<i8"),
    "I32": Kind("int32", 4, "<i4"),
    "I16": Kind("int16", 2, "<i2"),
    "I8": Kind("int8", 1, "<i1"),
    "U64": Kind("uint64", 8, "<u8"),
    "U32": Kind("uint32", 4, "<u4"),
    "U16": Kind("uint16", 2, "<u2"),
    "U8": Kind("uint8", 1, "<u1"),
    "BOOL": Kind("bool", 1, "?"),
    "C64": Kind("complex64", 8, "<c8"),
    "F8_E4M3": Kind("float8_e4m3fn", 1, "<u1"),
    "F8_E5M2": Kind("float8_e5m2", 1, "<u1"),
    "F8_E8M0": Kind("float8_e8m0fnu", 1, "<u1"),
    "F8_E4M3FNUZ": Kind("float8_e4m3fnuz", 1, "<u1"),
    "F8_E5M2FNUZ": Kind("float8_e5m2fnuz", 1, "<u1"),
}
ITEMSIZE = {name: kind.nbytes for name, kind in KINDS.items()}
# Those that a native checkpoint may hold, and those that its parameters may have.
NATIVE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
FLOATS = {name: KINDS[name].name for name in NATIVE[:4]}
_SHORT = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

# The bits of infinity: what is as large or larger, the sign apart, is no number.
_INFINITY = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}


def parse_dtype(name: str) -> str:
    """bf16, fp16 or fp32 (or bfloat16, ...) -> as safetensors spells it."""
    for short, known in _SHORT.items():
        if name in (short, FLOATS[known]):
            return known
    raise BevatronError(f"dtype {name!r} is not one of bf16, fp16, fp32")


def dtype_named(name: str) -> str | None:
    """A floating dtype as config.json or torch names it -> as safetensors does, or None."""
    plain = name.removeprefix("torch.")
    return next((known for known, said in FLOATS.items() if said == plain), None)


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """What a config.json says the weights are, as it spells it; None if it says nothing."""
    named = config.get("dtype") or config.get("torch_dtype")
    return named.removeprefix("torch.") if isinstance(named, str) else None


def main_dtype(tensors: Iterable[tuple[str, int]]) -> str:
    """The floating dtype of most elements, as config.json spells it. `tensors`: dtype, elements."""
    counts: Counter[str] = Counter()
    for dtype, numel in tensors:
        if dtype in FLOATS:
            counts[dtype] += numel
    return FLOATS[counts.most_common(1)[0][0]]


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
        return np.frombuffer(data, KINDS[self.old].numpy)

    def _encode(self, values: NDArray[Any]) -> NDArray[Any]:
        import numpy as np

        if self.new != "BF16":
            if self.old == "F64" and self.new == "F16":
                values = values.astype("<f4")  # torch rounds by way of float32, so twice
            return values.astype(KINDS[self.new].numpy)
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
        self._width, self._infinity = ITEMSIZE[dtype], _INFINITY[dtype]
        self._negative = self._infinity | 1 << (8 * self._width - 1)
        self.count = 0

    def update(self, data: memoryview, /) -> None:
        """Look through the bytes of whole elements."""
        import numpy as np

        bits = np.frombuffer(data, f"<u{self._width}")
        if bits.max() >= self._negative or bits.view(f"<i{self._width}").max() >= self._infinity:
            exponent = bits.dtype.type(self._infinity)
            self.count += int(np.count_nonzero((bits & exponent) == exponent))
