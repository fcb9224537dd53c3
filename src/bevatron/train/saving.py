"""Saving a run's steps: every rank its own boxes, rank 0 the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bevatron.bridge.opened import copy_tokenizer, open_weights
from bevatron.checkpoint.manifest import Manifest
from bevatron.checkpoint.run_folder import RunFolder
from bevatron.parallel.agree import on_all
from bevatron.parallel.weights import write_boxes
from bevatron.spec.json import to_json
from bevatron.train.config import RunConfig, to_yaml
from bevatron.train.start import Start
from bevatron.train.trainer import Trainer


class Saver:
    """Writes steps into a run folder. All methods are collective."""

    def __init__(
        self, config: RunConfig, start: Start, folder: RunFolder, trainer: Trainer
    ) -> None:
        self.config, self.start, self.folder, self.trainer = config, start, folder, trainer
        self.is_main = dist.get_rank() == 0
        self.kept = start.weights  # where the next save finds source files; moves with every save

    def save(self, step: int, tokens: int, more: Mapping[str, Any]) -> None:
        """Write a step's checkpoint. `more`: keys that train_state.json has besides."""
        temporary = self.folder.path / f".step-{step:08d}.partial"
        state: dict[str, Any] = {"step": step, "tokens": tokens}
        state |= {"samples": step * self.config.train.global_batch}
        state |= {"schedule": self.config.schedule.name, **more}
        on_all(lambda: self.folder.begin(step) if self.is_main else None)
        tensors = write_boxes(temporary, self.trainer.to_save(), self.kept)
        on_all(lambda: self._commit(temporary, state, tensors) if self.is_main else None)

    def finish(self) -> None:
        """Nothing is left to be written when this returns."""

    def _commit(self, temporary: Path, state: Mapping[str, Any], tensors: Any) -> None:
        weights, start = self.kept, self.start
        if weights is not None:
            weights.copy_origin(temporary)
        if (weights is None or weights.source is None) and self.config.tokenizer is not None:
            copy_tokenizer(Path(self.config.tokenizer), temporary / "source")
        step = state["step"]
        texts = {"spec.json": to_json(start.spec), "config.yaml": to_yaml(self.config)}
        texts["train_state.json"] = json.dumps(state) + "\n"
        manifest = Manifest(start.family, step, tensors)
        self.kept = open_weights(self.folder.commit(temporary, step, manifest, texts))
        self.folder.retain(self.config.checkpoint.keep)
