"""What the outbox and its delivery count, for Prometheus. Organisations, agents and users are never labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from extproc.turns._tables import Consumer

__all__ = ["OutboxMetrics", "Part", "Why"]

_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)
"""A commit is one write to the disk: from a fast local disk to one that hangs."""


class Part(StrEnum):
    """What of a turn was lost."""

    TRACE = "trace"
    TEXT = "text"
    TURN = "turn"


class Why(StrEnum):
    CAP = "cap"
    """The file has reached `IBEX_OUTBOX_MAX_BYTES`."""
    DISK = "disk"
    """The disk takes nothing, and what waits in memory has reached its bound."""
    BEHIND = "behind"
    """The disk is well but slower than what comes, and what waits in memory has reached its bound."""
    CLOSED = "closed"
    """It came too late, or the disk took nothing at the end."""
    BUG = "bug"
    """It could not be encoded."""


LOSSES = {
    Part.TRACE: (Why.CAP, Why.DISK),
    Part.TEXT: (Why.CAP, Why.DISK, Why.BEHIND),
    Part.TURN: tuple(Why),
}
"""All that can occur. They are there from the start: an alert on a rise needs a zero before it."""


class OutboxMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.committed = Counter("ibex_outbox_committed_turns", "Turns that are safe on the disk", registry=registry)
        self.commit_seconds = Histogram(
            "ibex_outbox_commit_seconds", "Duration of a group's commit", buckets=_BUCKETS_S, registry=registry
        )
        self.dropped = Counter(
            "ibex_outbox_dropped", "What was lost, by part of a turn and reason", ["what", "why"], registry=registry
        )
        for part, whys in LOSSES.items():
            for why in whys:
                self.dropped.labels(part, why)
        self.duplicates = Counter(
            "ibex_outbox_duplicate_turns",
            "Turns not stored because another exchange of the org has the same X-Request-ID",
            registry=registry,
        )
        self.corrupt_files = Counter(
            "ibex_outbox_corrupt_files",
            "Files begun anew, since the old ones could not be read or were removed",
            registry=registry,
        )
        delivered = Counter(
            "ibex_outbox_delivered", "Entries that their consumer has taken", ["consumer"], registry=registry
        )
        failures = Counter(
            "ibex_outbox_failures", "Attempts of a delivery that failed", ["consumer"], registry=registry
        )
        set_aside = Counter(
            "ibex_outbox_set_aside", "Entries that were refused and set aside", ["consumer"], registry=registry
        )
        self.delivered = {consumer: delivered.labels(consumer) for consumer in Consumer}
        self.failures = {consumer: failures.labels(consumer) for consumer in Consumer}
        self.set_aside = {consumer: set_aside.labels(consumer) for consumer in Consumer}
        self._depth = Gauge(
            "ibex_outbox_depth", "Entries that wait for their delivery", ["consumer"], registry=registry
        )
        self._oldest = Gauge(
            "ibex_outbox_oldest_seconds", "How long the oldest of them has waited", ["consumer"], registry=registry
        )
        self._bytes = Gauge("ibex_outbox_bytes", "Size of what waits in the own file", registry=registry)
        self._memory = Gauge("ibex_outbox_memory_bytes", "Size of what is not on the disk yet", registry=registry)

    def show(
        self,
        depth: Mapping[Consumer, Callable[[], float]],
        oldest_s: Mapping[Consumer, Callable[[], float]],
        file_bytes: Callable[[], float],
        memory_bytes: Callable[[], float],
    ) -> None:
        """Read from these when asked. They are called on the event loop and must not wait."""
        for consumer in Consumer:
            self._depth.labels(consumer).set_function(depth[consumer])
            self._oldest.labels(consumer).set_function(oldest_s[consumer])
        self._bytes.set_function(file_bytes)
        self._memory.set_function(memory_bytes)
