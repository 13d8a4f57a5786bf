"""What the auth service counts, for Prometheus. Organisations, agents and tokens are never labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from extproc.auth.token import Refusal

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["AuthMetrics"]

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.5, 1.0)
"""Dense up to the gate's limit of 50 ms."""


class AuthMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "ibex_auth_requests",
            "Calls answered, by gRPC method and status code",
            ["method", "code"],
            registry=registry,
        )
        self.seconds = Histogram(
            "ibex_auth_seconds", "Duration of calls", ["method"], buckets=_BUCKETS_S, registry=registry
        )
        refusals = Counter("ibex_auth_refusals", "Tokens refused, by reason", ["reason"], registry=registry)
        self.refusals = {refusal: refusals.labels(refusal) for refusal in Refusal}
