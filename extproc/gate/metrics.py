"""Prometheus metrics of the gate. No tenant ids as labels: their number has no bound."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from extproc.gate.verdict import Code

__all__ = ["CHANNEL_ALIVE", "CHECKS", "GUARD", "LIMITER_UP", "CheckMetrics"]

_BOUNDS_MS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class CheckMetrics(Collector):
    """Plain numbers until somebody asks: each check is counted, and the library's own counting costs as much as
    finding the token."""

    def __init__(self) -> None:
        self._checks = {(code.value, False): 0 for code in Code} | {("allowed", cached): 0 for cached in (False, True)}
        self._within = [0] * (len(_BOUNDS_MS) + 1)
        self._sum_ms = 0.0

    def add(self, code: str, is_cached: bool, elapsed_ms: float) -> None:  # noqa: FBT001 - on every check's way
        """`code`: `allowed` or the error code. `is_cached`: allowed by a cached token."""
        self._checks[code, is_cached] += 1
        self._within[bisect_left(_BOUNDS_MS, elapsed_ms)] += 1
        self._sum_ms += elapsed_ms

    @override
    def collect(self) -> Iterator[Metric]:
        checks = CounterMetricFamily(
            "ibex_gate_checks",
            "Requests that were checked, by what was said (`allowed` or the error code); `cached`: allowed by a cached "
            "token",
            labels=("code", "cached"),
        )
        for (code, is_cached), number in self._checks.items():
            checks.add_metric((code, str(is_cached).lower()), number)
        yield checks
        bounds = (*(str(bound / 1e3) for bound in _BOUNDS_MS), "+Inf")
        buckets = list(zip(bounds, accumulate(self._within), strict=True))
        seconds = HistogramMetricFamily("ibex_gate_seconds", "From a check's arrival to its answer")
        seconds.add_metric((), buckets, self._sum_ms / 1e3)
        yield seconds


CHECKS = CheckMetrics()
REGISTRY.register(CHECKS)
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
