"""`bevatron report`: what runs did, on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bevatron.checkpoint.new_folder import replace_text
from bevatron.errors import BevatronError
from bevatron.train.report.run_reading import read_run, unique_names


def report(
    runs: Sequence[Path], output: Path | None = None, *, as_json: bool = False
) -> dict[str, Any] | Path:
    """Write a page about runs, side by side if there are several.

    Args:
        runs: run folders.
        output: the file; by default `report.html` in the run folder, or here for several runs.
        as_json: return the headline numbers, events and checkpoints instead, and write nothing.
    Raises BevatronError for a folder that holds no run.
    """
    records = [read_run(Path(run)) for run in runs]
    unique_names(records)
    if as_json:
        return {"runs": [r.to_dict() for r in records]}
    from bevatron.train.report.report_page import page

    target = output or (records[0].path if len(records) == 1 else Path()) / "report.html"
    if target.is_dir():
        raise BevatronError(f"{target}: is a folder; name a file, such as {target / 'report.html'}")
    if not target.parent.is_dir():
        raise BevatronError(f"{target}: there is no folder {target.parent}")
    replace_text(target, page(records))
    return target
