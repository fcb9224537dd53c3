"""An objective that the library has never heard of: its settings, its feed, which asks the trained
model, and what it asks of a model beside that all stand here. It trains from a configuration,
resumes, validates, and is the same at every layout.

It is a small preference loss: every sample is liked or not, and the model is to find it likelier,
or less likely, than a reference does. So a sequence's loss is a curve over the sum of its tokens'
log-probabilities, which ranks share over the vocabulary and over the tokens. Part of the model is
frozen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bevatron.checkpoint.manifest import read_manifest
from bevatron.errors import BevatronError
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import IGNORE, log_probabilities
from bevatron.parallel.companion import Companion
from bevatron.parallel.context_parallel import ContextParallel
from bevatron.parallel.forward_pass import (
    forward,
    joined,
    micro_batches,
    on_all_stages,
    sequence_log_probabilities,
    token_log_probabilities,
)
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.config_objective import KINDS, Kind, load
from bevatron.train.feed import Batch, Memory
from bevatron.train.objectives import BLANK, Samples, Stored, Taps, Vector, mean_over
from bevatron.train.run_start import spec_named
from bevatron.train.token_feed import TokenFeed
from tests.processes import Pool
from tests.train.tiny_run import prepare, train

OWN = {"liked": "tests.train.test_own_objective:LikedKind"}


class LikedKind(Kind):
    reads = "tests.train.test_own_objective:LikedFeed"
    paths = ("reference",)

    name: str = "liked"
    reference: str
    """The spec of the reference."""
    reference_seed: int = 0
    """Of its weights."""
    beta: float = 0.1
    """How steep the curve is."""

    def make(self, spec: ModelSpec, config: RunConfig) -> Liked:
        reference = spec_named(self.reference)
        asked = Companion(reference, None, self.reference_seed, at_end=token_log_probabilities)
        return Liked(asked, self.beta)


class LikedFeed(TokenFeed):
    """Windows of token stores, of which every third is liked. With them comes a baseline: how
    likely the model finds such windows as it has been trained so far. All ranks compute it
    together, and the feed remembers its running mean."""

    collective = True
    mean: float | None = None

    def read_training(self, positions: range) -> Batch:
        rows = super().read_training(positions) | self._liked(positions)
        found = self._asked(torch.from_numpy(rows["tokens"]))
        dist.all_reduce(found)
        now = float(found) / dist.get_world_size()
        self.mean = now if self.mean is None else 0.5 * self.mean + 0.5 * now
        return rows | {"baseline": np.full(len(positions), self.mean, dtype=np.float32)}

    def read_validation(self, positions: range) -> Batch:
        return super().read_validation(positions) | self._liked(positions)

    def snapshot(self) -> Memory:
        return {"mean": self.mean}

    def restore(self, memory: Memory) -> None:
        self.mean = memory["mean"]

    def _asked(self, tokens: Tensor) -> Tensor:
        """The mean log p of a token in these windows, of the model that is trained."""
        placed, n = self.trainer.placed, len(tokens)
        ids, batch = tokens[:, :-1], {"labels": tokens[:, 1:]}
        if placed.layout.cp > 1:
            ids, batch = ContextParallel(placed.mesh["cp"]).take(ids, batch)
        parts = micro_batches(ids, batch, 2)
        ends = [found.end for found in forward(placed, parts, sequence_log_probabilities)]
        end = joined(ends) if placed.is_last else None
        whole = on_all_stages(placed, end, (n,), torch.float64)
        return whole.sum() / tokens[:, 1:].numel()

    def _liked(self, positions: range) -> Batch:
        return {"liked": np.array(positions) % 3 == 0}


class Liked:
    """The mean over samples of -log sigmoid(beta * (difference + baseline)). The difference is that
    of a sequence's log-probability to the reference's, with the other sign if it is not liked; its
    mean is reported."""

    name = "liked"
    rows, entries, counted = 1, 2, 1
    stored: Stored | None = None
    taps: Taps | None = None

    def __init__(self, reference: Companion, beta: float) -> None:
        self.companions, self.beta = {"reference": reference}, beta

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, blank = samples["tokens"], samples.get(BLANK)
        labels = tokens[:, 1:]
        if blank is not None:
            labels = labels.masked_fill(blank[:, None], IGNORE)
        sign = torch.where(samples["liked"], 1.0, -1.0)  # [n]
        counts = torch.ones_like(sign) if blank is None else (~blank).float()
        baseline = samples.get("baseline", torch.zeros_like(sign))  # none in a validation
        batch = {"labels": labels, "sign": sign, "counts": counts, "baseline": baseline}
        return tokens[:, :-1], batch

    def count(self, batch: dict[str, Tensor]) -> Sequence[int]:
        return (int(batch["counts"].sum()),)

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            labels, context = batch["labels"], comm.context
            ours = log_probabilities(
                hidden, weight, labels, comm, spec.logit_softcap, spec.vocab_size
            )
            ratio = context.sum((ours - batch["reference"]).sum(1))  # [B]
            right = batch["sign"] * ratio
            losses = -F.logsigmoid(self.beta * (right + batch["baseline"])) * batch["counts"]
            margins = right.detach() * batch["counts"]
            # Every rank that shares the sequences has the whole of it, and gives its share.
            return torch.stack((losses.sum(), margins.sum())) / context.size

        return loss

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        n = mean_over(counts[0])
        return {"loss": sums[0] / n, "margin": sums[1] / n}

    def settle(self, sums: Vector, counts: Vector) -> None:
        pass


OURS = ("objective={name: liked, reference: spec.json}", "data.validation=[{path: tokens}]")
OURS += ("train.val_every=3", "train.val_batches=2", "optimizer.lr=3.0e-3")
OURS += ("train.freeze=[embed.*, layers.0.mlp.*]",)


def run(folder: Path, *overrides: str) -> None:
    """One rank of a run, in a process of the pool, which other tests use too."""
    with patch.dict(KINDS, OWN):
        train(folder, *OURS, *overrides)


def lines(run: Path) -> list[dict[str, Any]]:
    """What is compared of every line of a run."""
    keys = ("step", "loss", "grad_norm", "margin", "val_loss", "val_margin")
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k in keys} for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("own") / "run")


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> list[dict[str, Any]]:
    """The run in one process."""
    pool.run(1, run, folder, "run.dir=alone")
    return lines(folder / "alone")


def test_it_learns_and_begins_at_the_reference(alone: list[dict[str, Any]]) -> None:
    validated = [line for line in alone if "val_loss" in line]
    assert [line["step"] for line in validated] == [0, 3, 6]
    assert validated[0]["val_loss"] == pytest.approx(float(np.log(2)), rel=1e-6)
    losses = [line["loss"] for line in alone if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("ranks", "layout"), [(4, "{tp: 2, pp: 2}"), (4, "{cp: 2, dp_shard: 2}")])
def test_it_is_the_same_at_every_layout_and_after_a_restart(
    folder: Path, pool: Pool, alone: list[dict[str, Any]], ranks: int, layout: str
) -> None:
    name = "-".join(re.findall(r"\w+", layout))
    for steps in (3, 6):
        more = (f"parallel={layout}", f"run.dir={name}", f"train.steps={steps}")
        pool.run(ranks, run, folder, *more)
    saved = read_manifest(folder / name / "step-00000006").tensors
    assert "optimizer/exp_avg/head.weight" in saved
    assert not [n for n in saved if n.startswith("optimizer/") and "embed" in n]
    state = json.loads((folder / name / "step-00000006/train_state.json").read_text("utf-8"))
    assert state["feed"] == {"mean": pytest.approx(-np.log(300), rel=0.1)}, "of 300 tokens"
    for got, wanted in zip(lines(folder / name), alone, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_place_where_nothing_is_is_named() -> None:
    for place, says in (
        ("tests.train.nowhere:LikedKind", "there is no module tests.train.nowhere"),
        ("tests.train.test_own_objective:Lyked", "the module has no Lyked"),
    ):
        with pytest.raises(BevatronError, match=f"^{place}: {says}$"):
            load(place)


def test_its_settings_are_checked_like_any_others(folder: Path) -> None:
    for objective, says in (
        ("{name: liked}", "objective.reference: missing"),
        ("{name: liked, reference: a, betta: 1.0}", "did you mean objective.beta?"),
        ("{name: pretrain, beta: 1.0}", "beta means nothing to pretrain, only to dpo or ipo"),
        ("{name: like}", "name 'like' is unknown; known are pretrain, distill"),
        ("{name: 'tests.train.test_own_objective:LikedKind'}", "is unknown; known are"),
    ):
        with patch.dict(KINDS, OWN), pytest.raises(BevatronError) as caught:
            load_config(folder / "run.yaml", [f"objective={objective}"])
        assert says in str(caught.value)
