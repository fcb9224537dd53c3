"""What a conversion says about itself, and the progress it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from bevatron.bridge.hf_folder import shown


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of an import or export.

    Attributes:
        parameters: elements of the model; `tensors`, `nbytes`: of the HF side, as written or read.
        dtype: of most bytes, in config.json's spelling; `step`: of the native checkpoint.
        verified: what reading everything back showed: {tensors, equal, by}.
        identical: an export of unmodified weights into the files that they were imported from.
        skipped: source tensors and files not taken along, with the reason.
        non_finite: Hugging Face tensor -> how many of its values are NaN or infinite, if any.
        notes: what the user should know, one sentence each.
    """

    source: str
    target: str
    family: str
    parameters: int
    tensors: int
    nbytes: int
    dtype: str
    step: int
    files: int
    seconds: float
    verified: dict[str, Any] = field(default_factory=dict)
    identical: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        values = asdict(self)
        values["bytes"] = values.pop("nbytes")
        return values


def accepted_notes(fields: Mapping[str, Any]) -> list[str]:
    """What to tell the user about fields of config.json that he said do nothing."""
    return [
        f"config.json: {name} = {value!r:.80} is not understood and was accepted by name; readers "
        "that know it may compute otherwise"
        for name, value in fields.items()
    ]


def non_finite_notes(counts: Mapping[str, int]) -> list[str]:
    """What to tell the user about tensors with such values, if there are any."""
    if not counts:
        return []
    listed = shown([f"{name} ({count})" for name, count in counts.items()])
    many = "1 tensor holds" if len(counts) == 1 else f"{len(counts)} tensors hold"
    return [f"{many} NaN or infinite values: {listed}; they were kept as they are"]


@contextmanager
def shown_progress(title: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """The program's progress bar over `total` bytes, if it is to be shown."""
    from bevatron.progress import progress

    with progress(title, total=total, unit="B", show=show) as advance:
        yield advance
