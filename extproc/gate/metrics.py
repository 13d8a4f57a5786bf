"""Prometheus metrics of the gate. No tenant ids as labels: their number has no bound."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

__all__ = ["CHANNEL_ALIVE", "CHECKS", "GUARD", "LIMITER_UP", "SECONDS"]

CHECKS = Counter(
    "ibex_gate_checks",
    "Requests that were checked, by what was said (`allowed` or the error code); `cached`: allowed by a cached token",
    ["code", "cached"],
)
SECONDS = Histogram(
    "ibex_gate_seconds",
    "From a check's arrival to its answer",
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
)
GUARD = Counter(
    "ibex_gate_guarded",
    "Questions that the auth service was spared: `wrong` a moment ago, `busy` with wrong tokens, `agents` that a token "
    "may not use",
    ["reason"],
)
CHANNEL_ALIVE = Gauge(
    "ibex_gate_revocation_channel_alive", "1 while revocations are heard; while 0, every request asks the auth service"
)
LIMITER_UP = Gauge("ibex_gate_limiter_up", "1 while requests are counted")
