"""The learning rate is a function of the update's number: bounded, without jumps, as others'."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler
from transformers.optimization import get_wsd_schedule

from bevatron.train.config import ScheduleConfig
from bevatron.train.optimizer_and_schedule import decay_steps, learning_rate

LR = 1.0
NAMES = ["cosine", "constant", "linear", "one_sqrt", "wsd"]


@st.composite
def schedules(draw: Any) -> tuple[ScheduleConfig, int]:
    """Any configuration with the steps of its run, warmups longer than the run included."""
    config = ScheduleConfig(
        name=draw(st.sampled_from(NAMES)),
        warmup_steps=draw(st.integers(0, 60)),
        min_lr=draw(st.sampled_from([0.0, 0.1, 1.0])),
        decay_steps=draw(st.none() | st.integers(1, 300)),
        decay_fraction=draw(st.floats(0.01, 1.0)),
        decay=draw(st.sampled_from(["linear", "one_sqrt", "cosine"])),
    )
    return config, draw(st.integers(1, 200))


def rates(config: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate(s, config, steps=steps, lr=LR) for s in range(1, steps + 1)]


@given(schedules())
def test_it_rises_once_falls_once_and_stays_within_bounds(case: tuple[ScheduleConfig, int]) -> None:
    config, steps = case
    curve = rates(config, steps)
    warmup = min(config.warmup_steps, steps)
    assert all(0 < rate <= LR for rate in curve[:warmup])
    assert all(a < b for a, b in pairwise(curve[:warmup]))
    after = curve[warmup:]
    assert all(config.min_lr - 1e-12 <= rate <= LR for rate in after)
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    if after and config.name != "constant":
        assert after[-1] == pytest.approx(config.min_lr, abs=1e-12)


@given(schedules())
def test_no_update_jumps(case: tuple[ScheduleConfig, int]) -> None:
    """No two updates are further apart than the steepest piece allows: 1/warmup going up, and going
    down the first step of 1 - sqrt, which is the steepest shape."""
    config, steps = case
    curve = rates(config, steps)
    warmup = config.warmup_steps
    start = warmup
    if config.name == "wsd":
        start = max(warmup, steps - decay_steps(config, steps))
    limit = max(1 / max(1, warmup), 0.0)
    if start < steps:
        shape = config.decay if config.name == "wsd" else config.name
        share = 1 / (steps - start)
        down = {"linear": share, "one_sqrt": math.sqrt(share), "cosine": math.pi / 2 * share}
        limit = max(limit, down.get(shape, 0.0))
    assert all(abs(a - b) <= limit + 1e-9 for a, b in pairwise(curve))


@given(schedules(), st.integers(1, 100))
def test_a_wsd_run_may_be_extended_before_it_decays(
    case: tuple[ScheduleConfig, int], more: int
) -> None:
    config, steps = case
    config = config.model_copy(update={"name": "wsd", "decay_steps": config.decay_steps or 7})
    stable = max(0, steps - (config.decay_steps or 7))
    assert rates(config, steps)[:stable] == rates(config, steps + more)[:stable]


def theirs(make: Any, steps: int) -> list[float]:
    """The rates of a transformers schedule for updates 1, 2, ..., theirs being numbered from 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=LR)
    scheduler = make(optimizer)
    out = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        out.append(scheduler.get_last_lr()[0])
    return out


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_it_is_transformers(name: str, warmup: int) -> None:
    their_name = "constant_with_warmup" if name == "constant" else name
    expected = theirs(
        lambda optimizer: get_scheduler(their_name, optimizer, warmup, num_training_steps=50), 50
    )
    config = ScheduleConfig(name=name, warmup_steps=warmup)  # type: ignore[arg-type]
    assert rates(config, 50) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("decay", ["linear", "one_sqrt", "cosine"])
def test_wsd_is_transformers(decay: str, warmup: int) -> None:
    """1 - sqrt over the whole run is theirs with nothing stable."""
    kind = "1-sqrt" if decay == "one_sqrt" else decay

    def make(n: int) -> Any:
        return lambda optimizer: get_wsd_schedule(
            optimizer, warmup, n, num_stable_steps=50 - warmup - n, decay_type=kind
        )

    config = ScheduleConfig(name="wsd", warmup_steps=warmup, decay_steps=20, decay=decay)  # type: ignore[arg-type]
    assert rates(config, 50) == pytest.approx(theirs(make(20), 50), abs=1e-9)
    share = ScheduleConfig(name="wsd", warmup_steps=warmup, decay_fraction=0.4, decay=decay)  # type: ignore[arg-type]
    assert rates(share, 50) == rates(config, 50)
    if decay == "one_sqrt":
        whole = ScheduleConfig(name="one_sqrt", warmup_steps=warmup)
        assert rates(whole, 50) == pytest.approx(theirs(make(50 - warmup), 50), abs=1e-9)


def test_the_first_update_of_a_warmup_is_not_lost() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=4)
    assert rates(config, 20)[:4] == [0.25, 0.5, 0.75, 1.0]
