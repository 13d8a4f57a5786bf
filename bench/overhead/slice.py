"""What one slice showed. Types only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Slice"]


@dataclass(frozen=True, slots=True)
class Slice:
    """One set-up, one body, one number of connections. CPU in microseconds per request, memory in bytes."""

    set_up: str
    body: str
    connections: int
    round: int
    rate: float | None
    """Requests per second that were asked for; None: closed loop."""
    requests: int
    """That were answered with 200."""
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]
    """By role."""
    rss_bytes: dict[str, int]
    """By role, at the end."""
    fallbacks: int
    injected: int
    """Answers that say one memory or more."""
    failures: int
    """Other answers, and connections that broke."""
    lost: int
    """Requests without an answer."""

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds
