"""The training loop of one rank: start or continue, step, validate, save, log."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bevatron.bridge.hf_folder import TOKENIZER_FILES
from bevatron.bridge.opened import Opened, open_weights
from bevatron.checkpoint.manifest import Manifest
from bevatron.checkpoint.run_folder import RunFolder, read_train_state
from bevatron.checkpoint.sharded import Saved, box_reader, merge, verify_share, write_rank
from bevatron.data.sampler import Sampler
from bevatron.data.store import TokenStore
from bevatron.errors import BevatronError
from bevatron.families import for_spec
from bevatron.parallel.agree import on_all
from bevatron.parallel.layout import Layout
from bevatron.parallel.world import mesh
from bevatron.spec import ModelSpec
from bevatron.spec.count import flops_per_token
from bevatron.spec.json import to_json
from bevatron.train.config import RunConfig, changed_keys, load_config, to_yaml
from bevatron.train.hardware import memory_gib, peak_flops
from bevatron.train.objectives import Objective
from bevatron.train.schedule import learning_rate
from bevatron.train.trainer import Trainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """What a run starts from: a step of its own folder, other weights, or nothing (random)."""

    spec: ModelSpec
    weights: Opened | None
    resumed: Path | None
    family: str


def find_start(config: RunConfig) -> Start:
    """Decide where to start. A complete step in the run folder wins over `model.init`."""
    newest = RunFolder(Path(config.run.dir)).newest()
    if newest is not None:
        opened = open_weights(newest)
        return Start(opened.spec, opened, newest, opened.manifest.family)
    if config.model.init is not None:
        opened = open_weights(config.model.init)
        return Start(opened.spec, opened, None, opened.manifest.family)
    spec = spec_named(str(config.model.spec))
    return Start(spec, None, None, for_spec(spec).name)


def spec_named(name: str) -> ModelSpec:
    """A spec from a JSON file, or a preset by its name."""
    from bevatron.families.published import preset
    from bevatron.spec.json import from_json

    path = Path(name)
    if path.is_file():
        return from_json(path.read_text(encoding="utf-8"))
    if path.suffix == ".json":
        raise BevatronError(f"model.spec: {name} does not exist")
    return preset(name)


class Run:
    """One rank of a run. Build it inside a process group; `go()` trains to `train.steps`."""

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        layout: Layout,
        objective: Objective,
        device: torch.device,
        allow_changed: bool,
    ) -> None:
        self.config, self.start, self.layout = config, start, layout
        self.folder = RunFolder(Path(config.run.dir))
        self.rank, self.is_main = dist.get_rank(), dist.get_rank() == 0
        self.device = device
        self.step = self.tokens = 0
        self.kept = start.weights  # where the next save finds source files; moves with every save
        seq_len, seed = config.data.seq_len, config.train.seed
        self.sampler = self._sampler(config.data.train, seq_len, seed)
        self.validation = (
            self._sampler(config.data.validation, seq_len, seed) if config.data.validation else None
        )
        if start.resumed is not None:
            on_all(lambda: self._check_unchanged(allow_changed))
        self.trainer = Trainer(
            start.spec,
            layout,
            mesh(layout, device),
            objective,
            seq_len=seq_len,
            train=config.train,
            optimizer=config.optimizer,
            device=device,
        )
        self._fill()
        self.peak = peak_flops(device)

    def _sampler(self, sources: Any, seq_len: int, seed: int) -> Sampler:
        stores = [(TokenStore.open(Path(s.path)), s.weight) for s in sources]
        for store, _ in stores:
            store.check_vocab(self.start.spec.vocab_size)
        return Sampler(stores, seq_len, seed)

    def _check_unchanged(self, allow_changed: bool) -> None:
        """What decides the numbers may not change between starts of one run."""
        assert self.start.resumed is not None
        before = load_config(self.start.resumed / "config.yaml", [])
        changed = changed_keys(before, self.config)
        if changed and not allow_changed:
            raise BevatronError(
                f"{self.folder.path}: this run was started with other values of "
                f"{', '.join(changed)}; use the old ones, another run.dir, or --allow-changed"
            )

    def _fill(self) -> None:
        """Random weights, or the boxes of a checkpoint after checking its hashes."""
        trainer, weights = self.trainer, self.start.weights
        if weights is None:
            trainer.fill_random(self.config.train.seed)
            return
        if weights.native:
            ranks = dist.get_world_size()
            on_all(lambda: verify_share(weights.folder, weights.manifest, self.rank, ranks))
        read = box_reader(weights.folder, weights.manifest, "model/")
        on_all(lambda: trainer.load_weights(weights.shapes, read))
        if self.start.resumed is not None:
            self._continue(weights)

    def _continue(self, weights: Opened) -> None:
        state = read_train_state(weights.folder)
        if state is None:
            raise BevatronError(f"{weights.folder}: has no train_state.json; it cannot be resumed")
        self.step, self.tokens = state["step"], state["tokens"]
        prefix = "optimizer/"
        tensors = weights.manifest.tensors
        shapes = {n[len(prefix) :]: t.shape for n, t in tensors.items() if n.startswith(prefix)}
        read = box_reader(weights.folder, weights.manifest, prefix)
        on_all(lambda: self.trainer.load_optimizer(shapes, read, self.step))

    def samples(self, sampler: Sampler, position: int) -> torch.Tensor:
        """This rank's part of the global batch that begins at `position` of the sample order."""
        n = self.config.train.global_batch // self.layout.dp
        first = position + self.trainer.dp_rank * n
        rows = np.stack([sampler.sample(first + i) for i in range(n)])
        return torch.from_numpy(rows).to(self.device)

    def go(self, say: Say) -> None:
        """Train from the current step to `train.steps`, then save if that was not done."""
        from bevatron.progress import progress

        config, steps = self.config, self.config.train.steps
        if self.is_main:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.drop_metrics_after(self.step)
        if self.step >= steps:
            say(f"{self.folder.path}: already at step {self.step} of {steps}; nothing to do")
            return
        with progress("training", total=steps, unit="it") if self.is_main else _Quiet() as advance:
            if self.step:
                advance(self.step)
            saved = self.step
            while self.step < steps:
                line = self._one_step()
                advance(1, loss=f"{line['loss']:.4f}", norm=f"{line['grad_norm']:.3f}")
                if config.train.val_every and self.step % config.train.val_every == 0:
                    self._validate()
                if config.checkpoint.every and self.step % config.checkpoint.every == 0:
                    self.save()
                    saved = self.step
            if saved != self.step:
                self.save()

    def _one_step(self) -> dict[str, Any]:
        config, began = self.config, time.perf_counter()
        batch, schedule = config.train.global_batch, config.schedule
        lr = learning_rate(
            self.step + 1,
            name=schedule.name,
            steps=config.train.steps,
            lr=config.optimizer.lr,
            warmup_steps=schedule.warmup_steps,
            min_lr=schedule.min_lr,
        )
        loss, norm = self.trainer.step(self.samples(self.sampler, self.step * batch), lr)
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise BevatronError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; stopped before saving. "
                f"The last good step is in {self.folder.path}; lower optimizer.lr or look at the "
                "data"
            )
        self.step += 1
        done = batch * config.data.seq_len
        self.tokens += done
        speed = done / (time.perf_counter() - began)
        line: dict[str, Any] = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr}
        line |= {"tokens": self.tokens, "tokens_per_s": speed, **self._mfu(speed)}
        line["memory_gib"] = memory_gib(self.device)
        if self.is_main:
            self.folder.append_metrics(line)
        return line

    def _mfu(self, speed: float) -> dict[str, float | None]:
        """Model FLOPs utilisation in both conventions; None where the device's peak is unknown."""
        if self.peak is None:
            return {"mfu": None, "mfu_causal": None}
        spec, length = self.start.spec, self.config.data.seq_len
        limit = self.peak * self.layout.world_size
        flops = [flops_per_token(spec, length, causal=causal) for causal in (False, True)]
        return {"mfu": speed * flops[0] / limit, "mfu_causal": speed * flops[1] / limit}

    def _validate(self) -> None:
        assert self.validation is not None
        batch, total, count = self.config.train.global_batch, 0.0, 0.0
        for i in range(self.config.train.val_batches):
            part = self.trainer.evaluate(self.samples(self.validation, i * batch))
            total, count = total + part[0], count + part[1]
        if self.is_main:
            self.folder.append_metrics({"step": self.step, "val_loss": total / count})

    def save(self) -> None:
        """Write this step's checkpoint: every rank its own boxes, rank 0 the rest."""
        temporary = self.folder.path / f".step-{self.step:08d}.partial"
        on_all(lambda: self.folder.begin(self.step) if self.is_main else None)
        carried = self._carried() if self.is_main else []
        saved = [*self.trainer.to_save(), *carried]
        ranks = on_all(lambda: write_rank(temporary, saved, self.rank))
        on_all(lambda: self._commit(temporary, merge(ranks)) if self.is_main else None)

    def _carried(self) -> list[Saved]:
        """Source tensors that are no parameters; they return on export."""
        weights = self.kept
        if weights is None:
            return []
        read, out = box_reader(weights.folder, weights.manifest, ""), []
        for name, entry in weights.manifest.tensors.items():
            if name.startswith("carried/"):
                values = read(name, (0,) * len(entry.shape), entry.shape)
                out.append(Saved(name, values, values, values.dtype))
        return out

    def _commit(self, temporary: Path, tensors: Any) -> None:
        weights, start = self.kept, self.start
        if weights is not None:
            weights.copy_source(temporary / "source")
        if self.config.tokenizer is not None and (weights is None or weights.source is None):
            copy_tokenizer(Path(self.config.tokenizer), temporary / "source")
        if weights is not None and weights.native:
            provenance = weights.folder / "provenance.json"
            if provenance.is_file():
                shutil.copy(provenance, temporary / "provenance.json")
        state: dict[str, Any] = {"step": self.step, "tokens": self.tokens}
        state |= {"samples": self.step * self.config.train.global_batch}
        state["schedule"] = self.config.schedule.name
        texts = {"spec.json": to_json(start.spec), "config.yaml": to_yaml(self.config)}
        texts["train_state.json"] = json.dumps(state) + "\n"
        manifest = Manifest(start.family, self.step, tensors)
        self.kept = open_weights(self.folder.commit(temporary, self.step, manifest, texts))
        self.folder.retain(self.config.checkpoint.keep)


def copy_tokenizer(tokenizer: Path, target: Path) -> None:
    """Keep a random model's tokenizer with it, so that it can be exported and talked to."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, target / name)


class _Quiet:
    """What ranks other than the first show."""

    def __enter__(self) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __exit__(self, *exc: object) -> None:
        return None
