"""The order of samples: pure, complete in every epoch, exact in its mixture."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bevatron.data.permutation import Permutation, derive, mix, mix_array
from bevatron.data.sample_order import BLOCK, Place, Sampler, Shares
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError
from tests.data.test_store import write_store


def ascending(path: Path, tokens: int, base: int = 0) -> TokenStore:
    """A store of the ids base, base + 1, ...: a token tells where it lies."""
    ids = list(range(base, base + tokens))
    return TokenStore.open(write_store(path, [ids], vocab=1 << 20))


def sample(sampler: Sampler, position: int) -> NDArray[np.int64]:
    return sampler.samples(np.array([position]))[0]


def places(sampler: Sampler, begin: int, end: int) -> list[Place]:
    return sampler.places(np.arange(begin, end))


def walked(size: int, key: int, i: int) -> int:
    """The permutation in integers of Python, a number at a time."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & ((1 << half) - 1)
        for number in range(6):
            mixed = mix(derive(key, number) ^ right) & ((1 << half) - 1)
            left, right = right, left ^ mixed
        i = left << half | right
        if i < size:
            return i


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 4097])
def test_a_permutation_meets_every_number_once(size: int) -> None:
    for key in range(3):
        permute = Permutation(size, key)
        found = permute(np.arange(size)).tolist()
        assert sorted(found) == list(range(size))
        assert all(walked(size, key, i) == found[i] for i in range(0, size, 1 + size // 50))


def test_bits_are_mixed_alike_in_python_and_in_arrays() -> None:
    numbers = [0, 1, 1 << 63, (1 << 64) - 1, 0x9E3779B97F4A7C15, 12345678901234567890]
    mixed = mix_array(np.array(numbers, dtype=np.uint64))
    assert mixed.tolist() == [mix(n) for n in numbers]


def test_a_permutation_looks_shuffled() -> None:
    permute = Permutation(10_000, 1)
    found = permute(np.arange(10_000))
    # 5 standard deviations (1 / sqrt(n)) of the correlation of independent orders
    assert abs(np.corrcoef(found, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.05
    other = Permutation(10_000, 2)
    assert (other(np.arange(10_000)) == found).sum() < 10  # 1 is expected


@pytest.mark.parametrize(("tokens", "seq_len"), [(9, 8), (17, 8), (24, 8), (100, 7), (5000, 3)])
def test_every_window_comes_once_per_epoch(tmp_path: Path, tokens: int, seq_len: int) -> None:
    sampler = Sampler([(ascending(tmp_path / "s", tokens), 1.0)], seq_len, seed=5)
    windows = (tokens - 1) // seq_len
    assert sampler.epoch_length == windows
    orders = []
    for epoch in range(3):
        samples = sampler.samples(np.arange(epoch * windows, (epoch + 1) * windows))
        assert (samples.dtype, samples.shape) == (np.int64, (windows, seq_len + 1))
        assert all((np.diff(s) == 1).all() for s in samples)
        orders.append([int(s[0]) for s in samples])
        assert sorted(orders[-1]) == [w * seq_len for w in range(windows)]
    if windows > 10:
        assert orders[0] != orders[1] != orders[2]


def test_every_window_comes_once_per_epoch_in_a_mixture(tmp_path: Path) -> None:
    stores = [(ascending(tmp_path / "a", 301), 3.0), (ascending(tmp_path / "b", 777, 1000), 1.0)]
    sampler = Sampler(stores, 10, seed=0)
    assert sampler.windows == [30, 77]
    found = places(sampler, 0, 3 * BLOCK)
    for source, windows in enumerate(sampler.windows):
        seen = Counter((p.epoch, p.window) for p in found if p.source == source)
        full = int(sampler.stages[0].taken(3)[source]) // windows
        assert max(seen.values()) == 1
        assert all(seen[epoch, w] for epoch in range(full) for w in range(windows))


def test_weights_are_exact_over_any_stretch(tmp_path: Path) -> None:
    """0.0015 would be 2 of 1,024, a third too much, and 0.0004 nothing."""
    weights = [0.6, 0.3981, 0.0015, 0.0004]
    stores = [(ascending(tmp_path / str(i), 100, 1000 * i), w) for i, w in enumerate(weights)]
    sampler = Sampler(stores, 9, seed=3)
    found = np.bincount([p.source for p in places(sampler, 0, 20_000)])
    assert found.tolist() == sampler.counts(20_000)
    for position in (20_000, 10**6, 10**9 + 7, 10**12):
        counts = sampler.counts(position)
        assert sum(counts) == position
        # half a position for each of two halvings, and a source's places within the last block
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - position * weight) < 2 + (position % BLOCK) * max(weight, 1 - weight)
    orders = [
        [p.source for p in places(sampler, block * BLOCK, (block + 1) * BLOCK)]
        for block in range(3)
    ]
    assert orders[0] != orders[1] != orders[2]


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40), st.integers(0, 10**9))
def test_every_share_is_exact_to_the_halvings_and_never_falls(
    weights: list[float], blocks: int
) -> None:
    shares = Shares(weights)
    before, after = shares.taken(blocks), shares.taken(blocks + 1)
    assert sum(before) == blocks * BLOCK
    halvings = (len(weights) - 1).bit_length()
    for was, now, exact in zip(before, after, shares.exact, strict=True):
        assert abs(was - blocks * BLOCK * exact) <= halvings / 2
        assert was <= now


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(0, 10**12))
def test_weights_that_fill_blocks_come_as_they_did_when_rounded(
    parts: list[int], blocks: int
) -> None:
    """So runs of such weights go on with the same samples."""
    parts = [*parts, BLOCK - sum(parts)] if sum(parts) < BLOCK else [BLOCK // 2, BLOCK // 2]
    weights = [part / 10 for part in parts]
    assert Shares(weights).taken(blocks) == Shares(weights, rounded=True).taken(blocks)
    assert Shares(weights).taken(blocks) == [part * blocks for part in parts]


def test_largest_remainder() -> None:
    def quotas(weights: list[float]) -> list[int]:
        return Shares(weights, rounded=True).taken(1)

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
    sequential = one.samples(np.arange(3000))
    positions = np.random.default_rng(0).permutation(3000)
    assert np.array_equal(other.samples(positions), sequential[positions])
    assert all(np.array_equal(sample(other, i), sequential[i]) for i in positions[:50])
    third = Sampler(stores, 6, seed=12)
    assert not np.array_equal(third.samples(np.arange(20)), sequential[:20])


def test_the_order_is_a_promise(tmp_path: Path) -> None:
    """A run that resumes under a later version must go on with the same samples."""
    stores = [(ascending(tmp_path / "a", 200), 0.7), (ascending(tmp_path / "b", 500, 1000), 0.3)]
    asked = (0, 1, 2, 3, 1023, 1024, 10**6, 10**12)
    rounded = Sampler(stores, 6, seed=11, rounded=True)  # until weights were exact
    assert [int(sample(rounded, i)[0]) for i in asked] == [0, 90, 108, 48, 174, 1420, 180, 138]
    exact = Sampler(stores, 6, seed=11)
    assert [int(sample(exact, i)[0]) for i in asked] == [0, 90, 108, 48, 174, 1420, 132, 66]


def test_a_short_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BevatronError, match="has 8 tokens, a sequence length of 8 needs at least 9"
    ):
        Sampler([(ascending(tmp_path / "s", 8), 1.0)], 8, seed=0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(BevatronError, match="expected a positive number"):
        Sampler([(ascending(tmp_path / "s", 50), weight)], 8, seed=0)


def test_a_weight_too_small_for_a_block_is_refused_where_blocks_are_alike(tmp_path: Path) -> None:
    stores = [(ascending(tmp_path / "a", 50), 1.0), (ascending(tmp_path / "b", 50), 1e-4)]
    with pytest.raises(BevatronError, match="it would never be sampled"):
        Sampler(stores, 8, seed=0, rounded=True)
    assert Sampler(stores, 8, seed=0).counts(10**6)[1] == 100


def test_other_nonsense_is_refused(tmp_path: Path) -> None:
    store = ascending(tmp_path / "s", 50)
    with pytest.raises(BevatronError, match="names no token store"):
        Sampler([], 8, seed=0)
    with pytest.raises(BevatronError, match="sequence length is 0"):
        Sampler([(store, 1.0)], 0, seed=0)
    with pytest.raises(BevatronError, match="position is -1"):
        sample(Sampler([(store, 1.0)], 8, seed=0), -1)
    with pytest.raises(BevatronError, match="named twice in one mixture"):
        Sampler([(store, 1.0), (TokenStore.open(store.path), 2.0)], 8, seed=0)
    for begin in (0, -5):
        with pytest.raises(BevatronError, match=f"begins at sample {begin}, the one before at 0"):
            Sampler([(store, 1.0)], 8, seed=0, later=[(begin, [(store, 1.0)])])


# ---------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    """Stores of 33, 71 and 200 windows of 9 tokens; a token tells where it lies."""
    folder = tmp_path_factory.mktemp("three")
    sizes = (33 * 9 + 1, 71 * 9 + 4, 200 * 9 + 1)
    return [ascending(folder / str(i), n, 10_000 * i) for i, n in enumerate(sizes)]


mixtures = st.dictionaries(st.integers(0, 2), st.floats(0.1, 3.0), min_size=1)
plans = st.tuples(
    mixtures, st.lists(st.tuples(st.integers(1, 2500), mixtures), max_size=3), st.integers(0, 99)
)


def planned(
    three: list[TokenStore], plan: tuple[dict[int, float], list[tuple[int, dict[int, float]]], int]
) -> Sampler:
    """A sampler of one mixture and some later ones, each so many samples after the one before."""

    def mixture(weights: dict[int, float]) -> list[tuple[TokenStore, float]]:
        return [(three[i], weight) for i, weight in weights.items()]

    later, begin = [], 0
    for length, weights in plan[1]:
        begin += length
        later.append((begin, mixture(weights)))
    return Sampler(mixture(plan[0]), 9, plan[2], later=later)


@given(plans)
def test_no_window_is_lost_or_repeated_within_an_epoch_across_stages(
    three: list[TokenStore],
    plan: tuple[dict[int, float], list[tuple[int, dict[int, float]]], int],
) -> None:
    """Every source's samples, in the order of their positions, run through one epoch after the
    other, whatever the stages make of its share."""
    sampler = planned(three, plan)
    end = sampler.stages[-1].begin + 2500
    found = places(sampler, 0, end)
    for source, windows in enumerate(sampler.windows):
        of = [(p.epoch, p.window) for p in found if p.source == source]
        for epoch in range(len(of) // windows + 1):
            part = of[epoch * windows : (epoch + 1) * windows]
            assert {e for e, _ in part} <= {epoch}
            assert len({w for _, w in part}) == len(part)
    counted = Counter(p.source for p in found)
    assert sampler.counts(end) == [counted[i] for i in range(len(sampler.stores))]


@given(plans)
def test_weights_are_exact_in_every_block_of_every_stage(
    three: list[TokenStore],
    plan: tuple[dict[int, float], list[tuple[int, dict[int, float]]], int],
) -> None:
    sampler = planned(three, plan)
    ends = [*(stage.begin for stage in sampler.stages[1:]), sampler.stages[-1].begin + 2 * BLOCK]
    for stage, end, weights in zip(
        sampler.stages, ends, [plan[0], *(w for _, w in plan[1])], strict=True
    ):
        for block, begin in enumerate(range(stage.begin, end - BLOCK + 1, BLOCK)):
            got = Counter(p.source for p in places(sampler, begin, begin + BLOCK))
            taken = stage.taken(block + 1) - stage.taken(block)
            assert sum(taken) == BLOCK
            for i, weight in weights.items():
                source = sampler.stores.index(three[i])
                share = BLOCK * weight / sum(weights.values())
                assert got[source] == taken[source]
                assert abs(got[source] - share) < 2
                before = taken[source] + stage.taken(block)[source] - stage.before[source]
                assert abs(before - share * (block + 1)) <= 1


@given(plans, st.integers(0, 5000))
def test_a_later_stage_changes_nothing_before_it(
    three: list[TokenStore],
    plan: tuple[dict[int, float], list[tuple[int, dict[int, float]]], int],
    position: int,
) -> None:
    """So a run may be given another stage while it is at rest."""
    sampler = planned(three, plan)
    if not plan[1]:
        return
    before = planned(three, (plan[0], plan[1][:-1], plan[2]))
    begin = sampler.stages[-1].begin
    positions = np.arange(max(0, min(position, begin) - 300), begin)
    assert np.array_equal(sampler.samples(positions), before.samples(positions))
    assert sampler.counts(begin)[: len(before.stores)] == before.counts(begin)


def test_in_order_every_run_sees_the_same_and_mixes_evenly(three: list[TokenStore]) -> None:
    stores = [(three[0], 3.0), (three[2], 1.0)]
    one, other = (Sampler(stores, 9, seed, shuffled=False) for seed in (1, 2))
    found = places(one, 0, 64)
    assert found == places(other, 0, 64)
    for source in (0, 1):
        windows = [(p.epoch, p.window) for p in found if p.source == source]
        assert windows == [divmod(i, one.windows[source]) for i in range(len(windows))]
    for length in range(4, 64, 4):
        assert abs(sum(p.source == 0 for p in found[:length]) - 0.75 * length) <= 1
