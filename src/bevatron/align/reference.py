"""The reference policy: the frozen model that a trained one is compared with.

It may answer in three ways, which give the same numbers: a companion beside the trained model; the
trained model itself with its adapter switched off; or once and for all examples at the start of a
run (`Precomputed`), so that training holds no second model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from bevatron.align.reference_kind import ReferenceKind
from bevatron.bridge.open_weights import Opened, open_weights, paper
from bevatron.checkpoint.new_folder import new_file
from bevatron.errors import BevatronError
from bevatron.families import for_spec
from bevatron.parallel.adapter_off import AdapterOff
from bevatron.parallel.companion import Companion
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placement import AtEnd
from bevatron.progress import progress
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.labelled_feed import Examples
from bevatron.train.objectives import Samples
from bevatron.train.run_start import check_like, spec_named
from bevatron.train.trainer import Trainer

NAME = "reference"  # of the companion, and of the key that names it


def open_reference(
    kind: ReferenceKind,
    spec: ModelSpec,
    config: RunConfig,
    at_end: AtEnd,
    *,
    alone: bool = False,
) -> Companion:
    """The configured reference, opened and not yet read. By default it is what the run starts from:
    the trained model with its adapter switched off, if it trains an adapter and nothing else.

    Args:
        spec: of the model that is trained.
        at_end: what is asked of it.
        alone: it must have weights of its own.
    Raises BevatronError if there is no such model, or it has another vocabulary."""
    if kind.reference is None and kind.reference_like is None:
        if spec.adapter is not None and not spec.adapter.whole and not alone:
            return AdapterOff(spec, at_end)
        return _where_it_began(spec.base, config, at_end)
    where = f"objective.reference: {kind.reference or kind.reference_like}"
    try:
        opened = _open(kind)
    except BevatronError as error:
        raise BevatronError(f"objective.reference: {error}") from error
    if opened.spec.head.kind != "causal_lm":
        raise BevatronError(
            f"{where} has the head {opened.spec.head.kind}, but a reference needs a causal_lm "
            "head; name a language model"
        )
    if opened.spec.vocab_size != spec.vocab_size:
        raise BevatronError(
            f"{where} has a vocabulary of {opened.spec.vocab_size} tokens, the model one of "
            f"{spec.vocab_size}; both must share one tokenizer and one vocab_size"
        )
    return Companion(opened.spec, opened, at_end=at_end)


def _open(kind: ReferenceKind) -> Opened:
    """The reference's weights. They lie nowhere if there are only the sizes that it will have (see
    `train.missing_inputs`)."""
    if kind.reference is None:
        spec = spec_named(str(kind.reference_like))
        return paper(Path(str(kind.reference_like)), for_spec(spec), spec, "", "BF16")
    opened = open_weights(kind.reference)
    check_like(kind.reference, "objective.reference_like", kind.reference_like, opened.spec)
    return opened


def _where_it_began(spec: ModelSpec, config: RunConfig, at_end: AtEnd) -> Companion:
    """The model as `model` names it."""
    if config.model.init is None:
        return Companion(spec, None, config.train.seed, at_end=at_end)
    opened = open_weights(config.model.init)
    shapes = {p.name: p.shape for p in spec.parameters()}
    if any(opened.shapes.get(name) != shape for name, shape in shapes.items()):
        raise BevatronError(
            f"objective.reference: missing; it is by default what model.init names, and "
            f"{config.model.init} is not of the sizes of the model that is trained; name what the "
            "run began from"
        )
    return Companion(spec, opened, at_end=at_end)


class Precomputed:
    """What a reference said of all examples, in the run's folder: `reference/train.safetensors` and
    `validation.safetensors`, with a number for each sequence of each example. A
    `train.objectives.Stored`.

    Whose numbers they are is known: each file has the fingerprint of the model and the run's
    precision, and beside each number a hash of the tokens that it is of. What does not fit is
    refused. The file of another layout fits.
    """

    key = NAME

    def __init__(self, companion: Companion, folder: Path, precision: str) -> None:
        self.companion, self.folder, self.precision = companion, folder, precision
        self._tables: dict[str, dict[str, NDArray[Any]]] = {}

    @classmethod
    def of(cls, companion: Companion, config: RunConfig) -> Precomputed:
        return cls(companion, Path(config.run.dir) / NAME, config.train.precision)

    def check(self, config: RunConfig) -> None:
        """Of the files nothing is known before there are processes."""

    def fingerprint(self) -> str:
        return self.companion.fingerprint()

    def read(
        self, kind: str, positions: Sequence[int], tokens: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Of the examples of these numbers, whose tokens [n, rows, T] these are; of numbers behind
        the last one zeros."""
        table = self._tables[kind]
        values, hashes = table["log_probabilities"], table["tokens"]
        found = np.zeros((len(positions), values.shape[1]))
        for row, (number, own) in enumerate(zip(positions, tokens, strict=True)):
            if number >= len(values):
                continue
            if hash_of(own) != int(hashes[number]):
                raise BevatronError(
                    f"{self._file(kind)}: was computed for other data: example {number} is not "
                    f"what it was then; remove {self.folder} to have it computed anew"
                )
            found[row] = values[number]
        return {NAME: found}

    def prepare(
        self, trainer: Trainer, examples: Mapping[str, Examples], alive: Callable[[], None]
    ) -> None:
        """Read the files, or compute them, calling `alive` now and then. Collective; the companion
        is placed only if it must compute."""
        said = f"{self.companion.fingerprint()} {self.precision}"
        there = [
            on_all(partial(self._read_file, kind, len(of), said)) for kind, of in examples.items()
        ]
        missing = {
            kind: of
            for (kind, of), found in zip(examples.items(), there, strict=True)
            if not all(found)
        }
        if not missing:
            return
        self._place(trainer)
        for kind, of in missing.items():
            table = self._tables[kind] = self._computed(trainer, kind, of, alive)
            on_all(partial(self._write, kind, table, said))
        self.companion.forget()

    def _place(self, trainer: Trainer) -> None:
        self.companion.place(
            trainer.layout,
            trainer.mesh,
            device=trainer.device,
            precision=trainer.precision,
            seq_len=trainer.runner.seq_len * trainer.layout.cp,
            micro_batch=trainer.runner.micro_batch,
            compile_layers=False,
            stages=trainer.placed.stages,
        )
        self.companion.fill()

    def _computed(
        self, trainer: Trainer, kind: str, examples: Examples, alive: Callable[[], None]
    ) -> dict[str, Any]:
        """The table of all examples, on every rank. The ranks share them out."""
        rows, layout, count = trainer.objective.rows, trainer.layout, len(examples)
        each = trainer.runner.count * trainer.runner.micro_batch // rows  # a rank's of a batch
        values = torch.zeros(count, rows, dtype=torch.float64, device=trainer.device)
        hashes = np.zeros(count, dtype=np.uint64)
        main = dist.get_rank() == 0
        counts = trainer.placed.is_last and all(
            trainer.mesh.get_local_rank(dim) == 0 for dim in ("cp", "tp")
        )
        batches = range(0, count, each * layout.dp)
        with progress(f"reference ({kind})", count, "examples", show=main) as advance:
            for begin in batches:
                alive()
                first = begin + trainer.placed.dp_rank * each
                numbers = list(range(first, first + each))
                read: list[dict[str, NDArray[Any]]] = []
                on_all(partial(_append, read, examples, numbers))
                found = self._asked(trainer, read[0])
                real = [i for i, number in enumerate(numbers) if number < count]
                if counts and real:
                    values[first : first + len(real)] = found[NAME].view(-1, rows)[: len(real)]
                    hashes[first : first + len(real)] = [
                        hash_of(read[0]["tokens"][i]) for i in real
                    ]
                advance(min(each * layout.dp, count - begin))
        whole = torch.from_numpy(hashes.view(np.int64)).to(trainer.device)
        for tensor in (values, whole):  # each is of one rank, and of all others zero
            dist.all_reduce(tensor)
        return {
            "log_probabilities": values.cpu().numpy(),
            "tokens": whole.cpu().numpy().view(np.uint64),
        }

    def _asked(self, trainer: Trainer, rows: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        samples: Samples = {n: torch.from_numpy(a).to(trainer.device) for n, a in rows.items()}
        ids, batch = trainer.objective.batch(samples)
        if trainer.layout.cp > 1:
            ids, batch = ContextParallel(trainer.mesh["cp"]).take(ids, batch)
        found = self.companion.run(ids, batch, NAME)
        self.companion.release()
        return found

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}.safetensors"

    def _read_file(self, kind: str, count: int, said: str) -> bool:
        """Whether it is there; then its table is in memory."""
        path = self._file(kind)
        if not path.exists():
            return False
        again = f"remove {self.folder} to have it computed anew"
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                table = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BevatronError(f"{path}: cannot be read ({error}); {again}") from error
        if metadata.get("reference") != said:
            raise BevatronError(
                f"{path}: was computed by another reference or in another precision; put the old "
                f"one back, or {again}"
            )
        if set(table) != {"log_probabilities", "tokens"} or len(table["tokens"]) != count:
            raise BevatronError(
                f"{path}: is of {len(table.get('tokens', ()))} examples, the data has {count}; put "
                f"the old data back, or {again}"
            )
        self._tables[kind] = table
        return True

    def _write(self, kind: str, table: dict[str, NDArray[Any]], said: str) -> None:
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self._file(kind)) as file:
                file.write(save(table, {"reference": said}))


def _append(read: list[dict[str, NDArray[Any]]], examples: Examples, numbers: list[int]) -> None:
    read.append(examples.batch(numbers))


def hash_of(tokens: NDArray[np.int64]) -> int:
    """Of an example's tokens, padding included."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).tobytes())
