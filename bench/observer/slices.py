"""What slices showed. Types only; CPU in microseconds, memory in bytes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EnvoySlice", "MemorySample", "ReaderSlice"]


@dataclass(frozen=True, slots=True)
class ReaderSlice:
    """One server that reads, one cell, one round."""

    cell: str
    server: str
    round: int
    chunks: int
    streams: int
    """Begun and ended within the slice, where streams are counted."""
    broken: int
    seconds: float
    cpu_us: float
    """Of the server's process, a chunk."""
    load_cpu_us: float
    """Of the load process, a chunk."""

    @property
    def chunks_per_second(self) -> float:
        return self.chunks / self.seconds

    @property
    def busy(self) -> float:
        """Share of one CPU."""
        return self.cpu_us * self.chunks_per_second / 1e6


@dataclass(frozen=True, slots=True)
class EnvoySlice:
    """One set-up of Envoy, one number of clients, one round. Times as clients saw them, in milliseconds."""

    set_up: str
    clients: int
    round: int
    streams: int
    failures: int
    first_p50_ms: float
    first_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    chunks: int
    envoy_cpu_us: float
    """A chunk that went through."""
    observer_cpu_us: float | None
    digests: tuple[str, ...]
    """SHA-256 of each different body that clients received."""


@dataclass(frozen=True, slots=True)
class MemorySample:
    streams: int
    """Ended so far."""
    rss_bytes: int
