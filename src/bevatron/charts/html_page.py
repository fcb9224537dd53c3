"""An HTML page in one file: style, plotting library and script are all inside of it.

A content security policy in its head forbids all loading, so no mistake can make it fetch a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

import bevatron

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HERE = Path(__file__).parent


def document(title: str, body: str) -> str:
    """The page around `body`, which is HTML; the plotting library is in it if there are charts."""
    scripts = ["vendor/echarts.min.js"] if "data-chart=" in body else []
    code = "".join(f"<script>{_file(name)}</script>" for name in [*scripts, "charts.js"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_file('page.css')}</style></head>\n"
        f"<body><main>{body}"
        f"<footer>Bevatron {escape(bevatron.__version__)}</footer></main>{code}</body></html>\n"
    )


def table(heads: list[str], rows: Iterable[str], numbers: int, only: bool = False) -> str:
    """`numbers`: the first column of numbers; of those after it too unless `only`."""
    shown = "".join(
        f'<th class="n">{h}</th>' if i == numbers or (i > numbers and not only) else f"<th>{h}</th>"
        for i, h in enumerate(heads)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{shown}</tr>{body}</table></div>'


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
