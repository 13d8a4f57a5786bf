"""What is measured, how long, and how often."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "SKIPPED", "Cell", "Plan"]


@dataclass(frozen=True, slots=True)
class Cell:
    body: str
    """A name of `payload.BODY_SIZES`."""
    connections: int
    """Closed loop: as many requests at a time."""
    max_requests: int = 20_000
    """In one slice; what ends a slice early, should a machine be very fast."""


_CELLS = (
    Cell("2 KB", 1),
    Cell("2 KB", 16),
    Cell("2 KB", 64),
    Cell("220 KB", 1),
    Cell("220 KB", 16),
    Cell("220 KB", 64),
    Cell("5 MB", 1, 500),
    Cell("5 MB", 16, 500),
)
SKIPPED = (
    "5 MB × 64 is left out: 320 MB of requests at once, several times the 64 MiB of the HTTP/2 connection window that "
    "each Envoy worker has towards the processor, so requests would wait for the window and not for the processor."
)


@dataclass(frozen=True, slots=True)
class Plan:
    cells: tuple[Cell, ...]
    rounds: int
    slice_s: float
    open_loop_rounds: int
    open_loop_s: float
    """Of one open-loop slice, at half of the saturation rate."""
    open_loop_connections: int = 64
    limit_s: float = 900.0
    """The whole run is ended after this, results or not."""


FULL = Plan(_CELLS, rounds=7, slice_s=1.5, open_loop_rounds=3, open_loop_s=6.0)
QUICK = Plan(
    (_CELLS[0], _CELLS[1], _CELLS[2], _CELLS[3], _CELLS[4], _CELLS[6]),
    rounds=2,
    slice_s=0.6,
    open_loop_rounds=1,
    open_loop_s=3.0,
    limit_s=180.0,
)
