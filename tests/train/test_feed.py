"""The feed: every sample once at any layout, read ahead, of the right stores and model."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from bevatron.data import tokenizer as tokenizer_module
from bevatron.data.token_store import FILE_NAME, TOKENS, TokenStore
from bevatron.data.token_store_writer import StoreWriter
from bevatron.errors import BevatronError
from bevatron.train.config import DataConfig, RunConfig, SourceConfig, StageConfig
from bevatron.train.run_start import Start
from bevatron.train.token_feed import TokenFeed
from tests.commands import bevatron
from tests.data.test_store import write_store
from tests.specs import ALL
from tests.train import small_run

SPEC = dataclasses.replace(ALL["homogeneous"], vocab_size=30_000)
BATCH, SEQ = 12, 8


def store(path: Path, windows: int, base: int = 0, tokenizer: str = "xxh3:0") -> SourceConfig:
    """Ids that tell where they lie; a document of 10 after the other."""
    path.mkdir(parents=True)
    writer = StoreWriter(path, 30_000, None)
    ids = range(base, base + windows * SEQ + 1)
    for begin in range(0, len(ids), 10):
        writer.add(ids[begin : begin + 10], ends=True)
    writer.finish(tokenizer="toy", fingerprint=tokenizer)
    return SourceConfig(path=str(path))


def feed(
    data: DataConfig, dp: int = 1, rank: int = 0, tokenizer: Path | None = None, seed: int = 3
) -> TokenFeed:
    return TokenFeed(
        data,
        SPEC,
        global_batch=BATCH,
        seed=seed,
        dp_rank=rank,
        dp=dp,
        device=torch.device("cpu"),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two stores, one shorter than a batch; then one of them and a third; then the first alone."""
    folder = tmp_path_factory.mktemp("stores")
    a, b, c = (
        store(folder / name, windows, base)
        for name, windows, base in [("a", 100, 0), ("b", 7, 10_000), ("c", 12, 20_000)]
    )
    stages = [
        StageConfig(from_step=5, train=[c, a]),
        StageConfig(from_step=9, train=[a]),
    ]
    return DataConfig(train=[a, b], stages=stages, seq_len=SEQ, document_mask=True)


def whole(data: DataConfig, step: int) -> NDArray[np.int64]:
    return np.asarray(feed(data).batch(step)["tokens"])


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 20), st.integers(1, 5))
def test_any_layout_that_resumes_anywhere_takes_the_same_samples(
    staged: DataConfig, dp: int, step: int, steps: int
) -> None:
    """The ranks' parts, put together, are the batch of one, from any step on, across stages."""
    ranks = [feed(staged, dp, rank) for rank in range(dp)]
    for number in range(step, step + steps):
        parts = [r.batch(number) for r in ranks]
        tokens = np.concatenate([p["tokens"] for p in parts])
        assert np.array_equal(tokens, whole(staged, number))
        assert all(p["documents"].shape == p["tokens"].shape for p in parts)


def test_no_sample_is_lost_or_repeated_across_stages(staged: DataConfig) -> None:
    """Tokens tell their window: each store's come in whole epochs, over all steps and stages."""
    one = feed(staged)
    firsts = np.concatenate([one.batch(step)["tokens"][:, 0] for step in range(40)])
    for base, windows in [(0, 100), (10_000, 7), (20_000, 12)]:
        own = firsts[(firsts >= base) & (firsts < base + 10_000)] - base
        assert len(own) > windows
        for begin in range(0, len(own), windows):
            epoch = own[begin : begin + windows]
            assert len(set(epoch.tolist())) == len(epoch)
    assert not ((firsts >= 20_000)[: 5 * BATCH]).any()
    assert not ((firsts >= 10_000)[9 * BATCH :]).any()


def test_a_store_shorter_than_a_batch_works_by_epochs_and_is_announced(staged: DataConfig) -> None:
    one = feed(staged)
    lines = one.summary(steps=40)
    path = staged.train[1].path
    firsts = np.concatenate([one.batch(step)["tokens"][:, 0] for step in range(40)])
    count = int(((firsts >= 10_000) & (firsts < 20_000)).sum())
    expected = f"{path}: {count} samples ({count / 480:.1%}), {count / 7:.2f} epochs of 7"
    assert any(line.startswith(expected) for line in lines)
    assert any(line.startswith("from step 9: ") and line.endswith("a 100.0%") for line in lines)
    tiny = DataConfig(train=[staged.train[1]], validation=[staged.train[1]], seq_len=SEQ)
    lines = feed(tiny).summary(steps=3)
    assert lines[0].endswith("5.14 epochs of 7; fewer than its share of a step of 12")
    assert len(lines) == 1
    batch = feed(tiny).batch(0)["tokens"][:, 0]
    assert sorted(set(batch.tolist())) == [10_000 + SEQ * i for i in range(7)]
    with pytest.raises(
        BevatronError, match="has 57 tokens, a sequence length of 60 needs at least"
    ):
        feed(DataConfig(train=[staged.train[1]], seq_len=60))


def test_validation_is_the_same_in_every_run_and_in_order(staged: DataConfig) -> None:
    data = DataConfig(train=staged.train, validation=staged.train[:1], seq_len=SEQ)
    batches = [feed(data, seed=seed).validation_batch(1)["tokens"] for seed in (1, 2)]
    assert torch.equal(batches[0], batches[1])
    assert batches[0][:, 0].tolist() == [SEQ * i for i in range(BATCH, 2 * BATCH)]


# ---------------------------------------------------------------------------------------------
# Reading ahead
# ---------------------------------------------------------------------------------------------


def test_the_next_batch_is_read_while_the_step_computes(
    staged: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = feed(staged)
    read = one._read
    order: list[tuple[int, str]] = []
    finished = {number: threading.Event() for number in range(10)}

    def slow(*arguments: Any) -> Any:
        number = arguments[-1]
        order.append((number, threading.current_thread().name))
        time.sleep(1.0 if number == 0 else 0.01)
        rows = read(*arguments)
        finished[number].set()
        return rows

    monkeypatch.setattr(one, "_read", slow)
    one.batch(0)
    first = one.wait_s
    assert first >= 1.0
    assert finished[1].wait(60)  # the step: the next batch comes by itself
    assert not finished[2].wait(0.5)  # and no other
    one.batch(1)
    assert one.wait_s < first
    assert finished[2].wait(60)
    assert [number for number, _ in order] == [0, 1, 2]
    assert all(name.startswith("feed") for _, name in order)
    assert torch.equal(one.batch(7)["tokens"], torch.from_numpy(whole(staged, 7)))  # a jump
    assert torch.equal(one.batch(6)["tokens"], torch.from_numpy(whole(staged, 6)))  # and back
    threads = list(one._reader._threads) if one._reader is not None else []
    one.close()
    assert threads
    assert not any(thread.is_alive() for thread in threads)
    assert torch.equal(one.batch(8)["tokens"], torch.from_numpy(whole(staged, 8)))


def test_a_read_error_comes_with_the_step_that_it_belongs_to(
    tmp_path: Path, staged: DataConfig
) -> None:
    source = store(tmp_path / "s", 4 * BATCH)
    one = feed(DataConfig(train=[source], seq_len=SEQ))
    step_of = {}
    for step in range(4):
        for row in one.batch(step)["tokens"].tolist():
            step_of[row[1]] = step
    one.close()  # a thread of it reads ahead, in a map of the file that is about to be cut
    tokens = np.fromfile(tmp_path / "s" / TOKENS, dtype="<u2")
    target = next(t for t, step in step_of.items() if step == 2)
    tokens[target] = 29_999
    tokens.tofile(tmp_path / "s" / TOKENS)
    one = feed(DataConfig(train=[source], seq_len=SEQ))
    one.batch(0)
    one.batch(1)
    with pytest.raises(BevatronError, match=r"tokens\.bin: is damaged: holds token 29999"):
        one.batch(2)
    one.batch(3)


def test_without_threads_the_batches_are_the_same(
    staged: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = sys.modules[TokenFeed._take.__module__]
    monkeypatch.setattr(reader, "threads_are_free", lambda: False)
    one = feed(staged)
    assert one._reader is None
    for step in (0, 1, 5):
        assert torch.equal(one.batch(step)["tokens"], torch.from_numpy(whole(staged, step)))
    one.close()


# ---------------------------------------------------------------------------------------------
# The right data for this model and this run
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def model_tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_tokens(["a", "b"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_data_of_another_tokenizer_is_refused_unless_allowed(
    tmp_path: Path, model_tokenizer: Path
) -> None:
    own = tokenizer_module.fingerprint(model_tokenizer)
    good = store(tmp_path / "good", 20, tokenizer=own)
    bad = store(tmp_path / "bad", 20, tokenizer="xxh3:1")
    feed(DataConfig(train=[good], seq_len=SEQ), tokenizer=model_tokenizer)
    message = r"bad: was made with another tokenizer \(toy, xxh3:1\) than the model's own .*allow"
    for data in (
        DataConfig(train=[bad], seq_len=SEQ),
        DataConfig(train=[bad], validation=[bad], seq_len=SEQ),
    ):
        with pytest.raises(BevatronError, match=message):
            feed(data, tokenizer=model_tokenizer)
        feed(data)  # a model without one
        feed(data.model_copy(update={"allow_other_tokenizer": True}), tokenizer=model_tokenizer)
    mixed = [
        DataConfig(train=[good, bad], seq_len=SEQ),
        DataConfig(train=[good], validation=[bad], seq_len=SEQ),
        DataConfig(train=[good], stages=[StageConfig(from_step=1, train=[bad])], seq_len=SEQ),
    ]
    for data in mixed:
        with pytest.raises(
            BevatronError, match=r"bad: was made with another tokenizer .* than .*go"
        ):
            feed(data)
        feed(data.model_copy(update={"allow_other_tokenizer": True}))


def test_the_data_is_checked_before_anything_starts(tmp_path: Path, model_tokenizer: Path) -> None:
    """With the tokenizer that the configuration names for a model of random weights."""
    source = store(tmp_path / "s", 20)
    raw = {
        "model": {"spec": "any"},
        "data": {"train": [{"path": source.path}], "seq_len": SEQ},
        "train": {"steps": 1, "global_batch": BATCH},
        "optimizer": {"lr": 1e-3},
        "run": {"dir": str(tmp_path / "run")},
    }
    start = Start(SPEC, None, None, "llama")
    TokenFeed.check(RunConfig.model_validate(raw), start)
    config = RunConfig.model_validate(raw | {"tokenizer": str(model_tokenizer)})
    with pytest.raises(BevatronError, match=r"s: was made with another tokenizer .* model's own"):
        TokenFeed.check(config, start)
    small = dataclasses.replace(SPEC, vocab_size=100)
    with pytest.raises(BevatronError, match="holds token 160, the model has a vocabulary of 100"):
        TokenFeed.check(RunConfig.model_validate(raw), Start(small, None, None, "llama"))


def test_a_tokenizer_that_was_saved_anew_is_the_same(tmp_path: Path, model_tokenizer: Path) -> None:
    file = model_tokenizer / "tokenizer.json"
    opened = tokenizer_module.open_tokenizer(model_tokenizer)
    source = store(tmp_path / "s", 20, tokenizer=opened.fingerprint)
    described = json.loads((tmp_path / "s" / FILE_NAME).read_text())
    described["encoding"] = opened.encoding
    (tmp_path / "s" / FILE_NAME).write_text(json.dumps(described))
    data = DataConfig(train=[source], seq_len=SEQ)
    raw = json.loads(file.read_text())
    raw["padding"] = None
    raw["truncation"] = {
        "direction": "Right",
        "max_length": 99,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(raw))
    assert tokenizer_module.fingerprint(file) != opened.fingerprint
    feed(data, tokenizer=model_tokenizer)
    raw["added_tokens"][0]["content"] = "c"
    file.write_text(json.dumps(raw))
    with pytest.raises(BevatronError, match="was made with another tokenizer"):
        feed(data, tokenizer=model_tokenizer)


def test_a_store_that_changed_since_the_checkpoint_is_found(tmp_path: Path) -> None:
    a, b = store(tmp_path / "a", 20), store(tmp_path / "b", 20, base=7)
    data = DataConfig(train=[a], stages=[StageConfig(from_step=2, train=[b])], seq_len=SEQ)
    recorded = json.loads(json.dumps(feed(data).fingerprints()))
    assert recorded == {s.path: TokenStore.open(Path(s.path)).info.hash for s in (a, b)}
    assert feed(data).changed_sources(recorded) == []
    assert feed(data).changed_sources({}) == []  # a checkpoint that recorded none
    (tmp_path / "b").rename(tmp_path / "old")
    store(tmp_path / "b", 20, base=8)
    (said,) = feed(data).changed_sources(recorded)
    assert re.search(r"b: is .* trained on so far .*was xxh3", said)


def test_stages_must_ascend() -> None:
    source = SourceConfig(path="x")
    stages = [StageConfig(from_step=n, train=[source]) for n in (5, 5)]
    with pytest.raises(ValueError, match=r"stages begin at steps \[5, 5\], expected ascending"):
        DataConfig(train=[source], stages=stages, seq_len=8)


def test_a_run_that_was_begun_with_rounded_weights_goes_on_so_and_says_it(tmp_path: Path) -> None:
    """A new one has them exact: 0.0015 of the samples, not 2 of 1,024."""
    config = small_run.make(tmp_path)
    write_store(tmp_path / "more", [[1, 2, 3] * 40], 97)
    weights = {"tokens": 0.9985, "more": 0.0015}
    mixture = ", ".join(f"{{path: {tmp_path / n}, weight: {w}}}" for n, w in weights.items())
    options = [f"data.train=[{mixture}]", "train.steps=2"]
    status, said = bevatron(tmp_path, "train", str(config), *options)
    assert (status, "rounded" in said) == (0, False), said
    state = next((tmp_path / "run").glob("step-*2")) / "train_state.json"
    found = json.loads(state.read_text())
    assert found.pop("mixture") == "exact"
    state.write_text(json.dumps(found))  # as it was written before
    manifest = json.loads((state.parent / "manifest.json").read_text())
    del manifest["files"]["train_state.json"]
    (state.parent / "manifest.json").write_text(json.dumps(manifest))
    options[1] = "train.steps=3"
    status, said = bevatron(tmp_path, "train", str(config), *options)
    assert status == 0, said
    assert re.search(r"weights stay rounded to 1/1024, .*more 0.001953 for 0.0015; a new run", said)
    state = next((tmp_path / "run").glob("step-*3")) / "train_state.json"
    assert json.loads(state.read_text())["mixture"] == "rounded"
