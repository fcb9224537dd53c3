"""The order of samples: pure, complete in every epoch, exact in its mixture."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bevatron.data.sampler import BLOCK, Permutation, Sampler, quotas
from bevatron.data.store import TokenStore
from bevatron.errors import BevatronError
from tests.data.test_store import write_store


def ascending(path: Path, tokens: int, base: int = 0) -> TokenStore:
    """A store of the ids base, base + 1, ...: a token tells where it lies."""
    ids = list(range(base, base + tokens))
    return TokenStore.open(write_store(path, [ids], vocab=1 << 20))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 4097])
def test_a_permutation_meets_every_number_once(size: int) -> None:
    for key in range(3):
        permute = Permutation(size, key)
        assert sorted(permute(i) for i in range(size)) == list(range(size))


def test_a_permutation_looks_shuffled() -> None:
    permute = Permutation(10_000, 1)
    found = np.array([permute(i) for i in range(10_000)])
    # 5 standard deviations (1 / sqrt(n)) of the correlation of independent orders
    assert abs(np.corrcoef(found, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.05
    other = Permutation(10_000, 2)
    assert sum(other(i) == found[i] for i in range(10_000)) < 10  # 1 is expected


@pytest.mark.parametrize(("tokens", "seq_len"), [(9, 8), (17, 8), (24, 8), (100, 7), (5000, 3)])
def test_every_window_comes_once_per_epoch(tmp_path: Path, tokens: int, seq_len: int) -> None:
    sampler = Sampler([(ascending(tmp_path / "s", tokens), 1.0)], seq_len, seed=5)
    windows = (tokens - 1) // seq_len
    assert sampler.epoch_length == windows
    orders = []
    for epoch in range(3):
        samples = [sampler.sample(epoch * windows + i) for i in range(windows)]
        assert all(s.dtype == np.int64 and len(s) == seq_len + 1 for s in samples)
        assert all((np.diff(s) == 1).all() for s in samples)
        orders.append([int(s[0]) for s in samples])
        assert sorted(orders[-1]) == [w * seq_len for w in range(windows)]
    if windows > 10:
        assert orders[0] != orders[1] != orders[2]


def test_every_window_comes_once_per_epoch_in_a_mixture(tmp_path: Path) -> None:
    stores = [(ascending(tmp_path / "a", 301), 3.0), (ascending(tmp_path / "b", 777, 1000), 1.0)]
    sampler = Sampler(stores, 10, seed=0)
    assert sampler.windows == [30, 77]
    places = [sampler.place(i) for i in range(3 * BLOCK)]
    for source, windows in enumerate(sampler.windows):
        seen = Counter((p.epoch, p.window) for p in places if p.source == source)
        full = sampler.quotas[source] * 3 // windows
        assert max(seen.values()) == 1
        assert all(seen[epoch, w] for epoch in range(full) for w in range(windows))


def test_quotas_are_exact_in_every_block(tmp_path: Path) -> None:
    weights = [0.5, 0.3, 0.2]
    stores = [(ascending(tmp_path / str(i), 100, 1000 * i), w) for i, w in enumerate(weights)]
    sampler = Sampler(stores, 9, seed=3)
    assert sampler.quotas == [512, 307, 205]
    orders = []
    for block in range(3):
        sources = [sampler.place(block * BLOCK + i).source for i in range(BLOCK)]
        assert [sources.count(i) for i in range(3)] == [512, 307, 205]
        orders.append(sources)
    assert orders[0] != orders[1] != orders[2]


def test_largest_remainder() -> None:
    assert quotas([1.0, 1.0, 1.0]) == [342, 341, 341]
    assert quotas([2.0, 6.0]) == [256, 768]
    assert quotas([1e-9, 1.0]) == [0, 1024]
    rng = random.Random(0)
    for _ in range(50):
        weights = [rng.random() + 1e-3 for _ in range(rng.randint(1, 20))]
        found = quotas(weights)
        assert sum(found) == BLOCK
        exact = [BLOCK * w / sum(weights) for w in weights]
        assert all(abs(f - e) < 1 for f, e in zip(found, exact, strict=True))


def test_random_access_equals_sequential(tmp_path: Path) -> None:
    stores = [(ascending(tmp_path / "a", 200), 0.7), (ascending(tmp_path / "b", 500, 1000), 0.3)]
    one, other = Sampler(stores, 6, seed=11), Sampler(stores, 6, seed=11)
    sequential = [one.sample(i).tolist() for i in range(3000)]
    positions = list(range(3000))
    random.Random(0).shuffle(positions)
    assert all(other.sample(i).tolist() == sequential[i] for i in positions)
    third = Sampler(stores, 6, seed=12)
    assert any(third.sample(i).tolist() != sequential[i] for i in range(20))


def test_the_order_is_a_promise(tmp_path: Path) -> None:
    """A run that resumes under a later version must go on with the same samples."""
    stores = [(ascending(tmp_path / "a", 200), 0.7), (ascending(tmp_path / "b", 500, 1000), 0.3)]
    sampler = Sampler(stores, 6, seed=11)
    found = [int(sampler.sample(i)[0]) for i in (0, 1, 2, 3, 1023, 1024, 10**6, 10**12)]
    assert found == [0, 90, 108, 48, 174, 1420, 180, 138]


def test_a_short_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BevatronError, match="has 8 tokens, a sequence length of 8 needs at least 9"
    ):
        Sampler([(ascending(tmp_path / "s", 8), 1.0)], 8, seed=0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(BevatronError, match="expected a positive number"):
        Sampler([(ascending(tmp_path / "s", 50), weight)], 8, seed=0)


def test_a_weight_too_small_for_a_block_is_refused(tmp_path: Path) -> None:
    stores = [(ascending(tmp_path / "a", 50), 1.0), (ascending(tmp_path / "b", 50), 1e-4)]
    with pytest.raises(BevatronError, match="it would never be sampled"):
        Sampler(stores, 8, seed=0)


def test_other_nonsense_is_refused(tmp_path: Path) -> None:
    store = ascending(tmp_path / "s", 50)
    with pytest.raises(BevatronError, match="names no token store"):
        Sampler([], 8, seed=0)
    with pytest.raises(BevatronError, match="sequence length is 0"):
        Sampler([(store, 1.0)], 0, seed=0)
    with pytest.raises(BevatronError, match="position is -1"):
        Sampler([(store, 1.0)], 8, seed=0).sample(-1)
