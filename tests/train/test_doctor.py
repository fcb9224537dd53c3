"""`bevatron doctor`: a real exchange, and what it says when there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bevatron.cli.main import app
from bevatron.train import doctor_exchange
from tests.commands import ran
from tests.processes import Pool


def test_two_processes_exchange_and_the_machine_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = ran(tmp_path, "doctor", "--json", "--timeout", "1800")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["exchange"]["ranks"] == 2
    for name in ("all_reduce", "all_gather", "reduce_scatter", "send and receive"):
        for size in ("1 KiB", "64 MiB"):
            assert report["exchange"]["exchanges"][name][size]["us"] > 0
    assert report["machine"]["software"]["torch"] == torch.__version__
    assert report["machine"]["machine"]["cores"] >= 1
    assert "lo" in report["machine"]["network"]


def test_an_interface_that_is_not_there_is_said_with_the_ones_that_are() -> None:
    result = CliRunner(env={"GLOO_SOCKET_IFNAME": "nowhere0", "CUDA_VISIBLE_DEVICES": ""}).invoke(
        app, ["doctor", "--nproc", "1"]
    )
    assert result.exit_code == 1
    assert "nowhere0" in result.output and "GLOO_SOCKET_IFNAME" in result.output
    assert "lo" in result.output


def wrong() -> str:
    """An exchange whose result is off in one element, on the last rank."""
    import torch.distributed as dist

    def all_reduce(x: torch.Tensor) -> doctor_exchange.Check:
        right = doctor_exchange._all_reduce(x)
        if dist.get_rank() == 1:
            x[-1] += 1
        return right

    doctor_exchange.EXCHANGES["all_reduce"] = all_reduce
    try:
        doctor_exchange.measure(torch.device("cpu"))
    except Exception as error:
        return str(error)
    finally:
        doctor_exchange.EXCHANGES["all_reduce"] = doctor_exchange._all_reduce
    return "right"


def test_a_wrong_element_is_seen(pool: Pool) -> None:
    assert "all_reduce of 1 KiB gave a wrong result" in pool.run(2, wrong)[1]
