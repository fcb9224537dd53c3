"""An adapter merged into its model for good: `bevatron merge RUN DST`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bevatron.bridge.assemble import Cut, assemble
from bevatron.bridge.open_weights import Opened, merged_step


def merge_adapter(
    step: Opened, dst: str | Path, *, overwrite: bool = False, show_progress: bool = True
) -> tuple[Opened, dict[str, Any]]:
    """Write the base of an adapter's step, with the adapter merged in, as a native checkpoint.

    Each weight is computed in float64, rounded to fp32, and once to the base's dtype; memory holds
    a few megabytes of each. Tokenizer and other files are the step's.

    Args:
        step: as `open_step` gives it.
    Returns the merged model, and what reading everything back showed. Raises BevatronError, and
    leaves nothing at `dst`, if the base is gone or changed, and as `assemble` does."""
    opened = merged_step(step, check=True)
    verified = assemble(
        opened.spec,
        lambda parameter: (opened, Cut(parameter.name)),
        dst,
        origin=opened,
        family=opened.manifest.family,
        title="merging",
        overwrite=overwrite,
        show_progress=show_progress,
    )
    return opened, verified
