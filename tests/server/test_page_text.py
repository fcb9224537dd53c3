"""Markdown of untrusted text in a real browser: what it becomes, and how long that takes."""

# ruff: noqa: E501 (scripts for the browser, hostile texts)

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.server.browser import CHROMIUM, Browser, Page
from tests.server.stand_in import StandIn

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

MARKDOWN = """\
# Title *slanted*
A **bold** and *thin* line with `code **x**`, ~~gone~~, snake_case_name, 2 * 3 * 4 and \\*stars\\*.
Second line: ***both*** and **bold with *thin* inside** and *foo**bar*.

- one
- two
  continued
  1. deep
  2. deeper

     more
- three
* other list

3. third
4. fourth

> quoted **text**
> - in a list

| a | b \\| c | `d|e` |
|:--|:-:|--:|
| 1 | 2 | **3** |
| only one |

```python
def f(x: int) -> str:
    return "<b>" + str(x)  # ```
```
~~~
tilde ``` fence
~~~
---
[words](https://example.com/a_(b) "title") and https://example.com/x_y_z. <https://example.org>
[no](javascript:alert(1)) [no](data:text/html,x) ![alt](http://example.com/i.png) <br> <b>no</b>
"""

SHAPE = """(root) => {
    const shape = (n) => n.nodeType === 3 ? n.data : n.matches(".bar, .host") ? "" :
        `<${n.localName}${n.href ? "=" + n.getAttribute("href") : ""}>` +
        [...n.childNodes].map(shape).join("") + `</>`;
    return [...root.childNodes].map(shape);
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    stand_in = StandIn()
    server = stand_in.start()
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    page = browser.page().open(stand_in.url)
    page.js("import('./markdown.js').then((m) => { window.Markdown = m.Markdown; })")
    page.js(f"window.shape = {SHAPE}; null")
    page.js("""window.render = (text, open) => {
        const root = document.createElement("div");
        new Markdown(root).set(text, open);
        return root;
    }; null""")
    yield page
    browser.close()
    server.should_exit = True


def shape(page: Page, text: str, open: bool = False) -> list[str]:
    return list(page.js(f"shape(render({json.dumps(text)}, {json.dumps(open)}))"))


def test_markdown_becomes_elements(page: Page) -> None:
    blocks = shape(page, MARKDOWN)
    assert blocks[0] == "<h3>Title <em>slanted</></>"
    assert blocks[1] == (
        "<p>A <strong>bold</> and <em>thin</> line with <code>code **x**</>, <del>gone</>, "
        "snake_case_name, 2 * 3 * 4 and *stars*.<br></>Second line: <em><strong>both</></> and "
        "<strong>bold with <em>thin</> inside</> and <em>foo**bar</>.</>"
    )
    assert blocks[2] == (
        "<ul><li><p>one</></><li><p>two<br></>continued</><ol><li><p>deep</></><li><p>deeper</>"
        "<p>more</></></></><li><p>three</></></>"
    )
    assert blocks[3] == "<ul><li><p>other list</></></>"
    assert blocks[4] == "<ol><li><p>third</></><li><p>fourth</></></>"
    assert blocks[5] == "<blockquote><p>quoted <strong>text</></><ul><li><p>in a list</></></></>"
    assert blocks[6] == (
        "<div><table><thead><tr><th>a</><th>b | c</><th><code>d|e</></></></>"
        "<tbody><tr><td>1</><td>2</><td><strong>3</></></><tr><td>only one</><td></><td></></></></></>"
    )
    assert page.js(
        f"render({json.dumps(MARKDOWN)}).querySelector('code.none, .code code').textContent"
    ) == ('def f(x: int) -> str:\n    return "<b>" + str(x)  # ```')
    assert "tilde ``` fence" in blocks[8] and blocks[9] == "<hr></>"
    assert blocks[10] == (
        "<p><a=https://example.com/a_(b)>words</> and <a=https://example.com/x_y_z>"
        "https://example.com/x_y_z</>. <a=https://example.org>https://example.org</><br></>"
        "[no](javascript:alert(1)) [no](data:text/html,x) <a=http://example.com/i.png>alt</> "
        "<br></> <b>no</b></>"
    )
    assert len(blocks) == 11


def test_links_are_safe_and_show_where_they_lead(page: Page) -> None:
    texts = ["[your bank](https://evil.example/x)", "https://bank.example@evil.example/x",
             "[https://bank.example/](https://evil.example/)", "[a [b](https://x.example) c](https://evil.example)"]  # fmt: skip
    for text in texts:  # no link is inside of a link; a bare address needs no host beside it
        links = page.js(f"""[...render({json.dumps(text)}).querySelectorAll("a")].map((a) =>
            [a.rel, a.target, a.querySelector(".host")?.textContent, a.querySelectorAll("a").length])""")
        assert all(link[0] == "noopener noreferrer" and link[1] == "_blank" for link in links)
        assert links[-1][2:] in (["evil.example", 0], [None, 0])
    bad = ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "vbscript:x", "//evil.example",
           "file:///etc/passwd", "java\\nscript:alert(1)", "https:evil", "http://[", "/v1/models"]  # fmt: skip
    for address in bad:
        text = f"[x]({address}) <{address}>"
        assert page.js(f"render({json.dumps(text)}).querySelectorAll('a').length") == 0, address


def test_half_finished_markdown_reads_well_and_ends_the_same(page: Page) -> None:
    """Growing by any pieces, a text ends as the same elements as when it comes whole."""
    assert shape(page, "so **bold", True) == ["<p>so <strong>bold</></>"]
    assert shape(page, "so **", True) == ["<p>so <strong></></>"]
    assert shape(page, "run `make te", True) == ["<p>run <code>make te</></>"]
    assert shape(page, "so **bold") == ["<p>so **bold</>"]
    differing = page.js(f"""(() => {{
        const whole = shape(render({json.dumps(MARKDOWN)})).join("\\n");
        const differing = [];
        for (const step of [1, 2, 3, 7, 31, 200]) {{
            const root = document.createElement("div");
            const markdown = new Markdown(root);
            const text = {json.dumps(MARKDOWN)};
            for (let i = 0; i < text.length; i += step) markdown.set(text.slice(0, i), true);
            markdown.set(text);
            if (shape(root).join("\\n") !== whole) differing.push(step);
        }}
        return differing;
    }})()""")
    assert differing == []


def test_what_is_finished_is_not_made_again(page: Page) -> None:
    """So that a reader's selection, and the place in wide code, stay while an answer grows."""
    assert page.js("""(() => {
        const root = document.createElement("div");
        const markdown = new Markdown(root);
        markdown.set("first\\n\\n```py\\nx = 1", true);
        const [first, code] = root.children;
        markdown.set("first\\n\\n```py\\nx = 1\\n", true);
        markdown.set("first\\n\\n```py\\nx = 1\\ny = 2", true);
        const same = root.children[0] === first && root.children[1] === code && code.textContent.includes("y = 2");
        markdown.set("other");
        return same && root.children.length === 1 && root.textContent === "other";
    })()""")


HOSTILE = [
    "'`'.repeat(n)", "'*'.repeat(n)", "'*a '.repeat(n / 3)", "'a* '.repeat(n / 3)", "'*a*'.repeat(n / 3)",
    "'**a *b '.repeat(n / 7)", "'_a_ '.repeat(n / 4)", "'['.repeat(n)", "'[a]('.repeat(n / 4)",
    "'[a](http://b '.repeat(n / 12)", "'](http://'.repeat(n / 9)", "'>'.repeat(n)", "'> '.repeat(n / 2)",
    "'- '.repeat(n / 2)", "'1. '.repeat(n / 3)", "'- a\\n'.repeat(n / 4)", "' '.repeat(n)", "'\\n'.repeat(n)",
    "'#'.repeat(n)", "'# a\\n'.repeat(n / 4)", "'# ' + ' #'.repeat(n / 2)", "'|'.repeat(n)", "'|-'.repeat(n / 2)",
    "'a|b\\n-|-\\n' + 'c|d\\n'.repeat(n / 4)", "'```' + ' '.repeat(n) + '`'", "'```\\n'.repeat(n / 4)",
    "'`a``b```c'.repeat(n / 9)", "'- - -'.repeat(n / 5) + 'x'", "'http://'.repeat(n / 7)", "'http://a. '.repeat(n / 10)",
    "'http://' + '('.repeat(n)", "'http://a' + ')'.repeat(n)", "'a'.repeat(n)", "'\\\\'.repeat(n)", "'<br>'.repeat(n / 4)",
    "'```py\\n' + '\"'.repeat(n)", "'```js\\n' + '/*'.repeat(25000)", "'```py\\n' + 'a('.repeat(25000)",
    "('  '.repeat(3) + '- a\\n\\n').repeat(n / 12)", "Array.from({length: 1400}, (_, i) => ' '.repeat(i) + '- a\\n').join('')",
]  # fmt: skip


def test_hostile_text_takes_linear_time(page: Page) -> None:
    """Each takes well under a second; a quadratic pass over as much would take minutes."""
    slow = {}
    for source in HOSTILE:
        seconds, depth = page.js(f"""(() => {{
            const n = 200_000;
            const text = {source};
            const start = performance.now();
            const root = render(text, true);
            const seconds = (performance.now() - start) / 1000;
            let depth = 0;
            for (let node = root; node; node = node.lastElementChild) depth += 1;
            return [seconds, depth];
        }})()""")
        assert depth < 100, source
        if seconds > 10:
            slow[source] = seconds
    assert slow == {}


def test_no_text_is_lost(page: Page) -> None:
    """Whatever the markers, every letter and digit is on the page, in its order."""
    lost = page.js("""(() => {
        let seed = 1;
        const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
        const parts = ["*", "**", "_", "`", "``", "```", "~~", "[", "](", ")", "](https://a.b)", "!", "\\n", "\\n\\n",
            " ", "  ", "- ", "1. ", "> ", "# ", "|", "|-|-|", "\\\\", "<", ">", "<br>", "---", "a", "b1", "c_d", "\\t"];
        const letters = (text) => text.replace(/<br>/g, "").replace(/https:\\/\\/a\\.b/g, "").replace(/\\d+[.)]/g, "")
            .replace(/[^a-d]/g, "");
        for (let i = 0; i < 3000; i += 1) {
            let text = "";
            for (let k = random(25); k >= 0; k -= 1) text += parts[random(parts.length)];
            const root = render(text);
            root.querySelectorAll(".bar, .host").forEach((n) => n.remove());
            if (!text.includes("```") && letters(root.textContent) !== letters(text)) return text;
        }
        return null;
    })()""")
    assert lost is None
