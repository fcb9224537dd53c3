"""A teacher's distributions on disk: the likeliest next tokens at every token of a run's samples.

    logits.json                    what is stored, for which samples; written when all is complete
    making.json                    the same, while the folder is still incomplete
    train-00000.safetensors        the samples at the first positions of the run's order
    validation-00000.safetensors   the samples of its validation

A file holds n samples:

    tokens  U64 [n]          XXH3 of the sample's seq_len + 1 tokens (int64, little-endian)
    data    U64 [n]          XXH3 of the sample's rows of the three below, one after the other
    tail    F32 [n, T]       the logarithm of the mass of all tokens that are not listed
    values  F16 or F32 [n, T, k]   log-probabilities, highest first
    ids     U16 or U32 [n, T, k]   token ids

So any change in the order of the samples is noticed at the first sample that differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from bevatron.checkpoint.new_folder import new_file
from bevatron.checkpoint.safetensors_file import write_header
from bevatron.checkpoint.strict_json import parse_object
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError, CheckpointError
from bevatron.train.config import RunConfig, SourceConfig
from bevatron.train.config_objective import Section

NAME, MAKING = "logits.json", "making.json"
FILE_BYTES = 256 << 20  # of one file, about
FLOATS = {"fp16": "F16", "fp32": "F32"}
NUMPY = {"U64": "<u8", "F32": "<f4", "F16": "<f2", "U32": "<u4", "U16": "<u2"}
# How a sample's tokens are named in a batch: what `divergence.Top` holds of them, [n, T, ...].
VALUES, IDS, TAIL = "top_values", "top_ids", "top_tail"

Arrays = dict[str, NDArray[Any]]


class LogitsError(BevatronError):
    """Stored logits that are not what is needed."""


class Block(NamedTuple):
    """The samples at positions `begin` to `end` of the order `kind`; one file."""

    kind: str
    number: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:05d}.safetensors"


class Info(Section):
    """The content of logits.json.

    Attributes:
        model: the teacher as it was named; `teacher`: its fingerprint.
        temperature: that the teacher's logits were divided by.
        dtype: of the log-probabilities, fp16 or fp32.
        order: what decides which sample is at which position, see `order_of`.
        train, validation: how many samples, from position 0 on.
        per_file: samples in each file but the last of its kind.
        tail_mass: mean probability that is not on the listed tokens; None until all are made.
    """

    format: Literal["bevatron-logits"] = "bevatron-logits"
    version: Literal[1] = 1
    model: str
    teacher: str
    vocab_size: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    top_k: int = Field(ge=1)
    temperature: float = Field(gt=0)
    dtype: Literal["fp16", "fp32"]
    order: dict[str, Any]
    train: int = Field(ge=1)
    validation: int = Field(ge=0)
    per_file: int = Field(ge=1)
    tail_mass: float | None = None

    def blocks(self) -> list[Block]:
        counts, step = {"train": self.train, "validation": self.validation}, self.per_file
        return [
            Block(kind, number, begin, min(begin + step, count))
            for kind, count in counts.items()
            for number, begin in enumerate(range(0, count, step))
        ]

    def tensors(self, samples: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape of a file of so many samples, in their order."""
        ids = "U16" if self.vocab_size <= 1 << 16 else "U32"
        rows, top = (samples, self.seq_len), (samples, self.seq_len, self.top_k)
        floats = FLOATS[self.dtype]
        out: dict[str, tuple[str, tuple[int, ...]]] = {"tokens": ("U64", (samples,))}
        return out | {
            "data": ("U64", (samples,)),
            "tail": ("F32", rows),
            "values": (floats, top),
            "ids": (ids, top),
        }

    def header(self, samples: int) -> bytes:
        table = [(name, *entry) for name, entry in self.tensors(samples).items()]
        return write_header(table, {"format": self.format})

    def nbytes(self, samples: int) -> int:
        """Of a file of so many samples."""
        return len(self.header(samples)) + sum(
            int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
            for dtype, shape in self.tensors(samples).values()
        )

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def order_of(config: RunConfig) -> dict[str, Any]:
    """What decides the samples of a run and what a teacher sees of them, by configuration key.
    Token stores count by what is in them, not by where they lie."""

    def mixture(sources: list[SourceConfig]) -> list[list[Any]]:
        return [[TokenStore.open(Path(s.path)).info.hash, s.weight] for s in sources]

    data, batch = config.data, config.train.global_batch
    return {
        "train.seed": config.train.seed,
        "data.seq_len": data.seq_len,
        "data.document_mask": data.document_mask,
        "data.train": mixture(data.train),
        "data.stages": [[s.from_step * batch, mixture(s.train)] for s in data.stages],
        "data.validation": mixture(data.validation) if config.validates_every else [],
    }


def needed(config: RunConfig) -> dict[str, int]:
    """How many samples of each kind a run takes."""
    validation = [(TokenStore.open(Path(s.path)), s.weight) for s in config.data.validation]
    whole = 0
    if validation:
        whole = Sampler(validation, config.data.seq_len, 0, shuffled=False).pass_length
    return {
        "train": config.train.steps * config.train.global_batch,
        "validation": config.validation_samples(whole),
    }


class StoredLogits:
    """A whole folder, opened for reading."""

    key = "logits"

    def __init__(self, path: Path, info: Info) -> None:
        self.path, self.info = path, info
        self._blocks = {(block.kind, block.number): block for block in info.blocks()}

    @classmethod
    def open(cls, path: Path) -> StoredLogits:
        """Raises LogitsError if anything is absent or not as long as it should be. Reads no logits;
        `read` compares what it reads with its hashes."""
        if not (path / NAME).is_file():
            unfinished = (path / MAKING).is_file()
            said = "are not finished; start `bevatron logits` again, which goes on where it stopped"
            raise LogitsError(
                f"{path}: "
                + (said if unfinished else f"has no {NAME}; make it with `bevatron logits`")
            )
        info = read_info(path / NAME)
        for block in info.blocks():
            check_file(path / block.name, info, block)
        return cls(path, info)

    def check(self, config: RunConfig) -> None:
        """Refuse to be used for other samples than those that they were made for."""
        own, wanted = dict(self.info.order), order_of(config)
        if not config.validates_every:
            own["data.validation"] = []
        elif not self.info.validation:
            raise LogitsError(
                f"{self.path}: has none for a validation, but data.validation is given; make them "
                "anew with it, or set train.val_every to 0"
            )
        differ = [key for key in wanted if own.get(key) != wanted[key]]
        if differ:
            raise LogitsError(
                f"{self.path}: was made for other samples: {', '.join(differ)} "
                f"{'is' if len(differ) == 1 else 'are'} not what "
                f"{'it was' if len(differ) == 1 else 'they were'} then; set them back, or make the "
                "logits anew with `bevatron logits`"
            )
        for kind, count in needed(config).items():
            have = getattr(self.info, kind)
            if count > have:
                raise LogitsError(
                    f"{self.path}: has the logits of {have:,} samples of {kind}, the run takes "
                    f"{count:,}; make them for as many, or take fewer"
                )

    def fingerprint(self) -> str:
        """The teacher's, and how it was asked."""
        return f"{self.info.teacher} top {self.info.top_k} {self.info.dtype}"

    def read(self, kind: str, positions: range, tokens: NDArray[np.int64]) -> Arrays:
        """Of the samples at consecutive positions, whose `tokens` [n, T + 1] these are: VALUES and
        IDS [n, T, k], TAIL [n, T]. Raises LogitsError if they are of other tokens, or damaged."""
        parts: list[Arrays] = []
        at = positions.start
        while at < positions.stop:
            number, row = divmod(at, self.info.per_file)
            block = self._blocks[kind, number]
            count = min(block.end, positions.stop) - at
            mine = tokens[at - positions.start :][:count]
            parts.append(self._rows(block, row, count, mine))
            at += count
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, block: Block, row: int, count: int, tokens: NDArray[np.int64]) -> Arrays:
        file, samples = self.path / block.name, block.end - block.begin
        found: Arrays = {}
        with file.open("rb") as stream:
            header = self.info.header(samples)
            at = len(header)
            if stream.read(at) != header:
                raise LogitsError(f"{file}: has another header than it should; it is damaged")
            for name, (dtype, shape) in self.info.tensors(samples).items():
                kind, each = np.dtype(NUMPY[dtype]), int(np.prod(shape[1:]))
                stream.seek(at + row * each * kind.itemsize)
                flat = np.fromfile(stream, kind, count * each)
                found[name] = flat.reshape(-1, *shape[1:])
                at += samples * each * kind.itemsize
        for i in range(count):
            where = f"{file}: sample {block.begin + row + i}"
            if found["tokens"][i] != hash_tokens(tokens[i]):
                raise LogitsError(
                    f"{where} has other tokens in this run than when the logits were made; make "
                    "them anew with `bevatron logits`"
                )
            if found["data"][i] != hash_rows(*(found[n][i] for n in ("tail", "values", "ids"))):
                raise LogitsError(f"{where} is not as it was written; make this folder anew")
        ids = found["ids"].astype(np.int32)
        return {VALUES: found["values"], IDS: ids, TAIL: found["tail"]}


def write_block(folder: Path, info: Info, block: Block, made: Arrays) -> None:
    """Write a file, as a whole or not at all.

    Args:
        made: `tokens` [n, T + 1]; tail, values and ids of any dtype, shaped as in the file."""
    samples = block.end - block.begin
    out: Arrays = {
        name: np.ascontiguousarray(made[name], dtype=NUMPY[info.tensors(samples)[name][0]])
        for name in ("tail", "values", "ids")
    }
    hashes = {
        "tokens": [hash_tokens(row) for row in made["tokens"]],
        "data": [hash_rows(*rows) for rows in zip(*out.values(), strict=True)],
    }
    with new_file(folder / block.name) as file:
        file.write(info.header(samples))
        for numbers in hashes.values():
            file.write(np.array(numbers, dtype="<u8").tobytes())
        for array in out.values():
            file.write(array.data)


def check_file(file: Path, info: Info, block: Block) -> None:
    """Raises LogitsError if it is absent or not as long as it should be."""
    expected = info.nbytes(block.end - block.begin)
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        has = "is absent" if found is None else f"has {found} bytes, expected {expected}"
        raise LogitsError(f"{file}: {has}; make it anew with `bevatron logits`")


def mean_tail_mass(folder: Path, info: Info) -> float:
    """Reads the tails of all files."""
    total, tokens = 0.0, 0
    for block in info.blocks():
        samples = block.end - block.begin
        count, begin = samples * info.seq_len, len(info.header(samples)) + 16 * samples
        tail = np.fromfile(folder / block.name, "<f4", count, offset=begin)
        total += float(np.exp(tail.astype(np.float64)).sum())
        tokens += count
    return total / tokens


def hash_tokens(tokens: NDArray[np.int64]) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, dtype="<i8").data)


def hash_rows(*rows: NDArray[Any]) -> int:
    hasher = xxhash.xxh3_64()
    for row in rows:
        hasher.update(np.ascontiguousarray(row).data)
    return hasher.intdigest()


def read_info(file: Path) -> Info:
    """Raises LogitsError for a file that says something else."""
    try:
        return Info.model_validate(parse_object(file.read_bytes(), str(file)))
    except CheckpointError as error:
        raise LogitsError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LogitsError(
            f"{file}: {where}: {first['msg']}; it is damaged or of another version, so make the "
            "logits anew with `bevatron logits`"
        ) from None
