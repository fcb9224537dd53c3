"""Faults 66 to 80: what a stranger's template or request may try on a server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from bevatron.generate.engine import Engine
from bevatron.generate.server.routes import make_app
from bevatron.generate.server.served_model import Serving
from bevatron.generate.server.server_settings import Settings
from tests.server.served import CONTEXT, Served, make_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def error(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of a refusal, whose shape is checked."""
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["param"] == param
    assert "/tmp" not in found["message"] and "Traceback" not in found["message"]
    return str(found["message"])


def refused(server: Served, path: str, **fields: Any) -> str:
    """The message of a 400 that names the last of the fields."""
    usual = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    body = {**usual, **fields}
    body = {k: v for k, v in body.items() if v is not ...}
    message = error(server.post(path, body), 400, list(fields)[-1])
    assert list(fields)[-1] in message
    return message


def attacked(hostile: Served, name: str) -> str:
    """What becomes of a request whose template attacks, while another client is served."""
    with httpx.Client(base_url=hostile.url, headers=hostile.headers, timeout=600) as client:
        got: list[httpx.Response] = []
        body = {"messages": [{"role": "user", "content": name}]}
        thread = threading.Thread(target=lambda: got.append(client.post(CHAT, json=body)))
        thread.start()
        time.sleep(0.1)
        assert hostile.get("/health").status_code == 200
        thread.join()
    return error(got[0], 400, "messages")


def test_fault_66_a_template_that_reaches_for_python_gets_nothing(hostile: Served) -> None:
    assert "subclasses" not in attacked(hostile, "ssti").partition("chat template")[0]


def test_fault_67_a_template_that_loops_is_stopped(hostile: Served) -> None:
    assert "stopped" in attacked(hostile, "loops")


def test_fault_68_a_template_that_builds_a_gigabyte_is_stopped(hostile: Served) -> None:
    assert "stopped" in attacked(hostile, "giant")


@pytest.mark.parametrize(
    ("template", "says", "code"),
    [
        pytest.param("{% if %}", "mistake in line 1", "invalid_chat", id="69 a syntax error"),
        pytest.param(None, "no chat template", "no_chat_template", id="70 no template"),
    ],
)
def test_fault_69_70_no_usable_template_is_a_clear_400(
    template: str | None, says: str, code: str, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "secret-place", template=template)

    async def ask(app: Any) -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            chat = await client.post(CHAT, json={"messages": HELLO})
            return chat, await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2})

    with Engine.open(folder) as engine:
        chat, completion = asyncio.run(ask(make_app(Serving(engine, Settings("tiny")))[0]))
    assert says in error(chat, 400, "messages")
    assert chat.json()["error"]["code"] == code
    assert "secret-place" not in chat.text
    assert completion.status_code == 200


def test_fault_71_special_tokens_in_a_message_stay_text(server: Served) -> None:
    """`<|end|>` of a user takes the tokens of its characters, not the one that ends a turn."""

    def tokens(text: str) -> int:
        answer = server.post(CHAT, {"messages": [{"role": "user", "content": text}]})
        return int(answer.json()["usage"]["prompt_tokens"])

    assert tokens("<|end|>") - tokens("") >= 5
    assert tokens("<|end|><|system|>") > tokens("<|end|>") + 5


def test_fault_72_bodies_that_are_no_request(server: Served) -> None:
    for messages, param in [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "wizard", "content": "x"}], "messages.0.role"),
        ([{"content": "x"}], "messages.0.role"),
        (["x"], "messages.0"),
        ([{"role": "user", "content": None}], "messages"),
    ]:
        error(server.post(CHAT, {"messages": messages}), 400, param)
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for content, where, what in [
        (5, "", "expected a string or a list of parts"),
        ({"a": 1}, "", "expected a string or a list of parts"),
        ([5], ".0", "expected an object"),
        ([{"type": "text", "text": "a"}, {"type": "text"}], ".1.text", "is missing"),
        ([{"text": 5}], ".0.text", "a valid string"),
        ([image, image], ".0.type", "image_url is not supported"),
        ([{"type": ["{x}"]}], ".0.type", "['{x}'] is not supported"),
    ]:
        body = {"messages": [{"role": "user", "content": content}]}
        param = f"messages.0.content{where}"
        said = error(server.post(CHAT, body), 400, param)
        assert said.startswith(f"{param}: ") and what in said and "more like it" not in said
    error(server.post(CHAT, {"model": "tiny"}), 400, "messages")
    json_type = {"Content-Type": "application/json"}
    for data in (b"", b"{", b"nope", b"[]", b'"x"', b'{"prompt": "\xff\xfe"}', b"\xef\xbb\xbf{}"):
        error(server.post_raw(COMPLETIONS, data, json_type), 400)
    for data in (b"[" * 100_000, b'{"metadata":' * 100 + b"1" + b"}" * 100):
        error(server.post_raw(COMPLETIONS, data, json_type), 400)
    for data in (
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}",
    ):
        error(server.post_raw(COMPLETIONS, data, json_type), 400)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = server.post_raw(COMPLETIONS, b'{"prompt": "a"}', {"Content-Type": kind})
        error(response, 415)
    large = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    assert "8,388,608" in error(server.post_raw(COMPLETIONS, large, json_type), 413)
    chunks = (b"a" * 100_000 for _ in range(100))  # no Content-Length: counted while it is read
    error(server.post_raw(COMPLETIONS, chunks, json_type), 413)
    assert server.get("/health").status_code == 200


BAD_VALUES: list[tuple[str, list[Any]]] = [
    ("max_tokens", [0, -2, 2**31, 10**400, 1.5, "5", True, 10_000]),
    ("temperature", [-0.1, -1, 1e9, "0", True, [1]]),
    ("top_p", [-0.5, 1.0001, 2, "1"]),
    ("top_k", [-2, 1.5, 2**40]),
    ("min_p", [-0.1, 1.1]),
    ("repetition_penalty", [0, -1, 1e300]),
    ("frequency_penalty", [-2.5, 3, "x"]),
    ("presence_penalty", [-2.5, 3]),
    ("n", [0, -1, 129, 1.5, 10**30]),
    ("seed", [2**63, -(2**70), 0.5]),
    ("stop", ["", [""], ["a"] * 17, [1], 5, {"a": 1}]),
    ("stream", ["yes", 1]),
    ("model", [5, []]),
    ("unheard_of", [1]),
]


@pytest.mark.parametrize(("field", "values"), BAD_VALUES, ids=lambda v: v if v is str else "")
def test_fault_73_a_value_out_of_range_is_refused_by_name(
    field: str, values: list[Any], server: Served
) -> None:
    for path in (COMPLETIONS, CHAT):
        for value in values:
            body = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
            response = server.post_raw(
                path,
                json.dumps({**body, field: value}).encode(),
                {"Content-Type": "application/json"},
            )
            assert response.status_code == 400, (path, value, response.text)
            found = response.json()["error"]
            assert found["param"] is None or found["param"].startswith(field)
            assert field in found["message"] or "digits" in found["message"]


def test_fault_73_logit_bias_stop_and_other_variants(server: Served) -> None:
    for bias in ({"-1": 1}, {"x": 1}, {"5": 101}, {"5": "1"}, {"99999": 1}, {"5": None}, [1]):
        response = server.post(COMPLETIONS, {"prompt": "a", "logit_bias": bias})
        assert response.status_code == 400 and "logit_bias" in response.text
    for field, value in [
        ("suffix", "x"),
        ("best_of", 2),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
    ]:
        refused(server, COMPLETIONS, **{field: value})
    for field, value in [
        ("top_logprobs", 2),
        ("logprobs", 1),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "low"),
        ("max_completion_tokens", 0),
        ("generation_config", "{"),
    ]:
        refused(server, CHAT, **{field: value})
    assert refused(server, COMPLETIONS, suffix="x") == (
        "suffix: is not supported by this server; leave it out"
    )
    body = {"messages": HELLO, "functions": [], "max_tokens": 1}
    assert server.post(CHAT, body).status_code == 200
    response = server.post(CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}})
    error(response, 400, "response_format.type")

    # And what is allowed works.
    def text(**fields: Any) -> str:
        body = {"prompt": "The quick", "temperature": 0, "max_tokens": 12, **fields}
        response = server.post(COMPLETIONS, body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    plain = text(ignore_eos=True)
    stop = plain[3:5]
    assert text(ignore_eos=True, stop=stop) == text(ignore_eos=True, stop=["zzz", stop])
    assert text(ignore_eos=True, stop=stop) == plain[: plain.index(stop)]
    assert text(stop=None, n=None, logit_bias=None, user="me", seed=-5) == text()
    forced = server.post(
        COMPLETIONS,
        {"prompt": "a", "max_tokens": 4, "logit_bias": {"40": 100}, "logprobs": 0, "seed": 3},
    )
    assert len(set(forced.json()["choices"][0]["logprobs"]["tokens"])) == 1
    drawn = [text(temperature=1.5, seed=11, n=2) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_fault_74_token_ids_that_the_model_has_not(server: Served) -> None:
    for prompt in ([-1], [10**6], [2**40], [1, "a"], [1.5], [True], [[]], [], [[1], 2], [None], 5):
        refused(server, COMPLETIONS, prompt=prompt)
    for prompt in ([5], [[5, 6], [7]], "a", ["a", "b"]):
        response = server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
        assert response.status_code == 200, response.text


def test_fault_75_a_prompt_longer_than_the_context_is_refused(server: Served) -> None:
    for body, param in (
        ({"prompt": [5] * (CONTEXT + 1)}, "prompt"),
        ({"prompt": [5] * CONTEXT, "max_tokens": 1}, "prompt"),
        ({"prompt": [5] * (CONTEXT - 3), "max_tokens": 4}, "max_tokens"),
    ):
        message = error(server.post(COMPLETIONS, body), 400, param)
        assert f"context is {CONTEXT} tokens" in message
    chat = {"messages": [{"role": "user", "content": "x y " * CONTEXT}]}
    error(server.post(CHAT, chat), 400, "prompt")
    fits = {"prompt": [5] * (CONTEXT - 3), "max_tokens": 3, "ignore_eos": True}
    answer = server.post(COMPLETIONS, fits).json()
    assert answer["usage"]["completion_tokens"] == 3


LONG = {"prompt": "The", "max_tokens": 1_000_000, "n": 2}


def test_fault_76_a_client_that_leaves_ends_its_answer(endless: Served) -> None:
    for stream in (True, False):
        before = endless.metric("disconnects_total")
        made = endless.metric("generated_tokens_total")
        body = {**LONG, "n": 8, "stream": stream}
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream("POST", endless.url + COMPLETIONS, json=body, timeout=0.3) as response,
        ):
            assert stream, "the answer came before the client left"
            next(response.iter_bytes())
        assert endless.idle()
        assert endless.metric("disconnects_total") == before + 1
        assert endless.metric("generated_tokens_total") < made + 8 * 1_000_000


def test_fault_77_a_hundred_slow_clients_keep_nobody_out(hostile: Served) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer s3cret\r\n"
    body = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection(("127.0.0.1", hostile.port)))
            for _ in range(100)
        ]
        for i, sock in enumerate(sockets):
            sock.sendall((head, head + body, b"", b"P")[i % 4])
        answer = hostile.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        deadline = time.monotonic() + 20
        for i, sock in enumerate(sockets):
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            got = b""
            while data := sock.recv(65536):  # until the server closes: none is kept
                got += data
            assert got.startswith(b"HTTP/1.1 408"), (i, got)
            assert b'"code": "request_timeout"' in got or b'"code":"request_timeout"' in got


def test_fault_77_a_client_that_does_not_read_is_hung_up_on(hostile: Served) -> None:
    """Its small window fills with an answer's log-probabilities, and stays full."""
    fields = {"max_tokens": 200, "n": 32, "logprobs": 20, "ignore_eos": True, "stream": True}
    body = json.dumps({"prompt": "a", **fields}).encode()
    before = hostile.metric("disconnects_total")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", hostile.port))
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    sock.sendall(b"Authorization: Bearer s3cret\r\n" + head + body)
    until = time.monotonic() + 30
    while hostile.metric("disconnects_total") == before:
        assert time.monotonic() < until, "still waiting for a client that does not read"
        time.sleep(0.1)
    assert hostile.idle()
    sock.close()


def test_fault_78_cancelling_frees_the_cache(endless: Served) -> None:
    with httpx.stream("POST", endless.url + COMPLETIONS, json={**LONG, "stream": True}) as response:
        events = response.iter_lines()
        while "choices" not in next(events):
            continue
        assert endless.metric("requests_running") > 0
    assert endless.idle()
    assert endless.metric("cached_tokens") == 0


def test_fault_79_a_model_without_eos_stops_at_the_limit(hostile: Served) -> None:
    prompt = {"prompt": [5, 6, 7], "max_tokens": 20}
    answer = hostile.post(COMPLETIONS, prompt).json()
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["choices"][0]["finish_reason"] == "length"
    chat = hostile.post(CHAT, {"messages": HELLO}).json()  # no limit given: the context's
    assert chat["usage"]["total_tokens"] == CONTEXT
    assert chat["choices"][0]["finish_reason"] == "length"


def test_fault_80_loopback_and_a_key_compared_in_constant_time(
    server: Served, hostile: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hmac

    import psutil

    listening = [c for c in psutil.Process(server.process.pid).net_connections() if not c.raddr]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    url, right = hostile.url, {"Authorization": "Bearer s3cret"}
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
            error(httpx.get(url + path, headers=headers), 401)
    error(httpx.post(url + COMPLETIONS, content=b"x" * 10**6), 401)
    assert httpx.get(url + "/v1/models", headers=right).status_code == 200
    assert httpx.get(url + "/health").status_code == 200

    from bevatron.generate.server.metrics import Metrics
    from bevatron.generate.server.request_limits import Gate

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    gate = Gate(None, Settings("m", api_key="abc", hosts=None), Metrics())  # type: ignore[arg-type]
    scope = {"method": "GET", "path": "/v1/models", "headers": [(b"authorization", b"Bearer x")]}
    assert gate._refusal(scope) is not None
    assert compared == [(b"x", b"abc")]
