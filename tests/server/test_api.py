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
from bevatron.generate.server.metrics import CONTENT_TYPE
from bevatron.generate.server.routes import make_app
from bevatron.generate.server.served_model import Serving
from bevatron.generate.server.server_settings import Settings
from tests.server.served import Served, make_model, make_obedient, served

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


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = ['{"name": "f", ', '"parameters": ', '{"x": 1}', "}"]
F = {"name": "f", "arguments": '{"x": 1}'}
NEMOTRON = ["<TOOLCALL>", "[", *CALL, ", ", '{"name": "f", "arguments": {}}', "]", "</TOOLCALL>"]
THOUGHTS = ["<think>", "\n", "hm ", "hm", "\n\n", "</think>", " \n"]  # each token once


def asked(folder: Path, *changes: dict[str, Any], template: str = SAY) -> list[httpx.Response]:
    """What a model answers to a chat with a tool, with each of these changes to the request."""
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "temperature": 0}

    async def ask(engine: Engine) -> list[httpx.Response]:
        app = make_app(Serving(engine, Settings("tiny")))[0]
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.post(CHAT, json={**body, **change}) for change in changes]

    with Engine.open(folder) as engine:
        return asyncio.run(ask(engine))


def put_together(stream: httpx.Response) -> tuple[dict[str, Any], str]:
    """The message that a client makes of a stream's deltas, and why it ended."""
    events = [e.removeprefix("data: ") for e in stream.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    choices = [json.loads(e)["choices"][0] for e in events[:-2]]
    message: dict[str, Any] = {"content": None, "refusal": None}
    for delta in (choice["delta"] for choice in choices):
        for call in delta.pop("tool_calls", ()):
            assert call.pop("index") == len(message.setdefault("tool_calls", []))
            message["tool_calls"].append(call)
        for key, value in delta.items():
            message[key] = value if key == "role" else (message.get(key) or "") + value
    return message, choices[-1]["finish_reason"]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize(
    ("pieces", "content", "thoughts", "calls"),
    [
        (CALL, None, None, [F]),
        (["I see. ", "<|python_tag|>", *CALL], "I see.", None, [F]),
        (["I see. ", *NEMOTRON], "I see.", None, [F, {"name": "f", "arguments": "{}"}]),
        ([*THOUGHTS, *CALL], None, "hm hm", [F]),
        ([*THOUGHTS, "Yes", ". "], "Yes. ", "hm hm", []),
        (THOUGHTS[:4], "", "hm hm", []),
        (["[1, ", "2]"], "[1, 2]", None, []),
    ],
    ids=["json", "python tag", "TOOLCALL", "thoughts, json", "thoughts", "no end", "no call"],
)
def test_a_stream_is_the_message_that_comes_whole(
    pieces: list[str], content: str | None, thoughts: str | None, calls: list[Any], tmp_path: Path
) -> None:
    folder = make_obedient(tmp_path / "m", pieces, template=SAY)
    whole, streamed, one = asked(folder, {}, {"stream": True}, {"parallel_tool_calls": False})
    choice = whole.json()["choices"][0]
    message, reason = put_together(streamed)
    assert without_ids(message) == without_ids(choice["message"])
    assert reason == choice["finish_reason"] == ("tool_calls" if calls else "stop")
    said = {"role": "assistant", "content": content, "refusal": None, "tool_calls": calls}
    assert without_ids(message) == said | ({"reasoning_content": thoughts} if thoughts else {})
    few = without_ids(one.json()["choices"][0]["message"])
    assert few == without_ids(message) | {"tool_calls": calls[:1]}, "no two calls at once"
    # What was answered can be sent back.
    history = [{"role": "user", "content": "x"}, choice["message"]]
    history += [{"role": "tool", "content": "1", "tool_call_id": "c"}] * len(calls)
    (again,) = asked(folder, {"messages": history})
    assert again.status_code == 200, again.text


def test_thoughts_whose_marks_are_special_tokens_are_thoughts(tmp_path: Path) -> None:
    """In the prompt's end too, where the template begins them."""
    pieces = ["<think>", "hm", "</think>", "Yes"]
    folder = make_obedient(tmp_path / "m", pieces, template=SAY)
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    for token in stored["added_tokens"]:
        token["special"] |= "think>" in token["content"]
    file.write_text(json.dumps(stored))
    changes: list[dict[str, Any]] = [{}, {"stream": True}, {"tools": None}]
    whole, streamed, plain = asked(folder, *changes)
    expected = {"role": "assistant", "content": "Yes", "refusal": None, "reasoning_content": "hm"}
    for message in (whole.json()["choices"][0]["message"], put_together(streamed)[0]):
        assert message == expected
    assert plain.json()["choices"][0]["message"] == expected
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "<think>")
    for answer in asked(folder, {}, {"tools": None}):
        assert answer.json()["choices"][0]["message"] == expected


def test_tools_that_are_not_to_be_called_are_not(tmp_path: Path) -> None:
    folder = make_obedient(tmp_path / "m", CALL, template=SAY)
    (plain,) = asked(folder, {"tool_choice": "none"})
    assert plain.json()["choices"][0]["message"]["content"] == "".join(CALL)


def test_what_clients_write_out_is_taken_in_its_plain_meaning(server: Served) -> None:
    """Messages as they come back from OpenAI's client, nulls of fields that are not here, ..."""
    function = {"name": "f", "arguments": "{}"}
    nulls = {"audio": None, "function_call": None, "refusal": None, "something": None}
    call = {"id": "c", "type": "function", "function": function, "x": None}
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]

    def text(messages: list[dict[str, Any]], **fields: Any) -> str:
        asked = {"temperature": 0, "max_tokens": 8, "messages": messages, **fields}
        answer = server.post(CHAT, asked)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    usual = text(plain)
    user, said = plain
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "id": 5}]
    for messages in (
        [user, {**said, **nulls, "tool_calls": None, "annotations": []}],
        [user, {**said, "tool_calls": [], "reasoning_content": None}],
        [{**user, "name": None, "content": parts, "cache_control": {"type": "ephemeral"}}, said],
        [{**user, "content": [{"type": "input_text", "text": "hi"}]}, said],
        [user, {"role": "assistant", "content": None, "refusal": "yes"}],
        [user, {"role": "assistant", "content": [{"type": "refusal", "refusal": "yes"}]}],
    ):
        assert text(messages) == usual, messages
    assert text(plain, functions=None, audio=None, response_format=None, logit_bias=None) == usual
    assert text(plain, temperature=1, top_p=0, seed=5) == usual, "the likeliest alone"
    quiet = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "c", "content": "1"}
    want = text([*quiet, result])
    for content in ({"content": None}, {}):
        assert text([user, {**quiet[1], **content, **nulls}, result]) == want
    for arguments in ({}, "", None):
        called = {**call, "function": {**function, "arguments": arguments}}
        assert text([user, {**quiet[1], "tool_calls": [called]}, result]) == want
    unlimited = server.post(CHAT, {"messages": plain, "temperature": 0, "ignore_eos": True})
    for limit in ("max_tokens", "max_completion_tokens"):
        body = {"messages": plain, "temperature": 0, "ignore_eos": True, limit: -1}
        assert server.post(CHAT, body).json()["choices"] == unlimited.json()["choices"]
    assert unlimited.json()["usage"]["total_tokens"] == 256
    body = {"prompt": "a", "max_tokens": -1, "ignore_eos": True, "n": 2, "best_of": 2}
    both = server.post(COMPLETIONS, body).json()
    assert len(both["choices"]) == 2 and both["usage"]["completion_tokens"] > 400
    for wrong in ({"best_of": 2}, {"n": 2, "best_of": 1}, {"n": 2, "best_of": 3}):
        answer = server.post(COMPLETIONS, {"prompt": "a", **wrong})
        assert answer.status_code == 400 and "by n" in answer.json()["error"]["message"]


def test_a_slash_at_the_end_and_head_are_the_same_route(server: Served) -> None:
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/metrics", "/", "/app.js"):
        found, slashed = server.get(path), server.get(path.rstrip("/") + "/")
        assert found.status_code == slashed.status_code == 200
        head = httpx.head(server.url + path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-type"] == found.headers["content-type"]
        if path != "/metrics":
            assert (
                head.headers["content-length"]
                == str(len(found.content))
                == slashed.headers["content-length"]
            )
    answer = server.post(COMPLETIONS + "/", {"prompt": "a", "max_tokens": 1})
    assert answer.status_code == 200
    assert httpx.head(server.url + COMPLETIONS).status_code == 405
    assert httpx.head(server.url + "/v1/nothing").status_code == 404


def test_a_request_without_memory_is_told_so_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "m", eos=None, context=4096)

    async def ask(engine: Engine) -> list[httpx.Response]:
        app = make_app(Serving(engine, Settings("tiny")))[0]
        transport = httpx.ASGITransport(app=app)
        short, long = [{"prompt": [5] * n, "max_tokens": 2} for n in (5, 2000)]
        asked = [short, long, {**long, "stream": True}, {**long, "n": 2}, short]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.post(COMPLETIONS, json=body) for body in asked]

    with Engine.open(folder) as engine:
        cache = engine.group.model.cache
        real = cache.resize

        def resize(rows: int, capacity: int) -> None:
            if capacity > 1000:
                raise MemoryError
            real(rows, capacity)

        monkeypatch.setattr(cache, "resize", resize)
        before, whole, streamed, two, after = asyncio.run(ask(engine))
    assert before.status_code == after.status_code == 200
    assert before.json()["choices"] == after.json()["choices"]
    for answer in (whole, two):
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "out_of_memory"
    assert streamed.status_code == 200 and '"out_of_memory"' in streamed.text


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
        timeout=600,
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


METRICS = {
    'requests_total{route="/v1/completions",status="200"}',
    "disconnects_total",
    "requests_running",
    "requests_waiting",
    "cached_tokens",
    "prompt_tokens_total",
    "generated_tokens_total",
    *(
        f"{name}_seconds_{part}"
        for name in ("time_to_first_token", "time_per_output_token")
        for part in ("sum", "count", 'bucket{le="+Inf"}', 'bucket{le="0.1"}', 'bucket{le="1.0"}')
    ),
}


def test_metrics_keep_their_names_and_labels(server: Served) -> None:
    """Which dashboards and alarms ask for; and nothing else beside them."""
    server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 3, "ignore_eos": True})
    answer = server.get("/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    lines = answer.text.splitlines()
    found = {line.rpartition(" ")[0].removeprefix("bevatron_") for line in lines if line[0] != "#"}
    assert found >= METRICS
    families = {name.partition("{")[0] for name in METRICS}
    assert {name.partition("{")[0] for name in found} == families
    assert {line for line in lines if line.startswith("# TYPE bevatron_requests_")} == {
        "# TYPE bevatron_requests_total counter",
        "# TYPE bevatron_requests_running gauge",
        "# TYPE bevatron_requests_waiting gauge",
    }


@pytest.mark.slow
def test_two_ranks_serve_the_same_answers(model: Path, server: Served) -> None:
    asked = {"prompt": "The quick brown", "temperature": 0, "max_tokens": 20}
    with served(model, "--tp", "2") as other:
        assert (
            other.post(COMPLETIONS, asked).json()["choices"]
            == (server.post(COMPLETIONS, asked).json()["choices"])
        )
