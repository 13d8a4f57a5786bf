"""What is measured, how long, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from bench.observer.transcript import Answer

__all__ = ["FULL", "QUICK", "Cell", "Plan"]

_OPENAI = Answer("openai", 1, 50, 20)
_ANTHROPIC = Answer("anthropic", 1, 50, 20)
_FOUR_EVENTS = Answer("openai", 4, 50, 20)


@dataclass(frozen=True, slots=True)
class Cell:
    name: str
    recorded: Answer
    """The answer whose chunks are sent."""
    interval_ms: float | None
    """Between two chunks of one stream; None: as fast as they are read."""
    chunks_per_stream: int | None = None
    """Streams end after as many and others begin, all of it counted. None: streams begin before the clock starts and
    end when it has stopped, so that chunks alone are counted."""
    streams: int = 200
    """At a time."""


_CELLS = (
    Cell("OpenAI, 1 event, paced", _OPENAI, 30.0),
    Cell("OpenAI, 1 event, saturated", _OPENAI, None),
    Cell("OpenAI, 1 event, few streams", _OPENAI, 30.0, streams=20),
    Cell("OpenAI, 4 events, paced", _FOUR_EVENTS, 30.0),
    Cell("Anthropic, 1 event, paced", _ANTHROPIC, 30.0),
    Cell("OpenAI, whole streams of 100 chunks", _OPENAI, 30.0, 100),
)


@dataclass(frozen=True, slots=True)
class Plan:
    cells: tuple[Cell, ...]
    rounds: int
    slice_s: float
    warm_up_s: float
    memory_streams: int
    """How many short streams go through one process while its memory is watched."""
    memory_limit_s: float
    watched: Answer
    """What clients receive through Envoy."""
    clients: tuple[tuple[int, float], ...]
    """Streams at a time through Envoy, and seconds of a slice."""
    envoy_rounds: int
    limit_s: float
    """The whole run is ended after this, results or not."""


_WATCHED = Answer("openai", 1, 50, 10)

FULL = Plan(
    _CELLS,
    rounds=4,
    slice_s=1.8,
    warm_up_s=0.5,
    memory_streams=50_000,
    memory_limit_s=180.0,
    watched=_WATCHED,
    clients=((1, 4.0), (50, 2.0)),
    envoy_rounds=4,
    limit_s=600.0,
)
QUICK = Plan(
    (_CELLS[0], _CELLS[5]),
    rounds=2,
    slice_s=0.8,
    warm_up_s=0.3,
    memory_streams=1_500,
    memory_limit_s=30.0,
    watched=_WATCHED,
    clients=((1, 1.0), (50, 0.6)),
    envoy_rounds=1,
    limit_s=120.0,
)
