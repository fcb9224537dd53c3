"""Importance scores of a model: a safetensors file of small fp32 tensors, higher = more important.

embedding.channels                 [hidden_size], summed over the outputs of all norms
layers.{i}.attention.heads         [num_attention_heads], of layers that have an attention
layers.{i}.mlp.neurons             [intermediate_size], of layers that have an MLP
layers.block_influence             [num_layers], 1 - mean cosine of the residual stream before and
                                   after each layer
layers.loss_without                [num_layers], the loss with one layer left out (if asked for)
spans.{n}.loss_without             [num_layers - n + 1], with layers i to i + n - 1 left out
loss                               [1], of the whole model (with either of the two before)

No torch is needed. Pruning reads these scores and nothing else of the calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bevatron.checkpoint.manifest import Manifest
from bevatron.checkpoint.new_folder import new_file
from bevatron.checkpoint.read_boxes import both_ends, new_hasher, read_box, spell
from bevatron.checkpoint.safetensors_file import read_header, write_header
from bevatron.checkpoint.storage import open_file
from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec, Sublayer
from bevatron.spec.json import to_json

Floats = NDArray[np.float32]

FORMAT, VERSION = "bevatron-importance", "1"
CHANNELS, INFLUENCE = "embedding.channels", "layers.block_influence"
LOSS_WITHOUT, LOSS = "layers.loss_without", "loss"


class ScoresError(BevatronError):
    """A file that holds no importance scores, or not those of this model."""


def units_name(layer: int, place: str, sublayer: Sublayer) -> str:
    """Of the scores of a sublayer's units, such as `layers.3.attention.heads`."""
    return f"layers.{layer}.{place}.{sublayer.unit}"


def span_name(layers: int) -> str:
    """Of the losses without so many consecutive layers."""
    return f"spans.{layers}.loss_without"


def spec_hash(spec: ModelSpec) -> str:
    """`xxh3:...` of the spec's text."""
    hasher = new_hasher()
    hasher.update(memoryview(to_json(spec).encode()))
    return spell(hasher)


def weights_hash(folder: Path, manifest: Manifest) -> str:
    """`xxh3:...` of numbers at both ends of every tensor: a model that was trained on has another
    one, the same model in another format has not. Reads little; not safe against intent."""
    hasher = new_hasher()
    entries = manifest.weights()
    for name, offset, size in both_ends({name: entry.shape for name, entry in entries.items()}):
        values = read_box(folder, entries[name], offset, size)
        hasher.update(memoryview(name.encode() + values.tobytes()))
    return spell(hasher)


def expected(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the scores that every file about this model has. Absent sublayers and those
    that are one matrix have none."""
    shapes: dict[str, tuple[int, ...]] = {CHANNELS: (spec.hidden_size,)}
    for i, layer in enumerate(spec.layers):
        for place, sublayer in layer.present:
            if sublayer.units:
                shapes[units_name(i, place, sublayer)] = (sublayer.units,)
    return {**shapes, INFLUENCE: (len(spec.layers),)}


@dataclass(frozen=True)
class Scores:
    """Attributes:
    tensors: by the names above, fp32.
    metadata: format, version, hash (of the tensors), `spec` and `weights` (hashes of the model's),
        family, aggregation (`batch,sequence`), samples, seq_len, tokens, seed, data (the token
        store's hash), dtype.
    """

    tensors: Mapping[str, Floats]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def channels(self) -> Floats:
        return self.tensors[CHANNELS]

    @property
    def block_influence(self) -> Floats:
        return self.tensors[INFLUENCE]

    def heads(self, layer: int) -> Floats:
        return self.tensors[f"layers.{layer}.attention.heads"]

    def neurons(self, layer: int) -> Floats:
        return self.tensors[f"layers.{layer}.mlp.neurons"]

    def loss_without(self, layers: int = 1) -> Floats | None:
        """The loss without so many consecutive layers, by the first of them; None if it was not
        measured."""
        single = self.tensors.get(LOSS_WITHOUT) if layers == 1 else None
        return self.tensors.get(span_name(layers)) if single is None else single

    @property
    def spans(self) -> list[int]:
        """Of which lengths there are losses without so many layers."""
        found = (name.split(".") for name in self.tensors if name.startswith("spans."))
        return sorted(int(parts[1]) for parts in found)

    @property
    def loss(self) -> float | None:
        """Of the whole model, if losses were measured."""
        return float(self.tensors[LOSS][0]) if LOSS in self.tensors else None

    def check(self, spec: ModelSpec, what: str) -> None:
        """Refuse scores of another model. `what`: the file, for the message. Raises ScoresError."""
        own = spec_hash(spec)
        if self.metadata.get("spec") != own:
            raise ScoresError(
                f"{what}: are scores of another model (spec {self.metadata.get('spec')}, this one "
                f"is {own}); measure this model with `bevatron importance`"
            )
        for name, shape in expected(spec).items():
            found = self.tensors.get(name)
            if found is None or found.shape != shape:
                has = "is absent" if found is None else f"has shape {list(found.shape)}"
                raise ScoresError(
                    f"{what}: {name} {has}, the model has {list(shape)}; measure it again with "
                    "`bevatron importance`"
                )
        self.check_finite(what, "measure it again")

    def check_finite(self, what: str, advice: str) -> None:
        """Raises ScoresError for a NaN or an infinity, beginning with `what` they are in."""
        for name, values in self.tensors.items():
            if not np.isfinite(values).all():
                raise ScoresError(f"{what}: {name} holds a number that is not finite; {advice}")

    def write(self, path: str | Path) -> None:
        """Write the file, as a whole or not at all; an older one is replaced."""
        path = Path(path)
        if path.is_dir():
            raise ScoresError(f"{path}: is a folder; name a file, such as {path / 'scores'}")
        tensors = {name: np.ascontiguousarray(t, dtype="<f4") for name, t in self.tensors.items()}
        own = {"format": FORMAT, "version": VERSION, "hash": _hash(tensors)}
        try:
            with new_file(path) as file:
                table = [(n, "F32", t.shape) for n, t in tensors.items()]
                file.write(write_header(table, {**self.metadata, **own}))
                for tensor in tensors.values():
                    file.write(tensor.tobytes())
        except OSError as error:
            raise ScoresError(f"{path}: cannot be written ({error.strerror})") from error

    @classmethod
    def read(cls, path: str | Path) -> Scores:
        """Raises ScoresError for a file that holds something else or a number that is not finite,
        CheckpointError for a damaged one."""
        path = Path(path)
        if path.is_dir():
            raise ScoresError(f"{path}: is a folder, expected a file of `bevatron importance`")
        header = read_header(path)
        kind, version = header.metadata.get("format"), header.metadata.get("version")
        if kind != FORMAT or version != VERSION:
            raise ScoresError(
                f"{path}: is no file of importance scores of version {VERSION} (its metadata says "
                f"format {kind!r}, version {version!r}); make one with `bevatron importance`"
            )
        tensors: dict[str, Floats] = {}
        with closing(open_file(path)) as file:
            for name, stored in header.tensors.items():
                if stored.dtype != "F32":
                    raise ScoresError(f"{path}: {name} is {stored.dtype}, expected F32")
                raw = bytearray(stored.nbytes)
                file.read(memoryview(raw), stored.begin)
                tensors[name] = np.frombuffer(raw, dtype="<f4").reshape(stored.shape)
        found = _hash(tensors)
        if header.metadata.get("hash", found) != found:
            raise ScoresError(
                f"{path}: is damaged, its numbers are not those written; copy it again"
            )
        scores = cls(tensors, dict(header.metadata))
        scores.check_finite(str(path), "measure it again")
        return scores


def _hash(tensors: Mapping[str, Floats]) -> str:
    """Of names and bytes."""
    hasher = new_hasher()
    for name in sorted(tensors):
        hasher.update(memoryview(name.encode() + tensors[name].tobytes()))
    return spell(hasher)
