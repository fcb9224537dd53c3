"""What the routes answer, compared with transformers where numbers are concerned."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
import transformers

from bevatron.generate.engine import Engine
from bevatron.generate.server.app import make_app
from bevatron.generate.server.serving import Serving
from bevatron.generate.server.settings import Settings
from tests.server.served import Served, make_obedient, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAY = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
SAY += "<|assistant|>"


def test_echoed_log_probabilities_are_those_of_transformers(server: Served, model: Path) -> None:
    """What lm-evaluation-harness asks for: prompts as ids, echo, logprobs, one new token."""
    prompts = [[0, 40, 41, 42, 90, 17], [0, 5, 6]]
    asked = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = server.post(COMPLETIONS, asked).json()
    reference = transformers.LlamaForCausalLM.from_pretrained(model).eval()
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert len(found["tokens"]) == len(ids) + 1
        for i, token in enumerate(ids[1:]):
            assert found["token_logprobs"][i + 1] == pytest.approx(
                float(expected[i, token]), abs=1e-4
            )
            best = max(found["top_logprobs"][i + 1].values())
            assert best == pytest.approx(float(expected[i].max()), abs=1e-4)
            greedy = found["token_logprobs"][i + 1] == best
            assert greedy == (int(expected[i].argmax()) == token)
    silent = server.post(COMPLETIONS, {**asked, "max_tokens": 0}).json()
    for whole, cut in zip(answer["choices"], silent["choices"], strict=True):
        assert cut["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:-1]
    assert silent["usage"] == {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}


def test_greedy_text_is_that_of_transformers(server: Served, model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    reference = transformers.LlamaForCausalLM.from_pretrained(model).eval()
    chat = [{"role": "user", "content": "Grüß Gott"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = reference.generate(**ids, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = server.post(CHAT, {"messages": chat, "temperature": 0, "max_tokens": 24}).json()
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]


def test_offsets_find_the_tokens_in_the_text(server: Served) -> None:
    prompt = "naïve 日本 🙂"
    asked = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 8, "seed": 1}
    choice = server.post(COMPLETIONS, asked).json()["choices"][0]
    assert choice["text"].startswith(prompt)
    found = choice["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if "\ufffd" not in token and not token.startswith("<|"):
            assert choice["text"].startswith(token, offset)


def test_tool_calls_come_back_parsed(tmp_path: Path) -> None:
    pieces = ['{"name": "f", ', '"parameters": ', '{"x": 1}', "}"]
    folder = make_obedient(tmp_path / "tools", pieces, template=SAY)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "temperature": 0}

    async def ask() -> list[httpx.Response]:
        app = make_app(Serving(engine, Settings("tiny")))[0]
        transport = httpx.ASGITransport(app=app)
        changes: list[dict[str, Any]] = [{}, {"stream": True}, {"tool_choice": "none"}]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.post(CHAT, json={**body, **change}) for change in changes]

    with Engine.open(folder) as engine:
        whole, streamed, plain = asyncio.run(ask())
    choice = whole.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    function = choice["message"]["tool_calls"][0]["function"]
    assert function == {"name": "f", "arguments": '{"x": 1}'}
    events = [e.removeprefix("data: ") for e in streamed.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    deltas = [json.loads(e)["choices"][0] for e in events[:-2]]
    assert not any(d["delta"].get("content") for d in deltas)
    calls = [call for d in deltas for call in d["delta"].get("tool_calls", ())]
    assert [call["function"] for call in calls] == [function] and calls[0]["index"] == 0
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert plain.json()["choices"][0]["message"]["content"] == "".join(pieces)


def test_the_page_may_load_and_reach_nothing_else(server: Served) -> None:
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
    for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css")):
        file = server.get(f"/{name}")
        assert file.headers["content-type"].startswith(kind)
        assert file.headers["x-content-type-options"] == "nosniff"
    for path in ("/page.py", "/../app.py", "/%2e%2e/app.py", "/docs", "/redoc", "//etc/passwd"):
        assert server.get(path).status_code == 404, path


def test_a_strange_host_or_origin_is_kept_out(server: Served) -> None:
    """A web page that resolves its own name to 127.0.0.1 reaches the port, and nothing else."""
    for host in (
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "",
        "127.0.0.1.nip.io",
    ):
        answer = httpx.get(server.url + "/v1/models", headers={"Host": host})
        assert answer.status_code in (400, 403), host
    for host in ("localhost", "localhost:1234", "127.0.0.1", "[::1]:80"):
        answer = httpx.get(server.url + "/v1/models", headers={"Host": host})
        assert answer.status_code == 200, host
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(server.url + COMPLETIONS, headers=asks)
    assert not any(h.startswith("access-control") for h in answer.headers)


def test_origins_and_hosts_that_were_named_are_let_in(hostile: Served) -> None:
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type"
    allowed = httpx.options(hostile.url + COMPLETIONS, headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    other = httpx.options(hostile.url + COMPLETIONS, headers={**asks, "Origin": "https://x.y"})
    assert "access-control-allow-origin" not in other.headers
    named = httpx.get(hostile.url + "/v1/models", headers={**hostile.headers, "Host": "my.example"})
    assert named.status_code == 200


def test_errors_of_routing_have_the_same_shape(server: Served) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/a/b", 404),
    ):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_transformers_chat_works_against_it(server: Served, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", "tiny", server.url]
    command += ["max_new_tokens=5", "do_sample=False", "--save-folder", str(tmp_path)]
    done = subprocess.run(
        command,
        input="hello there\nn\n!exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "was already loaded" in done.stdout
    asked = {"messages": [{"role": "user", "content": "hello there"}]}
    answer = server.post(CHAT, {**asked, "temperature": 0, "max_tokens": 5}).json()
    for word in answer["choices"][0]["message"]["content"].split():
        if word.isascii() and word.isalnum():
            assert word in done.stdout


def test_metrics_are_what_prometheus_reads(server: Served) -> None:
    server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 3, "ignore_eos": True})
    text = server.get("/metrics").text
    for line in text.splitlines():
        assert line.startswith(("# HELP bevatron_", "# TYPE bevatron_", "bevatron_")), line
    assert 'bevatron_requests_total{route="/v1/completions",status="200"}' in text
    assert server.metric("generated_tokens_total") >= 3
    assert server.metric("time_to_first_token_seconds_count") >= 1


@pytest.mark.slow
def test_two_ranks_serve_the_same_answers(model: Path, server: Served) -> None:
    asked = {"prompt": "The quick brown", "temperature": 0, "max_tokens": 20}
    with served(model, "--tp", "2") as other:
        assert (
            other.post(COMPLETIONS, asked).json()["choices"]
            == (server.post(COMPLETIONS, asked).json()["choices"])
        )
