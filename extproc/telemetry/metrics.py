"""Prometheus metrics of the filter. No tenant ids as labels: their number has no bound."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

__all__ = ["ENGINE_SECONDS", "FILTER_SECONDS", "INJECTED_TOKENS", "REQUESTS"]

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.035, 0.045, 0.06, 0.1, 0.25)
"""Dense around the clocks of a request: wall 35, engine 40, filter 45, Envoy 100 ms."""

REQUESTS = Counter("ibex_extproc_requests", "Requests that passed the filter, by what became of them", ["outcome"])
FILTER_SECONDS = Histogram(
    "ibex_extproc_filter_seconds",
    "From the arrival of the message that decided a request, most often its body, to the reply",
    buckets=_SECONDS,
)
ENGINE_SECONDS = Histogram("ibex_extproc_engine_seconds", "The engine's share of it", buckets=_SECONDS)
INJECTED_TOKENS = Histogram(
    "ibex_extproc_injected_tokens", "Tokens put into a request", buckets=(16, 64, 128, 256, 512, 1024, 2048, 4096)
)
