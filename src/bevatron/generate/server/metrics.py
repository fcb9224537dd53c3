"""The server's metrics for Prometheus. Only the event loop changes them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from bevatron.generate.request import Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics(Collector):
    """The server's own numbers; the engine's are added when asked."""

    def __init__(self) -> None:
        disable_created_metrics()  # a series beside each that says when it began
        self._registry = CollectorRegistry()  # its own: a process may have several servers
        self._stats = Stats()
        self._requests = Counter(
            "bevatron_requests",
            "Answers, by route and HTTP status.",
            ("route", "status"),
            registry=self._registry,
        )
        self.disconnects = Counter(
            "bevatron_disconnects",
            "Clients that left before their answer was whole.",
            registry=self._registry,
        )
        self._registry.register(self)
        self.first_token = Histogram(
            "bevatron_time_to_first_token_seconds",
            "From arrival to the first token.",
            buckets=FIRST_TOKEN_S,
            registry=self._registry,
        )
        self.next_token = Histogram(
            "bevatron_time_per_output_token_seconds",
            "Between tokens of one answer.",
            buckets=NEXT_TOKEN_S,
            registry=self._registry,
        )
        self.duration = 1.0  # of an answered request, a moving average in seconds

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, status).inc()

    def took(self, seconds: float) -> None:
        self.duration += 0.1 * (seconds - self.duration)

    def text(self, stats: Stats) -> bytes:
        """The page that Prometheus scrapes, of CONTENT_TYPE."""
        self._stats = stats
        return bytes(generate_latest(self._registry))

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers."""
        now = self._stats
        for name, about, value in (
            ("requests_running", "Sequences being generated.", now.running),
            ("requests_waiting", "Sequences in the queue.", now.waiting),
            ("cached_tokens", "Tokens that the KV cache holds.", now.cached_tokens),
        ):
            yield GaugeMetricFamily(f"bevatron_{name}", about, value)
        yield CounterMetricFamily(
            "bevatron_prompt_tokens", "Prompt tokens computed.", now.prompt_tokens
        )
        yield CounterMetricFamily("bevatron_generated_tokens", "New tokens.", now.new_tokens)
