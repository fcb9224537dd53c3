"""What is reported of a step, and where: metrics.jsonl, the progress line, trackers.

Names in metrics.jsonl are an interface. A step's line always has step, loss, grad_norm, lr, tokens,
tokens_per_s, mfu, mfu_causal (None where the device's peak is unknown) and memory_gib; besides,
tokens_per_s_per_device, step_s and data_wait_s. A validation's line has step and val_loss, and
val_bpb (bits per byte) where the token stores know their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bevatron.checkpoint.run_folder import RunFolder
from bevatron.data.token_store import TokenStore
from bevatron.parallel.layout import Layout
from bevatron.progress import Advance, duration
from bevatron.spec import ModelSpec
from bevatron.spec.count import forward_flops_per_token
from bevatron.train.config import RunConfig, SourceConfig
from bevatron.train.freezing import frozen_parameters, training_flops
from bevatron.train.hardware import memory_gib, peak_flops
from bevatron.train.trackers import Trackers


class Meter:
    """Makes the lines of metrics.jsonl. Only the main rank has a `folder` to write them to.

    Args:
        step: that the run goes on from, -1 for a run that begins: what was logged later is not
            this run's.
        rows: sequences that make a sample.
        beside: models that are not trained and take every token through their forward, teachers.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: ModelSpec,
        layout: Layout,
        *,
        device: torch.device,
        folder: RunFolder | None,
        step: int,
        rows: int = 1,
        beside: Sequence[ModelSpec] = (),
    ) -> None:
        self.config, self.layout, self.device, self.folder = config, layout, device, folder
        seq_len = config.data.seq_len
        self.tokens_per_step = seq_len * config.train.global_batch * rows
        frozen = frozen_parameters(spec, config.train.freeze)
        self.flops = [
            sum(training_flops(spec, seq_len, causal, frozen))
            + sum(forward_flops_per_token(other, seq_len, causal) for other in beside)
            for causal in (False, True)
        ]
        given = config.log.peak_tflops
        self.peak = given * 1e12 if given is not None else peak_flops(device)
        self.last: dict[str, Any] = {}
        self.last_validation: float | None = None
        self.steps, self.seconds = 0, 0.0  # of this start
        self.trackers: Trackers | None = None
        self.bytes_per_token: float | None = None
        if folder is not None:
            if config.objective.is_likelihood:
                self.bytes_per_token = bytes_per_token(config.data.validation)
            folder.path.mkdir(parents=True, exist_ok=True)
            self.trackers = Trackers(config, folder.path, step)

    def step(
        self,
        step: int,
        *,
        tokens: int,
        seconds: float,
        values: dict[str, float],
        advance: Advance,
        data_wait: float = 0.0,
    ) -> None:
        """Report an update.

        Args:
            seconds: that the whole step took, and `data_wait` of them waiting for its batch.
            values: at least loss, grad_norm, lr.
        """
        speed = self.tokens_per_step / seconds
        line: dict[str, Any] = {"step": step, **values, "tokens": tokens, "tokens_per_s": speed}
        line |= self._mfu(speed)
        line["memory_gib"] = memory_gib(self.device)
        line["tokens_per_s_per_device"] = speed / self.layout.world_size
        line |= {"step_s": seconds, "data_wait_s": data_wait}
        if step % self.config.log.every == 0 or step in (1, self.config.train.steps):
            self.write(line)
        self.last, self.steps, self.seconds = line, self.steps + 1, self.seconds + seconds
        advance(1, **self._shown(line))

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Report a validation; `values`: at least val_loss, in nats per token."""
        self.last_validation = values["val_loss"]
        line: dict[str, Any] = {"step": step, **values}
        if self.bytes_per_token:
            nats = values.get("val_ce", values["val_loss"])  # of the data, whatever is minimised
            line["val_bpb"] = nats / math.log(2) / self.bytes_per_token
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Append any line, such as a validation's or an event's."""
        if self.folder is not None:
            self.folder.append_metrics(line)
        if self.trackers is not None:
            self.trackers.log(line)

    def summary(self) -> str:
        """One line about the steps of this start."""
        tokens = self.steps * self.tokens_per_step
        text = f"{self.steps:,} steps, {short(tokens)} tokens in {duration(self.seconds)}"
        if self.seconds:
            text += f", {short(tokens / self.seconds)} tok/s"
        text += f"; loss {self.last['loss']:.4f}" if self.last else ""
        return text + (f", val {self.last_validation:.4f}" if self.last_validation else "")

    def close(self) -> None:
        """Let trackers finish what they have not sent."""
        if self.trackers is not None:
            self.trackers.close()

    def _mfu(self, speed: float) -> dict[str, float | None]:
        """Model FLOPs utilisation in both conventions; None where the device's peak is unknown."""
        if self.peak is None:
            return {"mfu": None, "mfu_causal": None}
        limit = self.peak * self.layout.world_size
        full, causal = (speed * flops / limit for flops in self.flops)
        return {"mfu": full, "mfu_causal": causal}

    def _shown(self, line: dict[str, Any]) -> dict[str, str]:
        """A step's line as people read it, what matters most first."""
        shown = {"loss": f"{line['loss']:.4f}"}
        if "reward" in line:  # what matters where a loss says little
            shown = {"reward": f"{line['reward']:.4f}"}
        if self.last_validation is not None:
            shown["val"] = f"{self.last_validation:.4f}"
        shown |= {"norm": f"{line['grad_norm']:.3f}", "lr": f"{line['lr']:.2e}"}
        shown["tok/s"] = short(line["tokens_per_s"])
        if line["mfu"] is not None:
            shown["mfu"] = f"{line['mfu']:.1%} (causal {line['mfu_causal']:.1%})"
        shown["mem"] = f"{line['memory_gib']:.1f} GiB"
        if line["data_wait_s"] > 0.01 * line["step_s"]:
            shown["data wait"] = f"{line['data_wait_s'] / line['step_s']:.0%}"
        return shown


def bytes_per_token(sources: Sequence[SourceConfig]) -> float | None:
    """Bytes of text per token of a mixture; None if a store does not know its bytes."""
    total = weights = 0.0
    for source in sources:
        info = TokenStore.open(Path(source.path)).info
        if not info.text_bytes:
            return None
        total += source.weight * info.text_bytes / info.tokens
        weights += source.weight
    return total / weights if weights else None


def short(n: float) -> str:
    """Three digits or so: 950, 12.3k, 4.57M."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * factor:
            digits = 2 if n < 9.995 * factor else 1 if n < 99.95 * factor else 0
            return f"{n / factor:.{digits}f}{unit}"
    return f"{n:.0f}" if n >= 99.95 else f"{n:.1f}"
