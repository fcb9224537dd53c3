"""Validation does what the configuration says: at the start, at an interval and at the end, over
all of its data once, whatever the batch and the layout."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bevatron.checkpoint.run_folder import RunFolder
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.train.config_file import load_config
from bevatron.train.launch import layout_of, work
from tests.data.test_store import write_store
from tests.processes import Pool
from tests.train.small_run import lines, make

HELD_OUT, INTERVAL = "data.validation=[{path: held-out}]", "train.val_every=null"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text of 10 windows, and 3 more in another store."""
    path = tmp_path_factory.mktemp("validation")
    make(path)
    numbers = np.random.default_rng(0)
    for name, windows in (("held-out", 10), ("more", 3)):
        ids = [numbers.integers(97, size=windows * 16 + 5).tolist()]
        write_store(path / name, ids, 97)
    return path


def run(folder: Path, name: str, *options: str) -> str:
    """What a run says at its start."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said):
        config = load_config(Path("run.yaml"), [HELD_OUT, INTERVAL, f"run.dir={name}", *options])
        work(config, layout_of(config, dist.get_world_size()))
    return said.getvalue()


def validated(folder: Path) -> dict[int, float]:
    """The loss by step, each of which must be there once."""
    found = [(x["step"], x["val_loss"]) for x in lines(folder) if "val_loss" in x]
    assert len(found) == len(dict(found))
    return dict(found)


def test_all_of_it_counts_once_whatever_the_batch_and_the_layout(folder: Path, pool: Pool) -> None:
    """10 windows in batches of 8, 4 and 16: what is over counts for nothing. The last loss is that
    of the exported weights over all windows."""
    said = pool.run(1, run, folder, "eights")[0]
    much = "validation: held-out: 10 samples, all there are, in 2 batches"
    assert f"{much}; at the start, at the end\n" in said
    expected = validated(folder / "eights")
    assert list(expected) == [0, 8]
    decoder, _ = load_decoder(folder / "eights")
    store = TokenStore.open(folder / "held-out")
    tokens = np.stack([store.read(16 * i, 17) for i in range(10)]).astype(np.int64)
    ids = torch.from_numpy(tokens)
    logits = decoder.logits(ids[:, :-1]).detach()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    assert expected[8] == pytest.approx(float(loss), rel=1e-5)
    for world, batch, layout in ((2, 4, "parallel.pp=2"), (2, 16, "data.document_mask=false")):
        name = f"batch-{batch}"
        pool.run(world, run, folder, name, f"train.global_batch={batch}", layout, "train.steps=1")
        assert validated(folder / name)[0] == pytest.approx(expected[0], rel=1e-6)


def test_the_interval_and_the_bound_are_said_and_kept(folder: Path, pool: Pool) -> None:
    said = pool.run(1, run, folder, "bound", "train.val_every=3", "train.val_batches=1")[0]
    assert (
        "the first 8 of 10 samples (train.val_batches), in 1 batch; at the start, every 3" in said
    )
    assert "saving: every 2 steps and at the end; the newest 9 stay" in said
    assert list(validated(folder / "bound")) == [0, 3, 6, 8]
    said = pool.run(1, run, folder, "never", "train.val_every=0", "train.steps=1")[0]
    assert "validation: never (train.val_every is 0), though there is held-out" in said
    assert validated(folder / "never") == {}
    plain = load_config(folder / "run.yaml", ["checkpoint={}", "data.validation=[]"])
    assert (plain.checkpoint.every, plain.validates_every) == (500, 0)
    assert load_config(folder / "run.yaml", [HELD_OUT, INTERVAL]).validates_every == 500


def test_a_run_that_goes_on_validates_what_it_has_not_yet(folder: Path, pool: Pool) -> None:
    """Not the same step twice, but one whose validation was cut off; and the end of each start."""
    options = ("train.val_every=2", "run.dir=parts")
    pool.run(1, run, folder, "parts", *options, "train.steps=3")
    assert list(validated(folder / "parts")) == [0, 2, 3]
    pool.run(1, run, folder, "parts", *options, "train.steps=4")
    assert list(validated(folder / "parts")) == [0, 2, 3, 4]
    metrics = folder / "parts/metrics.jsonl"
    kept = metrics.read_text().splitlines()
    dropped = [x for x in kept if json.loads(x)["step"] != 4 or "val_loss" not in json.loads(x)]
    metrics.write_text("\n".join(dropped) + "\n")
    pool.run(1, run, folder, "parts", *options, "train.steps=5")
    assert sorted(validated(folder / "parts")) == [0, 2, 3, 4, 5]
    pool.run(1, run, folder, "whole", "train.val_every=1", "train.steps=5")
    whole: dict[int, Any] = validated(folder / "whole")
    assert all(loss == whole[step] for step, loss in validated(folder / "parts").items())


def test_a_mixture_is_read_until_every_window_has_come(folder: Path) -> None:
    stores = [TokenStore.open(folder / name) for name in ("held-out", "more")]
    for weights in ((1.0, 1.0), (10.0, 3.0), (0.2, 3.0)):
        mixture = list(zip(stores, weights, strict=True))
        sampler = Sampler(mixture, 16, 0, shuffled=False)
        length = sampler.pass_length
        seen = {(p.source, p.window) for p in sampler.places(np.arange(length))}
        assert len(seen) == 13
        assert len({(p.source, p.window) for p in sampler.places(np.arange(length - 1))}) == 12
    assert Sampler([(stores[0], 1.0)], 16, 0, shuffled=False).pass_length == 10


def test_a_run_that_did_not_begin_forgets_what_another_logged(folder: Path) -> None:
    """Killed before its first save: its validation of step 0 is not that of the next start."""
    log = RunFolder(folder / "log")
    log.path.mkdir()
    for step in (0, 1):
        log.append_metrics({"step": step, "val_loss": 1.0})
    assert log.drop_metrics_after(0) == [{"step": 0, "val_loss": 1.0}]
    assert log.drop_metrics_after(-1) == [] and lines(log.path) == []
