"""The process: its port, its queue, its end."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from bevatron.errors import BevatronError
from bevatron.generate.server import serve_command
from tests.server.served import Served, make_endless, served

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "The", "max_tokens": 1_000_000}


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers end when somebody ends them."""
    return make_endless(tmp_path_factory.mktemp("patient") / "tiny")


def test_running_answers_end_after_sigterm_and_new_ones_are_refused(patient: Path) -> None:
    with served(patient, "--max-batch", "1", "--queue", "1", "--host", "localhost") as server:
        last: list[httpx.Response] = []
        with httpx.stream(
            "POST", server.url + COMPLETIONS, json={**LONG, "stream": True}, timeout=600
        ) as response:
            lines = response.iter_lines()
            next(lines)
            waiting = _queue_fills(server, last)
            server.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 60
            while server.get("/health").status_code == 200:
                assert time.monotonic() < until
            refused = server.post(COMPLETIONS, LONG)
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert refused.json()["error"]["code"] == "shutting_down"
            assert server.process.poll() is None, "an answer runs"
        waiting.join()  # it had been taken, and gets its turn now
        assert last[0].json()["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0


def _queue_fills(server: Served, last: list[httpx.Response]) -> threading.Thread:
    """One runs, one waits, and one more is asked to come again."""
    body = {**LONG, "max_tokens": 5}
    waiting = threading.Thread(target=lambda: last.append(server.post(COMPLETIONS, body)))
    waiting.start()
    until = time.monotonic() + 60
    while not server.metric("requests_waiting"):
        assert time.monotonic() < until
        time.sleep(0.01)
    full = server.post(COMPLETIONS, {"prompt": "a"})
    assert full.status_code == 429, full.text
    assert full.json()["error"]["code"] == "queue_full"
    assert 1 <= int(full.headers["retry-after"]) <= 60
    never = server.post(COMPLETIONS, {"prompt": "a", "n": 4})
    assert never.status_code == 400 and never.json()["error"]["param"] == "n"
    return waiting


def test_after_the_grace_answers_are_cut_and_a_second_signal_ends_at_once(patient: Path) -> None:
    with served(patient, "--grace", "0.3") as server:
        body = {**LONG, "n": 4, "stream": True}
        with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=600) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "shutting_down"
        assert server.process.wait(60) == 0
    with (
        served(patient, "--grace", "3600") as server,
        httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=600) as response,
    ):
        lines = response.iter_lines()  # kept: without it the client would hang up
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 60
        while server.get("/health").status_code == 200:  # the first one was seen
            assert time.monotonic() < until
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM


def test_a_port_in_use_and_a_missing_model_are_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BevatronError, match=f"on 127.0.0.1 port {port}: Address already"):
            start(tmp_path / "nothing", port=port)
    with pytest.raises(BevatronError, match="nothing"):
        start(tmp_path / "nothing", host="0.0.0.0")
    said = capfd.readouterr().err
    assert "warning: 0.0.0.0 is open to others, and no --api-key is set" in said
    assert "loading" not in said


def start(ckpt: Path, **changes: Any) -> None:
    usual: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "api_key": None, "name": None}
    usual |= {"max_body": 1000, "timeout_s": 1, "grace_s": 1, "hosts": [], "origins": []}
    serve_command.serve(str(ckpt), **{**usual, "max_batch": 1, "queue": 1, **changes})


def test_without_fastapi_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(BevatronError, match=r"pip install 'bevatron\[serve\]'"):
        start(tmp_path)
