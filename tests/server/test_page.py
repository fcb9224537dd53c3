"""The page at `/` in a real browser, against `bevatron serve` with a tiny random model."""

# ruff: noqa: E501 (scripts for the browser, hostile texts)

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.browser import CHROMIUM, SHIFT, Browser, Page
from tests.server.served import Served, make_model, served

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

RUNS = "document.body.classList.contains('runs')"
KEPT = """(() => {
    const id = JSON.parse(localStorage.getItem("bevatron.last"));
    return JSON.parse(localStorage.getItem("bevatron.c." + id)).messages;
})()"""
SETTINGS = {"temperature": "0", "max_tokens": "24"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def ready(page: Page, server: Served, **settings: str) -> Page:
    page.open(server.url + "/")
    if settings:
        page.js(
            f"localStorage.setItem('bevatron.settings', JSON.stringify({json.dumps(settings)}))"
        )
        page.open(server.url + "/")
    page.wait("document.title.includes('·')")
    return page


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own, which at the end must have had no problem and asked only its server."""
    page = browser.page()
    yield page
    origin = page.js("location.origin")
    assert page.requests and all(
        url.startswith((origin, "data:image/svg")) for url in page.requests
    )
    assert page.problems == []
    page.close()


def say(page: Page, text: str) -> list[dict[str, Any]]:
    """Type, press Enter, wait for the whole answer; what is kept then."""
    page.click("#input")
    page.type(text)
    page.press("Enter")
    page.wait(f"!{RUNS}")
    return list(page.js(KEPT))


def asked(server: Served, messages: list[tuple[str, str]], **more: Any) -> str:
    """What the server says to the same messages without the page, not streamed."""
    body = {"messages": [{"role": r, "content": c} for r, c in messages], "temperature": 0}
    reply = server.post("/v1/chat/completions", {**body, "max_tokens": 24, **more})
    return str(reply.json()["choices"][0]["message"]["content"])


WATCH = """window.seen = new Set();
    new MutationObserver(() => seen.add(document.querySelector(".answer .stats")?.textContent))
        .observe(document.querySelector("#turns"), {subtree: true, childList: true, characterData: true});"""


def test_an_answer_is_shown_while_it_comes(page: Page, endless: Served) -> None:
    ready(page, endless, temperature="1")
    page.js(WATCH)
    page.click("#input")
    page.type("go")
    page.press("Enter")
    page.wait("seen.size > 3")
    assert page.js(RUNS)
    page.press("Escape")
    page.wait(f"!{RUNS}")


def test_a_conversation_streams_and_arrives_whole(page: Page, server: Served) -> None:
    ready(page, server, **SETTINGS, system="Be brief.")
    first = say(page, "Grüße 🙂")
    expected = asked(server, [("system", "Be brief."), ("user", "Grüße 🙂")])
    answer = first[1]["answers"][0]
    assert answer["content"] == expected
    assert answer["stats"]["completion"] == 24 and answer["finish"] == "length"
    assert "24 tokens ·" in page.text(".answer .stats"), "counts and speed are shown"
    second = say(page, "more")
    history = [
        ("system", "Be brief."),
        ("user", "Grüße 🙂"),
        ("assistant", expected),
        ("user", "more"),
    ]
    assert second[3]["answers"][0]["content"] == asked(server, history)
    assert page.js("document.querySelectorAll('.turn').length") == 4
    assert "of 256 tokens" in page.text("#context")


def test_the_page_says_what_the_server_takes_by_itself(page: Page, server: Served) -> None:
    ready(page, server)
    page.click("#open-settings")
    shown = page.js("""Object.fromEntries([...document.querySelectorAll("#settings input[type=number]")]
        .map((i) => [i.name, i.placeholder]))""")
    (model,) = server.get("/v1/models").json()["data"]
    assert {k: float(shown[k]) for k in model["sampling"]} == model["sampling"]
    assert shown["seed"] == "random"


def test_escape_stops_an_answer_and_frees_its_cache(page: Page, endless: Served) -> None:
    ready(page, endless, temperature="1")
    page.click("#input")
    page.type("go")
    page.press("Enter")
    page.wait("document.querySelector('.answer > .markdown')?.innerText.length > 20")
    assert page.js(RUNS) and not endless.idle(0)
    page.press("Escape")
    page.wait(f"!{RUNS}")
    assert endless.idle(), "the server stopped at once"
    (answer,) = page.js(KEPT)[1]["answers"]
    assert answer["finish"] == "stopped" and answer["content"], "what came stays"
    assert page.text(".stats").startswith("stopped")
    page.click("#input")
    page.type("on")
    page.press("Enter")
    page.wait(RUNS)
    page.click("#send")  # which stops, while an answer comes
    page.wait(f"!{RUNS}")
    assert endless.idle()


def test_leaving_the_page_frees_the_cache_and_keeps_the_answer(page: Page, endless: Served) -> None:
    ready(page, endless, temperature="1")
    page.click("#input")
    page.type("go")
    page.press("Enter")
    page.wait("document.querySelector('.answer > .markdown')?.innerText.length > 20")
    page.open(endless.url + "/")
    assert endless.idle()
    page.wait("document.querySelector('.answer > .markdown')?.innerText.length > 20")


def test_another_answer_stands_beside_the_first(page: Page, server: Served) -> None:
    ready(page, server, max_tokens="16", temperature="1")
    (first,) = say(page, "hello")[1]["answers"]
    page.click('[aria-label="Another answer"]')
    page.wait(f"!{RUNS} && document.querySelector('.place').textContent === '2/2'")
    both = page.js(KEPT)[1]["answers"]
    assert both[0] == first and both[1]["content"] != first["content"], "a seed of its own"
    page.click('[aria-label="Previous answer"]')
    page.wait("document.querySelector('.place').textContent === '1/2'")
    assert f"seed {first['stats']['seed']}" in page.text(".stats")
    # The seed that is shown gives the answer again.
    page.click("#open-settings")
    page.click("[name=seed]")
    page.type(str(first["stats"]["seed"]))
    page.click('[aria-label="Another answer"]')
    page.wait(f"!{RUNS} && document.querySelector('.place').textContent === '3/3'")
    assert page.js(KEPT)[1]["answers"][2]["content"] == first["content"]


def test_an_earlier_message_can_be_edited(page: Page, server: Served) -> None:
    ready(page, server, **SETTINGS)
    say(page, "one")
    say(page, "two")
    page.click('.user [aria-label="Edit"]')
    page.wait("document.activeElement.matches('.editor textarea')")
    page.js("document.activeElement.select()")
    page.type("three")
    page.press("Enter")
    page.wait(f"!{RUNS} && document.querySelectorAll('.turn').length === 2")
    kept = page.js(KEPT)
    assert kept[0]["content"] == "three"
    assert kept[1]["answers"][0]["content"] == asked(server, [("user", "three")])
    # From an empty message, the arrow up edits the last one; Esc leaves it as it was.
    page.click("#input")
    page.press("ArrowUp")
    page.wait("document.activeElement.matches('.editor textarea')")
    page.type("changed")
    page.press("Escape")
    page.wait("!document.querySelector('.editor')")
    assert page.text(".bubble") == "three"


def test_conversations_stay_in_the_browser(page: Page, server: Served) -> None:
    ready(page, server, **SETTINGS)
    say(page, "first one")
    shown = page.text("#turns")
    page.open(server.url + "/")
    page.wait("document.querySelectorAll('.turn').length === 2")
    assert page.text("#turns") == shown
    page.click("#new")
    page.wait("!document.querySelector('.turn')")
    say(page, "second one")
    page.click("#open-history")
    assert page.js("[...document.querySelectorAll('.entry span')].map((e) => e.textContent)") == [
        "second one", "first one",
    ]  # fmt: skip
    page.click("li:nth-child(2) .entry")
    page.wait("document.querySelector('.bubble').textContent === 'first one'")
    page.click("#open-history")
    page.click('[aria-label="Delete “first one”"]')
    page.wait(
        "!document.querySelector('.turn') && document.querySelectorAll('.entry').length === 1"
    )


def test_what_another_program_left_in_storage_does_no_harm(page: Page, server: Served) -> None:
    ready(page, server)
    page.js("""localStorage.clear();
        localStorage.setItem("bevatron.settings", '{"temperature": [1], "system": {"a": 1}}');
        localStorage.setItem("bevatron.theme", "<b>");
        localStorage.setItem("bevatron.last", '"x"');
        localStorage.setItem("bevatron.c.y", "no json");
        localStorage.setItem("bevatron.c.x", JSON.stringify({changed: "a", title: 5, messages: [null, 5, {},
            {role: "user", content: {a: 1}}, {role: "assistant", answers: []}, {role: "system", content: "x"},
            {role: "assistant", answers: [5, {content: "kept", calls: [null]}], shown: 77}]}))""")
    page.open(server.url + "/")
    page.wait("document.querySelector('.answer')?.innerText.includes('kept')")
    page.click("#open-history")
    page.wait("document.querySelectorAll('.entry').length === 2")


def test_a_model_without_template_continues_a_text(page: Page, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base", template=None)
    with served(folder, "--api-key", "secret") as server:
        page.open(server.url + "/")
        page.wait("document.querySelector('#key').open")
        page.type("wrong")
        page.press("Enter")
        page.wait("document.querySelector('#key-text').textContent.includes('does not accept')")
        page.js("document.querySelector('#key-input').select()")
        page.type("secret")
        page.press("Enter")
        page.wait("document.body.classList.contains('completes')")
        assert "continues text" in page.text("#empty")
        say(page, "The quick ")
        server.headers["Authorization"] = "Bearer secret"
        page.click("#open-settings")
        page.click("[name=max_tokens]")
        page.type("16")
        page.click('[aria-label="Another continuation"]')
        page.wait(f"!{RUNS} && document.querySelector('.place').textContent === '2/2'")
        answer = page.js(KEPT)[1]["answers"][1]
        body = {"prompt": "The quick ", "seed": answer["stats"]["seed"], "max_tokens": 16}
        same = server.post("/v1/completions", body).json()
        assert answer["content"] == same["choices"][0]["text"]
        assert (
            page.js("document.querySelector('.prose').textContent")
            == "The quick " + answer["content"]
        )
        page.click("#send")  # with nothing written, the text goes on
        page.wait(f"!{RUNS} && document.querySelectorAll('.made').length === 2")
        assert "secret" not in page.js("JSON.stringify(localStorage)")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_in_one_direction_only(
    browser: Browser, server: Served, dark: bool
) -> None:
    page = ready(
        browser.page(390, 844, phone=True, dark=dark),
        server,
        max_tokens="90",
        system="Be brief. " * 7,
    )
    page.click("#input")
    page.type("a" * 60)
    page.press("Enter")  # a new line: on a phone the button sends
    assert page.js("document.querySelector('#input').value.endsWith('\\n')")
    page.click("#send")
    page.wait(f"!{RUNS} && !!document.querySelector('.answer')")
    for opened in ("#open-settings", "#open-history", None):
        if opened:
            page.click(opened)
        assert page.js("""[document.documentElement, document.querySelector("#scroller"),
            document.querySelector("dialog[open]") ?? document.body]
            .every((n) => n.scrollWidth <= n.clientWidth && n.clientWidth <= 390)""")
        if opened:
            page.click("dialog[open] [data-close]")
    small = page.js("""[...document.querySelectorAll("button, select, summary")].filter((b) => {
        const {width, height} = b.getBoundingClientRect();
        return width && (width < 24 || height < 24);
    }).map((b) => b.outerHTML)""")
    assert small == [], "every target is large enough for a finger"
    page.close()


def test_light_and_dark_follow_the_system_until_chosen(browser: Browser, server: Served) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page = ready(browser.page(dark=True), server)
    assert page.js(paper) == "rgb(19, 20, 23)"
    page.media(**{"prefers-color-scheme": "light"})
    assert page.js(paper) == "rgb(251, 251, 250)"
    page.click("#theme")
    page.click("#theme")
    assert page.js("document.querySelector('#theme').title") == "Theme: dark"
    assert page.js(paper) == "rgb(19, 20, 23)"
    page.open(server.url + "/")
    assert page.js(paper) == "rgb(19, 20, 23)", "the choice stays"
    assert page.problems == []
    page.close()


def test_everything_has_a_name_and_can_be_read(browser: Browser, server: Served) -> None:
    """Names for screen readers; contrast of at least 4.5 for text, in both themes."""
    page = ready(browser.page(), server, **SETTINGS)
    say(page, "hello")
    page.click("#open-settings")
    page.send("Accessibility.enable")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "spinbutton", "radio", "link", "dialog")
    unnamed = [n for n in nodes if n["role"]["value"] in roles and not n["name"]["value"].strip()]
    assert unnamed == [] and len(nodes) > 50
    for theme in ("light", "dark"):
        ratios = page.js(f"""(() => {{
            document.documentElement.dataset.theme = "{theme}";
            const probe = document.createElement("i");
            document.body.append(probe);
            const light = (name) => {{
                probe.style.color = `var(--${{name}})`;
                const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((v) =>
                    v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            }};
            const found = {{}};
            for (const [ink, grounds] of Object.entries({{ink: "paper card tint fill", soft: "paper card fill",
                    faint: "paper card fill", accent: "paper card", bad: "bad-tint card", "on-accent": "accent"}}))
                for (const ground of grounds.split(" ")) {{
                    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
                    found[`${{ink}} on ${{ground}}`] = (a + 0.05) / (b + 0.05);
                }}
            return found;
        }})()""")
        assert {k: v for k, v in ratios.items() if v < 4.5} == {}
    page.close()


def test_shift_enter_and_a_composed_word_do_not_send(page: Page, server: Served) -> None:
    ready(page, server, **SETTINGS)
    page.click("#input")
    page.type("a")
    page.press("Enter", SHIFT)
    page.js("""document.querySelector("#input").dispatchEvent(
        new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))""")
    page.type("b")
    assert page.js("document.querySelector('#input').value") == "a\nb"
    assert not page.js("document.querySelector('.turn')")
