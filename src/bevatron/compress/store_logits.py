"""`bevatron logits`: storing a teacher's logits for a run's samples, so the run needs no teacher.

The teacher runs at the layout of the run's configuration. Each data-parallel rank writes one file
at a time, so files that were complete before a stop are not computed again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.checkpoint.folder_lock import lock
from bevatron.checkpoint.new_folder import replace_text, sync
from bevatron.compress.distill import check_teacher
from bevatron.compress.distill_kind import DistillKind
from bevatron.compress.logit_divergence import top_tokens
from bevatron.compress.stored_logits import (
    FILE_BYTES,
    MAKING,
    NAME,
    Arrays,
    Block,
    Info,
    LogitsError,
    check_file,
    mean_tail_mass,
    needed,
    order_of,
    read_info,
    write_block,
)
from bevatron.data.sample_order import Sampler
from bevatron.data.tokenizer import TOKENIZER
from bevatron.errors import BevatronError
from bevatron.parallel.companion import Companion
from bevatron.parallel.forward_pass import MicroBatch, forward
from bevatron.parallel.layout import Layout, LayoutError, check, check_documents
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.process_groups import mesh
from bevatron.progress import Advance, progress
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.feed import Batches
from bevatron.train.launch import layout_of
from bevatron.train.processes_and_signals import one_rank
from bevatron.train.token_feed import make_samplers, open_stores

TOP_K = 64
Tokens = np.ndarray[Any, np.dtype[np.int64]]


def logits(
    teacher: str,
    config_path: Path,
    overrides: Sequence[str],
    *,
    dtype: str = "fp16",
    nproc: int | None = None,
    as_json: bool = False,
    show: Callable[[dict[str, Any]], None] = lambda found: None,
) -> None:
    """Fill the folder `objective.logits` of a run configuration.

    Args:
        teacher: native checkpoint, run, HF folder or Hub id.
        dtype: fp16 or fp32, of the log-probabilities.
        nproc: processes to start; None under torchrun, or for one process.
        show: gets what `--json` prints, on the first rank.
    Raises BevatronError with one message, whichever rank failed.
    """
    worker = "RANK" in os.environ
    config = load_config(config_path, list(overrides))
    count = int(os.environ["WORLD_SIZE"]) if worker else nproc or 1
    layout = layout_of(config, count)
    if not worker:
        prepared(teacher, config, layout, dtype)
    if not worker and count > 1:
        from bevatron.train.processes_and_signals import launch

        arguments = ["logits", teacher, str(config_path), *overrides, "--dtype", dtype]
        launch([*arguments, *["--json"] * as_json], count, saves=False)
        return
    began = time.monotonic()
    with one_rank(worker, config.train.device) as device:
        info = make(teacher, config, layout, dtype, device)
        if dist.get_rank() == 0:
            found: dict[str, Any] = {"path": str(folder_of(config)), "layout": str(layout)}
            for name in ("train", "validation", "seq_len", "top_k", "dtype", "tail_mass"):
                found[name] = getattr(info, name)
            found["bytes"] = sum(info.nbytes(b.end - b.begin) for b in info.blocks())
            show({**found, "seconds": round(time.monotonic() - began, 3)})


def make(teacher: str, config: RunConfig, layout: Layout, dtype: str, device: torch.device) -> Info:
    """Inside the process group. Collective."""
    ready: list[tuple[Opened, Info, dict[str, Sampler]]] = []
    on_all(lambda: ready.append(prepared(teacher, config, layout, dtype)))
    opened, info, samplers = ready[0]
    companion = Companion(opened.spec, opened)
    grid = mesh(layout, device)
    companion.place(
        layout,
        grid,
        device=device,
        precision=config.train.precision,
        seq_len=info.seq_len,
        micro_batch=config.train.micro_batch,
        compile_layers=config.train.compile,
    )
    companion.fill()
    folder = folder_of(config)
    main = dist.get_rank() == 0
    with ExitStack() as stack:
        begun = on_all(lambda: stack.enter_context(_begun(folder, info)) if main else None)[0]
        assert begun is not None
        info = begun
        missing = on_all(lambda: _missing(folder, info) if main else [])[0]
        maker = Maker(companion, info, folder, samplers, config.data.document_mask)
        total = sum(block.end - block.begin for block in missing)
        with progress("storing logits", total, "samples", show=main) as shown:
            maker.run(missing, shown)
        return on_all(lambda: _finish(folder, info) if main else info)[0]


def folder_of(config: RunConfig) -> Path:
    """Where the logits go. Raises BevatronError if the configuration does not say."""
    objective = config.objective
    if not isinstance(objective, DistillKind) or objective.logits is None:
        raise BevatronError(
            "objective.logits: is not set; name the folder to fill, as in `objective: {name: "
            "distill, logits: FOLDER}`, which the run will read"
        )
    return Path(objective.logits)


def prepared(
    teacher: str, config: RunConfig, layout: Layout, dtype: str
) -> tuple[Opened, Info, dict[str, Sampler]]:
    """The teacher, what will be stored, and the samples. Raises BevatronError for what cannot be
    made or would not be used."""
    objective, data = config.objective, config.data
    folder_of(config)
    assert isinstance(objective, DistillKind)
    if layout.cp > 1:
        raise LayoutError(f"parallel.cp: is {layout.cp}, but logits are stored at cp 1 alone")
    if dtype not in ("fp16", "fp32"):
        raise BevatronError(f"--dtype: is {dtype}, expected fp16 or fp32")
    opened = open_weights(teacher)
    spec, top_k = opened.spec, objective.top_k or min(TOP_K, opened.spec.vocab_size - 1)
    check_teacher(str(teacher), opened, top_k)
    batch, micro = config.train.global_batch, config.train.micro_batch
    check(layout, spec, seq_len=data.seq_len, global_batch=batch, micro=micro)
    if data.document_mask:
        check_documents(spec, data.seq_len)
    own = opened.source if opened.source and (opened.source / TOKENIZER).is_file() else None
    stores = open_stores(data, spec, own)
    training, validation = make_samplers(data, stores, Batches.of(batch), config.train.seed)
    samplers = {"train": training} | ({"validation": validation} if validation else {})
    counts = needed(config)
    info = Info(
        model=str(teacher),
        teacher=Companion(spec, opened).fingerprint(),
        vocab_size=spec.vocab_size,
        seq_len=data.seq_len,
        top_k=top_k,
        temperature=objective.temperature,
        dtype=dtype,  # type: ignore[arg-type]  # checked above
        order=order_of(config),
        train=counts["train"],
        validation=counts["validation"],
        per_file=1,
    )
    each = (info.nbytes(2) - info.nbytes(1)) * micro
    per_file = max(1, FILE_BYTES // each)
    per_file = micro * min(per_file, -(-info.train // (layout.dp * micro)))
    return opened, info.model_copy(update={"per_file": per_file}), samplers


@contextmanager
def _begun(folder: Path, info: Info) -> Iterator[Info]:
    """Begin the folder, or go on with it: how what is in it was begun. Holds it meanwhile."""
    if (folder / NAME).exists():
        raise LogitsError(f"{folder}: is finished already; remove it to make it anew")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"{folder}: is being made", "wait for it"):
        found = [path for path in folder.iterdir() if path.name != ".lock"]
        if not (folder / MAKING).is_file():
            if found:
                raise LogitsError(f"{folder}: is not empty; name a new folder in objective.logits")
            replace_text(folder / MAKING, info.to_json())
        before = read_info(folder / MAKING)
        now = info.model_copy(update={"per_file": before.per_file, "model": before.model})
        if now != before:
            names = [n for n in type(info).model_fields if getattr(now, n) != getattr(before, n)]
            raise LogitsError(
                f"{folder}: was begun with other values of {', '.join(names)}; use the old ones, "
                "or remove it to make it anew"
            )
        yield before


def _missing(folder: Path, info: Info) -> list[Block]:
    out = []
    for block in info.blocks():
        try:
            check_file(folder / block.name, info, block)
        except LogitsError:
            out.append(block)
    return out


def _finish(folder: Path, info: Info) -> Info:
    info = info.model_copy(update={"tail_mass": mean_tail_mass(folder, info)})
    replace_text(folder / NAME, info.to_json())
    (folder / MAKING).unlink()
    sync(folder)
    return info


class Maker:
    """Runs a placed teacher over samples."""

    def __init__(
        self,
        teacher: Companion,
        info: Info,
        folder: Path,
        samplers: dict[str, Sampler],
        documents: bool,
    ) -> None:
        self.info, self.folder, self.samplers, self.documents = info, folder, samplers, documents
        self.placed, self.micro_batch = teacher.placed, teacher.micro_batch
        self.at_end = top_tokens(info.temperature, info.top_k)

    def run(self, blocks: Sequence[Block], advance: Advance) -> None:
        """Make these files, one on every data-parallel rank at a time. Collective."""
        placed, dp = self.placed, self.placed.layout.dp
        for begin in range(0, len(blocks), dp):
            together = blocks[begin : begin + dp]
            # All ranks make as many forwards, for they share parameters.
            length = max(block.end - block.begin for block in together)
            mine = together[min(placed.dp_rank, len(together) - 1)]
            keep = placed.reports and placed.dp_rank < len(together)
            self._write(mine, self._rows(mine, length, advance), keep)
            advance(sum(block.end - block.begin for block in together))

    def _write(self, block: Block, made: Arrays, keep: bool) -> None:
        on_all(lambda: write_block(self.folder, self.info, block, made) if keep else None)

    def _rows(self, block: Block, length: int, advance: Advance) -> Arrays:
        """What a file holds, on ranks with the last stage; elsewhere its tokens alone.

        Args:
            length: samples to take, at least the file's own; more of them are thrown away."""
        tokens: list[Tokens] = []
        ends: list[Arrays] = []
        for found in forward(self.placed, self._micro_batches(block, length, tokens), self.at_end):
            if found.end is not None:
                ends.append({name: rows.cpu().numpy() for name, rows in found.end.items()})
            advance(0)
        made = {n: np.concatenate([end[n] for end in ends]) for n in (ends[0] if ends else ())}
        made["tokens"] = np.concatenate(tokens)
        return {name: rows[: block.end - block.begin] for name, rows in made.items()}

    def _micro_batches(
        self, block: Block, length: int, tokens: list[Tokens]
    ) -> Iterator[MicroBatch]:
        """Those of a file; adds their `tokens` [B, T + 1]."""
        sampler, device = self.samplers[block.kind], self.placed.device
        for begin in range(block.begin, block.begin + length, self.micro_batch):
            at = np.minimum(np.arange(begin, begin + self.micro_batch), block.end - 1)
            tokens.append(sampler.samples(at))
            batch = {}
            if self.documents:
                documents = torch.from_numpy(sampler.documents(at)[:, :-1])
                batch["documents"] = documents.to(device)
            yield torch.from_numpy(tokens[-1][:, :-1]).to(device), batch
