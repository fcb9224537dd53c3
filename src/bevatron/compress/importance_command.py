"""`bevatron importance`: it checks its input, measures, writes the scores and draws their page.

The command runs in one process, starts N processes, or is itself one of the processes that torchrun
started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bevatron.compress.verb_options import Measuring, Processes
from bevatron.errors import BevatronError
from bevatron.option import arguments
from bevatron.parallel.layout import Layout, LayoutError

Show = Callable[[dict[str, Any]], None]


def importance(
    ckpt: str,
    out: Path,
    data: Sequence[Path],
    measuring: Measuring,
    processes: Processes,
    *,
    html: Path | None = None,
    as_json: bool = False,
    show: Show = lambda found: None,
) -> None:
    """Measure and write the scores to `out`, and a page of them to `html`.

    Args:
        processes: `nproc` None under torchrun, or to start as many as the layout needs.
        show: gets what `--json` prints, on the first rank; in processes that are started, the
            command line's does, with `as_json`.
    Raises BevatronError with one message, whichever rank failed.
    """
    worker = "RANK" in os.environ
    tp, pp, dp_shard = processes.tp, processes.pp, processes.dp_shard
    least = tp * pp * (dp_shard or 1)
    count = int(os.environ["WORLD_SIZE"]) if worker else processes.nproc or least
    layout = layout_of(count, tp, pp, dp_shard)
    if not worker:
        _check(ckpt, [out, *([html] if html is not None else [])], data, layout, measuring)
    if not worker and count > 1:
        from bevatron.train.processes_and_signals import launch

        words = ["importance", ckpt, str(out), *arguments(measuring)]
        words += arguments(Processes(tp, pp, layout.dp_shard))
        words += [text for path in data for text in ("--data", str(path))]
        words += ["--html", str(html)] if html is not None else []
        launch([*words, *["--json"] * as_json], count, saves=False)
        return
    _work(ckpt, out, data, layout, html, show, measuring, worker)


def layout_of(count: int, tp: int, pp: int, dp_shard: int | None) -> Layout:
    """Over `count` processes; what no size was given for is data-parallel, sharded unless
    `dp_shard` says how far. Raises LayoutError."""
    if count % (tp * pp * (dp_shard or 1)):
        sizes = f"tp {tp} x pp {pp}" + (f" x dp-shard {dp_shard}" if dp_shard else "")
        raise LayoutError(
            f"{count} processes cannot be divided by {sizes}; start a multiple of "
            f"{tp * pp * (dp_shard or 1)} (--nproc), or change the sizes"
        )
    left = count // (tp * pp)
    shard = dp_shard or left
    return Layout(pp=pp, dp_replicate=left // shard, dp_shard=shard, tp=tp)


def _check(
    ckpt: str,
    targets: Sequence[Path],
    data: Sequence[Path],
    layout: Layout,
    measuring: Measuring,
) -> None:
    """All that would fail, before anything is started."""
    from bevatron.bridge.open_weights import open_weights
    from bevatron.compress.importance import make_plan, open_sampler, precision_of

    for path in targets:
        if path.is_dir():
            raise BevatronError(f"{path}: is a folder; name a file in it")
        if not path.parent.is_dir():
            raise BevatronError(f"{path}: its folder {path.parent} does not exist; make it first")
    opened = open_weights(ckpt)
    plan = make_plan(opened.spec, measuring)
    precision_of(opened, measuring.dtype)
    open_sampler(opened, data, plan, layout)


def _work(
    ckpt: str,
    out: Path,
    data: Sequence[Path],
    layout: Layout,
    html: Path | None,
    show: Show,
    measuring: Measuring,
    worker: bool,
) -> None:
    """One rank."""
    import torch.distributed as dist

    from bevatron.compress.importance import measure
    from bevatron.parallel.on_all_ranks import on_all
    from bevatron.train.processes_and_signals import one_rank

    began = time.monotonic()
    with one_rank(worker):
        scores = measure(ckpt, data, layout=layout, **vars(measuring))

        def write() -> None:
            if dist.get_rank() == 0:
                scores.write(out)
                if html is not None:
                    from bevatron.compress.importance_page import write_page

                    write_page(scores, html)

        on_all(write)
        if dist.get_rank() == 0:
            found: dict[str, Any] = {"path": str(out), "layout": str(layout)}
            for name in ("samples", "seq_len", "tokens", "aggregation", "loss"):
                value = scores.metadata.get(name)
                if value is not None and name != "aggregation":
                    found[name] = float(value) if name == "loss" else int(value)
                elif value is not None:
                    found[name] = value
            found["seconds"] = round(time.monotonic() - began, 3)
            found["page"] = str(html) if html is not None else None
            found["block_influence"] = scores.block_influence.tolist()
            for n in (1, *scores.spans):
                losses = scores.loss_without(n)
                if losses is not None:
                    found[f"loss_without_{n}"] = losses.tolist()
            show(found)
