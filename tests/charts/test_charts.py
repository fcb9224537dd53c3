"""Charts in a real browser: they draw, show raw values, zoom, and save what they show."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bevatron.charts.chart import Chart, Curve, Mark, draw, heat, ranks, short
from bevatron.charts.html_page import HERE, document
from bevatron.charts.thinning import POINTS, Series, kept, smooth
from tests.server.browser import CHROMIUM, Browser, Page

NASTY = """<img src=x onerror="window.hit=1"><b>&'"""
LOSSES = 2 + 8 * np.exp(-np.arange(1, 501) / 50.0)


def body() -> str:
    series = Series(np.arange(1.0, 501.0), LOSSES)
    one = Curve(NASTY, 0, series, mean=smooth(series))
    other = Curve(
        "other", 1, Series(np.array([0.0, 250.0, 500.0]), np.array([9.0, 3.0, 2.5])), "dots"
    )
    named = Curve("others", 0, Series(np.array([1.0]), np.array([2.0])), "points", names=(NASTY,))
    bars = Curve("bars", 0, Series(np.arange(3.0), np.arange(3.0)), "bars", names=("a", "b", "c"))
    charts = [
        Chart("Loss", [one, other], marks=[Mark(0, 250.0, NASTY, bad=True)], value="nats"),
        Chart("Points", [named], axis="parameters"),
        Chart("Bars", [bars], axis="layer", from_zero=True),
    ]
    drawn = "".join(map(draw, charts))
    drawn += heat(
        "Heads", "score", "heads", {0: [("head 1", 2.0), (NASTY, 1.0)], 3: [("head 0", 4.0)]}
    )
    return drawn + ranks("Ranks", ["first", "second"], [(NASTY, "c0", [2, 1]), ("b", "rest", [1])])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Page:
    file = tmp_path / "page.html"
    file.write_text(document(NASTY, body()), encoding="utf-8")
    made = browser.page(1280, 1000).open(file.as_uri())
    made.wait("typeof figures !== 'undefined' && figures.every((f) => f.chart)")
    return made


def test_every_kind_of_chart_is_drawn_without_a_request_and_text_stays_text(page: Page) -> None:
    pixels = page.js("""figures.map((f) => {
        const c = f.figure.querySelector("canvas");
        const image = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        return new Set(new Uint32Array(image.data.buffer)).size;
    })""")
    assert len(pixels) == 5 and all(colours > 10 for colours in pixels), pixels
    tip = "{type: 'showTip', seriesIndex: 0, dataIndex: 0}"
    page.js(f"figures.forEach((f) => f.chart.dispatchAction({tip}))")
    page.wait("document.querySelectorAll('.tip').length > 1")
    assert page.problems == [] and all(r.startswith("file:") for r in page.requests)
    assert page.js("window.hit === undefined && document.querySelectorAll('main img').length === 0")
    page.media(**{"prefers-color-scheme": "dark"})
    page.wait("figures[0].chart.getOption().series[0].color === tone('c0')")


def test_under_the_pointer_are_raw_and_smoothed_values_and_what_happened(page: Page) -> None:
    page.js("figures[0].chart.dispatchAction({type: 'showTip', seriesIndex: 0, dataIndex: 249})")
    said = page.wait("document.querySelector('.tip')?.innerText")
    assert "step 250" in said and f"{LOSSES[249]:.6g}" in said and "smoothed" in said
    assert NASTY in said.splitlines()[-1]


def test_the_axis_turns_logarithmic_and_a_zoom_and_a_switch_change_what_is_shown(
    page: Page,
) -> None:
    page.js("figures[0].chart.getOption().toolbox[0].feature.myLog.onclick()")
    assert page.js("figures[0].chart.getOption().yAxis[0].type") == "log"
    box = page.js("""(() => { const r = figures[0].chart.getDom().getBoundingClientRect();
        return [r.left, r.top, r.width, r.height]; })()""")
    places = [(box[0] + box[2] * part, box[1] + box[3] * part) for part in (0.3, 0.4, 0.6)]
    for kind, (x, y) in zip(("mousePressed", "mouseMoved", "mouseReleased"), places, strict=True):
        page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    steps = "figures[0].chart.getModel().getComponent('xAxis').axis.scale.getExtent()"
    page.wait(f"{steps}[0] > 50 && {steps}[1] < 450")
    page.click("button.key[data-run='1']")
    assert page.js("figures[0].chart.getOption().legend[0].selected") == {"run 1": False}
    assert page.js("document.querySelector(\"button.key[data-run='1']\").ariaPressed") == "false"


def test_what_is_drawn_is_saved_as_csv_and_png(page: Page) -> None:
    rows = list(csv.reader(io.StringIO(page.js("csv(figures[0])"))))
    assert rows[0] == ["series", "step", "nats", "smoothed", "name"]
    assert rows[1][0] == NASTY and len(rows) == 1 + 500 + 3
    assert [float(r[2]) for r in rows[1:501]] == pytest.approx(list(LOSSES), rel=1e-5)
    assert page.js("cell('=1+1')") == "'=1+1", "no formula for a spreadsheet"
    made = page.js("figures[0].chart.getDataURL({type: 'png', pixelRatio: 2})")
    assert base64.b64decode(made.partition(",")[2]).startswith(b"\x89PNG")
    assert page.js("Boolean(figures[0].chart.getOption().toolbox[0].feature.saveAsImage)")


def test_the_library_is_the_one_that_its_notice_names() -> None:
    said = (HERE / "vendor" / "README.md").read_text()
    code = (HERE / "vendor" / "echarts.min.js").read_bytes()
    assert hashlib.sha256(code).hexdigest() in said
    assert b"</script" not in code


def test_a_million_steps_stay_small_and_keep_every_spike() -> None:
    rng = np.random.default_rng(0)
    values = 2 + rng.normal(0, 0.01, 1_000_000)
    values[[123_456, 777_777]] = 50.0, -50.0
    chosen = kept(Series(np.arange(1_000_000.0), values))
    assert len(chosen) <= POINTS
    assert {50.0, -50.0} <= set(values[chosen])
    assert (chosen[0], chosen[-1]) == (0, 999_999)
    assert bool(np.all(np.diff(chosen) > 0))
    smoothed = smooth(Series(np.arange(1_000_000.0), values))
    assert smoothed is not None
    quiet = np.abs(np.arange(1_000_000) - 123_456) > 20_000
    quiet &= np.abs(np.arange(1_000_000) - 777_777) > 20_000
    assert np.abs(smoothed.values[quiet][1000:] - 2).max() < 0.01


def test_smoothing_does_not_lag_behind_a_straight_line() -> None:
    line = Series(np.arange(1000.0), np.arange(1000.0) * 3)
    smoothed = smooth(line)
    assert smoothed is not None
    assert smoothed.values[100:900] == pytest.approx(line.values[100:900])


def test_numbers_beside_titles_are_short() -> None:
    assert [short(x) for x in (0, 5e-4, 3e-5, 250, 12000, 1.5e6)] == [
        "0", "0.0005", "3e-05", "250", "12k", "1.5M",
    ]  # fmt: skip
