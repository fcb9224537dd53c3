"""One place chooses the device; an accelerator that cannot train is not taken, and that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevatron.errors import BevatronError
from bevatron.parallel.process_groups import choose_device, default_device, world
from bevatron.train.hardware import training_device
from tests.train import small_run

CPU = torch.device("cpu")


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers there."""
    accelerator = lambda check_available=False: torch.device("mps")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)


@pytest.mark.usefixtures("on_a_mac")
def test_a_run_on_a_mac_trains_on_the_cpu_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_run.make(tmp_path)
    with world(CPU):
        for more in ([], ["train.device=cpu", f"run.dir={tmp_path / 'named'}"]):
            assert small_run.train(config, ["train.steps=1", *more]) == "done"
            said = capfd.readouterr().err
            assert ("on the CPU: Apple's mps has no collectives" in said) == (not more)
    assert len(small_run.losses(tmp_path / "run")) == 1


@pytest.mark.usefixtures("on_a_mac")
def test_what_does_not_train_may_be_named_for_the_rest() -> None:
    assert default_device() == CPU
    assert choose_device("mps").type == "mps"
    with pytest.raises(BevatronError, match=r"train\.device: Apple's mps has no collectives"):
        training_device("mps")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toaster", "train.device: device toaster: there is no such kind; use cpu"),
        ("xpu", "train.device: device xpu: not on this machine; use cpu"),
        ("cuda:1", "train.device: cuda:1 is one of several, and every process takes its own"),
    ],
)
def test_a_device_that_is_not_here_is_refused(name: str, said: str) -> None:
    if name == "xpu" and torch.xpu.is_available():
        pytest.skip("it is here")
    with pytest.raises(BevatronError, match=said):
        training_device(name)
