"""The page with answers that no small model gives: markup, failures, reasoning, tool calls."""

# ruff: noqa: E501 (scripts for the browser, hostile texts)

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from fastapi.responses import JSONResponse, Response

from tests.server.browser import CHROMIUM, Browser, Page
from tests.server.stand_in import StandIn

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

RUNS = "document.body.classList.contains('runs')"
ATTACKS = """\
<script>window.hit = 1</script><img src=x onerror="window.hit = 2"><svg/onload=window.hit=3>
<iframe srcdoc="<script>parent.hit = 4</script>"></iframe><style>body { display: none }</style>
<a href="javascript:window.hit=5">a</a><base href="http://evil.example/"><meta http-equiv="refresh" content="0">
[a](javascript:window.hit=6) [b](data:text/html,<script>hit=7</script>) ![c](http://evil.example/i.png)
[d](https://evil.example/"onmouseover="window.hit=8) `<img src=x onerror=window.hit=9>` {{hit}} ${hit}
# <img src=x onerror=window.hit=10>
| <img src=x onerror=window.hit=11> |
|-|
| </td><script>window.hit = 12</script> |

```html"><img src=x onerror=window.hit=13>
</code></pre><script>window.hit = 14</script><img src=http://evil.example/j.png>
```
</think><script>window.hit = 15</script>\x00\u202e
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    stand_in = StandIn()
    server = stand_in.start()
    yield stand_in
    server.should_exit = True


@pytest.fixture
def page(browser: Browser, stand_in: StandIn) -> Iterator[Page]:
    page = browser.page()
    yield page
    assert all(url.startswith((stand_in.url, "data:image/svg")) for url in page.requests)
    assert page.problems == []
    page.close()


def ready(page: Page, stand_in: StandIn) -> Page:
    page.open(stand_in.url)
    page.wait("document.title.includes('·')")
    return page


def send(page: Page, text: str) -> None:
    page.click("#input")
    page.type(text)
    page.press("Enter")


def say(page: Page, text: str) -> None:
    send(page, text)
    page.wait(f"!{RUNS}")


def call(index: int, **function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "id": f"call{index}", "function": function}]}


def test_no_text_does_anything(page: Page, stand_in: StandIn) -> None:
    """Markup in answers, reasoning, tool calls, errors, the model's name, what the user writes."""
    stand_in.name = ATTACKS
    answers = [
        [ATTACKS],
        ["<think>", ATTACKS.replace("</think>", ""), "</think>", *ATTACKS],
        [{"reasoning_content": ATTACKS}, call(0, name=ATTACKS, arguments=json.dumps({ATTACKS: ATTACKS}))],
        [{"error": {"message": ATTACKS}}],
    ]  # fmt: skip
    stand_in.answer = lambda body: answers[len(stand_in.asked) - 1]
    ready(page, stand_in)
    page.click("#open-settings")
    page.click("[name=system]")
    page.type(ATTACKS)
    count = page.js("document.querySelectorAll('*').length")
    for _ in answers:
        say(page, ATTACKS)
    page.click("#open-history")
    page.open(stand_in.url)
    page.wait("document.querySelectorAll('.turn').length === 8")
    assert page.js("""[window.hit, location.hash, document.querySelectorAll(
        "iframe, img, object, embed, base, main style, main script, [onerror], [onload], [onmouseover], [srcdoc]"
        ).length, document.querySelectorAll("script").length]""") == [None, "", 0, 2]
    assert set(page.js("[...document.querySelectorAll('main a')].map((a) => new URL(a.href).protocol)")) <= {
        "http:", "https:",
    }  # fmt: skip
    assert "<script>window.hit = 1</script>" in page.text("#turns"), "it is shown as what it is"
    assert page.js("document.querySelectorAll('*').length") > count


def test_the_browser_itself_refuses_markup_from_text(page: Page, stand_in: StandIn) -> None:
    """A second line: even a mistake in the page could neither make markup nor reach another server."""
    ready(page, stand_in)
    refused = page.js("""(async () => {
        const tries = [
            () => { document.createElement("div").innerHTML = "<b>x</b>"; },
            () => { document.body.insertAdjacentHTML("beforeend", "<b>x</b>"); },
            () => { document.createElement("script").textContent = "1"; },
            async () => { await fetch("http://127.0.0.1:9/"); },
        ];
        let refused = 0;
        for (const attempt of tries) try { await attempt(); } catch { refused += 1; }
        return refused;
    })()""")
    assert refused == 4
    page.requests = [url for url in page.requests if ":9/" not in url]
    page.problems.clear()


def test_failures_are_said_and_can_be_tried_again(page: Page, stand_in: StandIn) -> None:
    answers: list[Any] = [
        JSONResponse({"error": {"message": "the queue is full"}}, 429),
        JSONResponse({"error": {"message": "the prompt has 9 tokens"}}, 400),
        Response("<html>proxy</html>", 502),
        ["half an ", {"error": {"message": "the engine stopped"}}],
        ["whole ", "answer"],
    ]
    stand_in.answer = lambda body: answers[len(stand_in.asked) - 1]
    ready(page, stand_in)
    say(page, "hello")
    for words in (
        "the queue is full",
        "the prompt has 9 tokens",
        "status 502",
        "the engine stopped",
    ):
        page.wait(f"document.querySelector('.error')?.innerText.includes({words!r})")
        if words == "the engine stopped":
            assert page.text(".answer > .markdown") == "half an", "what came stays"
        page.click(".error button:last-child")
        page.wait(f"!{RUNS}")
    page.wait("document.querySelector('.answer > .markdown').innerText === 'whole answer'")
    assert not page.text(".error")
    assert all(
        body["messages"] == [{"role": "user", "content": "hello"}] for body in stand_in.asked
    )


def test_what_got_no_answer_is_asked_with_what_follows(page: Page, stand_in: StandIn) -> None:
    """Templates refuse two messages of the user in a row."""
    answers: list[Any] = [JSONResponse({"error": {"message": "no"}}, 500), ["yes"]]
    stand_in.answer = lambda body: answers[len(stand_in.asked) - 1]
    ready(page, stand_in)
    say(page, "one")
    say(page, "two")
    assert stand_in.asked[1]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]
    assert page.js("document.querySelectorAll('.turn').length") == 3


def test_settings_go_with_the_request(page: Page, stand_in: StandIn) -> None:
    ready(page, stand_in)
    say(page, "plain")
    assert set(stand_in.asked[0]) == {"model", "seed", "messages", "stream", "stream_options"}
    page.click("#open-settings")
    values = {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "99",
              "seed": "7", "repetition_penalty": "1.1"}  # fmt: skip
    for name, value in {**values, "system": "Be brief.", "stop": "###\n\nEND"}.items():
        page.click(f"#settings [name={name}]")
        page.type(value)
    say(page, "set")
    body = stand_in.asked[1]
    assert {k: body[k] for k in values} == {k: float(v) for k, v in values.items()}
    assert body["stop"] == ["###", "END"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.text("#system-line") == "System: Be brief."
    page.click("[name=top_p]")
    page.js("document.activeElement.select()")
    page.type("99")
    send(page, "wrong")
    page.wait("document.activeElement.name === 'top_p'")
    assert len(stand_in.asked) == 2, "what cannot be meant is not sent"
    page.click("#defaults")
    say(page, "")
    assert "top_p" not in stand_in.asked[2]


@pytest.mark.parametrize("pieces", [
    ["<think>", "so ", "so", "</think>", "\n\nthe answer"],
    ["so so\n</think>\n\nthe answer"],
    [{"reasoning_content": "so so"}, "the answer"],
])  # fmt: skip
def test_reasoning_is_folded_and_not_sent_back(
    page: Page, stand_in: StandIn, pieces: list[Any]
) -> None:
    stand_in.answer = lambda body: pieces
    ready(page, stand_in)
    say(page, "think")
    assert page.text(".answer > .markdown") == "the answer"
    assert page.js("document.querySelector('.think').open") is False
    page.click(".think summary")
    assert page.text(".think .markdown") == "so so"
    say(page, "more")
    assert stand_in.asked[1]["messages"][1] == {"role": "assistant", "content": "the answer"}


def test_tool_calls_are_shown_and_their_results_sent(page: Page, stand_in: StandIn) -> None:
    first = [call(0, name="get_weather", arguments='{"city": '), call(0, arguments='"Oslo"}'),
             call(1, name="get_time", arguments="{}")]  # fmt: skip
    stand_in.answer = lambda body: ["It is cold."] if len(stand_in.asked) > 1 else first
    ready(page, stand_in)
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    page.click("#open-settings")
    page.click("#tools-field summary")
    page.click("[name=tools]")
    page.type(json.dumps(tools))
    say(page, "weather?")
    assert stand_in.asked[0]["tools"] == tools
    assert [page.text(f".call:nth-child({i}) .name") for i in (1, 2)] == ["get_weather", "get_time"]
    assert '"city": "Oslo"' in page.text(".call pre")
    page.click(".call textarea")
    page.type("-3 degrees")
    page.click(".calls > button")
    page.wait(f"document.querySelectorAll('.turn').length === 5 && !{RUNS}")
    _, assistant, weather, time = stand_in.asked[1]["messages"]
    assert [c["function"]["arguments"] for c in assistant["tool_calls"]] == [
        '{"city": "Oslo"}',
        "{}",
    ]
    assert weather == {
        "role": "tool",
        "tool_call_id": "call0",
        "name": "get_weather",
        "content": "-3 degrees",
    }
    assert time["tool_call_id"] == "call1"


def test_scrolling_follows_but_never_fights_the_reader(page: Page, stand_in: StandIn) -> None:
    stand_in.answer = lambda body: (f"line {i}\n\n" for i in count())
    stand_in.pause = 0.01
    ready(page, stand_in)
    send(page, "long")
    far = "(({scrollHeight: h, scrollTop: t, clientHeight: c}) => h - t - c)(document.querySelector('#scroller'))"
    page.wait("document.querySelectorAll('.answer p').length > 40")
    assert page.js(far) < 60, "it follows"
    page.send("Input.dispatchMouseEvent", type="mouseWheel", x=600, y=300, deltaX=0, deltaY=-400)
    page.wait(f"{far} > 100")
    top = page.js("document.querySelector('#scroller').scrollTop")
    shown = page.js("document.querySelectorAll('.answer p').length")
    page.wait(f"document.querySelectorAll('.answer p').length > {shown + 15}")
    assert abs(page.js("document.querySelector('#scroller').scrollTop") - top) < 500, (
        "it stays there"
    )
    assert page.js(far) > 100
    page.click("#latest")
    page.wait(f"{far} < 60")
    page.press("Escape")
    page.wait(f"!{RUNS}")
    assert page.js(far) < 60, "and follows again"


def test_wide_things_scroll_by_themselves_on_a_phone(browser: Browser, stand_in: StandIn) -> None:
    wide = "x" * 3000
    rows = "|".join(["wide cell"] * 30)
    marks = "|".join(["-"] * 30)
    text = f"{wide}\n\n`{wide}`\n\n```py\n{wide}\n```\n\n{rows}\n{marks}\n{rows}\n\n# {wide}\n\n- https://a.b/{wide}"
    stand_in.name = wide
    stand_in.answer = lambda body: [text, call(0, name=wide, arguments=wide)]
    page = ready(browser.page(360, 740, phone=True), stand_in)
    page.click("#input")
    page.type(wide)
    page.click("#send")
    page.wait(f"!{RUNS} && !!document.querySelector('.call')")
    assert page.js("""[document.documentElement, document.querySelector("#scroller"),
        document.querySelector("header")].map((n) => n.scrollWidth - n.clientWidth)""") == [0, 0, 0]
    assert page.js("document.querySelector('#scroller').getBoundingClientRect().width") == 360
    page.close()


def test_leaving_for_a_new_conversation_hangs_up(page: Page, stand_in: StandIn) -> None:
    stand_in.answer = lambda body: ["word "] * 2000
    stand_in.pause = 0.02
    ready(page, stand_in)
    send(page, "long")
    page.wait("document.querySelector('.answer > .markdown')?.innerText.length > 20")
    page.click("#new")
    page.wait("!document.querySelector('.turn')")
    page.wait(f"!{RUNS}")
    stand_in.answer = lambda body: ["short"]
    say(page, "next")
    assert page.text(".answer > .markdown") == "short"
    assert stand_in.left == 1


def test_code_is_copied_as_it_was_written(page: Page, stand_in: StandIn) -> None:
    stand_in.answer = lambda body: ["```python\nif a < b:\n    print('&amp;')\n```"]
    ready(page, stand_in)
    say(page, "code")
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click('[aria-label="Copy code"]')
    assert page.wait("window.copied") == "if a < b:\n    print('&amp;')"
    assert page.js("document.querySelectorAll('.x-keyword').length") == 1
