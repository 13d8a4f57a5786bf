"""Prometheus metrics of directives. No tenant ids as labels: their number has no bound."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

__all__ = ["CACHE_BYTES", "CHANNEL_ALIVE", "FLAWS", "LOOK_UPS", "SECONDS"]

LOOK_UPS = Counter(
    "ibex_extproc_directive_lookups",
    "Directives that requests asked for: `fresh` and `stale` from this process, `redis`, `service`, `miss`: the agent "
    "has none, `failed`: nobody could say",
    ["result"],
)
SECONDS = Histogram(
    "ibex_extproc_directive_seconds",
    "How long a request waited for a directive that was not at hand",
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.025, 0.05, 0.1),
)
FLAWS = Counter("ibex_extproc_directive_flaws", "Values that were no directive, by what was wrong", ["reason"])
CHANNEL_ALIVE = Gauge(
    "ibex_extproc_directive_channel_alive", "1 while changes are heard; while 0, a directive is fresh for 2 s only"
)
CACHE_BYTES = Gauge("ibex_extproc_directive_cache_bytes", "Memory of the directives that are kept")
