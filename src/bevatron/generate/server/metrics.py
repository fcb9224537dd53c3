"""Counters and histograms in Prometheus' text format. Touched by the event loop alone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts = bounds, [0] * (len(bounds) + 1)
        self.sum, self.count = 0.0, 0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self.count += 1

    def lines(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {self.count}"]


class Metrics:
    """What the server has seen; the engine's own numbers are added when asked."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.next_token = Histogram(NEXT_TOKEN_S)
        self.disconnects = 0
        self.duration = 1.0  # of an answered request, a moving average in seconds

    def answered(self, route: str, status: int) -> None:
        self.requests[route, status] += 1

    def took(self, seconds: float) -> None:
        self.duration += 0.1 * (seconds - self.duration)

    def text(self, *, running: int, waiting: int, cached: int, prompt: int, new: int) -> str:
        """The page that Prometheus scrapes."""
        out: list[str] = []

        def family(name: str, kind: str, about: str, lines: list[str]) -> None:
            out.append(f"# HELP bevatron_{name} {about}")
            out.append(f"# TYPE bevatron_{name} {kind}")
            out.extend(lines)

        def plain(name: str, kind: str, about: str, value: int) -> None:
            family(name, kind, about, [f"bevatron_{name} {value}"])

        counts = [
            f'bevatron_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        family("requests_total", "counter", "Answers, by route and HTTP status.", counts)
        about = "Clients that left before their answer was whole."
        plain("disconnects_total", "counter", about, self.disconnects)
        plain("requests_running", "gauge", "Sequences being generated.", running)
        plain("requests_waiting", "gauge", "Sequences in the queue.", waiting)
        plain("cached_tokens", "gauge", "Tokens that the KV cache holds.", cached)
        plain("prompt_tokens_total", "counter", "Prompt tokens computed.", prompt)
        plain("generated_tokens_total", "counter", "New tokens.", new)
        for name, histogram, about in (
            ("time_to_first_token_seconds", self.first_token, "From arrival to the first token."),
            ("time_per_output_token_seconds", self.next_token, "Between tokens of one answer."),
        ):
            family(name, "histogram", about, histogram.lines(f"bevatron_{name}"))
        return "\n".join(out) + "\n"
