"""What the charts of a page draw, by their titles."""

from __future__ import annotations

import json
import re
from html import unescape
from typing import Any

FIGURE = re.compile(
    r'<figure [^>]*data-chart="([^"]*)"[^>]*><figcaption><b>([^<]*)</b>.*?'
    r'<script type="application/json">(.*?)</script></figure>',
    re.S,
)


def drawn(page: str) -> dict[str, tuple[dict[str, Any], list[Any]]]:
    """Title -> how the chart is shown, and its data."""
    found = {
        unescape(title): (json.loads(unescape(shown)), json.loads(data))
        for shown, title, data in FIGURE.findall(page)
    }
    assert len(found) == page.count("data-chart=")
    return found
