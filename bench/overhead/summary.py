"""Slices to numbers: medians over the rounds, comparisons within each round, and the aims. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from bench.overhead.slice import Slice

__all__ = ["Aim", "Comparison", "Row", "aims", "comparisons", "rows", "saturation"]

CPU_RATIO_LIMIT = 1.5
"""Of the bare processor's: what reading, identity, splice, span, metrics and log may cost beside the conversation."""
ADDED_P50_LIMIT_MS = 4.0
ADDED_P99_LIMIT_MS = 15.0


@dataclass(frozen=True, slots=True)
class Row:
    """One set-up in one cell: medians over the rounds, sums of counts."""

    body: str
    connections: int
    set_up: str
    p50_ms: float
    p99_ms: float
    requests_per_second: float
    cpu_us: dict[str, float]
    """Per request, by role."""
    rss_bytes: dict[str, int]
    """The most that was seen, by role."""
    requests: int
    fallbacks: int
    injected: int
    failures: int
    """With the requests that were lost."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two set-ups in one cell, compared within each round: the median, and the least and the most of the rounds."""

    name: str
    body: str
    connections: int
    middle: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Aim:
    text: str
    value: str
    is_met: bool | None
    """None: it was not measured."""


_COMPARED: tuple[tuple[str, str, str, Callable[[Slice, Slice], float]], ...] = (
    ("processor CPU, C / B", "C", "B", lambda c, b: _ratio(c.cpu_us["processor"], b.cpu_us["processor"])),
    ("processor + engine CPU, C / B", "C", "B", lambda c, b: _ratio(_both(c), _both(b))),
    ("Envoy CPU, B / A", "B", "A", lambda b, a: _ratio(b.cpu_us["envoy"], a.cpu_us["envoy"])),
    ("requests/s, C / B", "C", "B", lambda c, b: _ratio(c.requests_per_second, b.requests_per_second)),
    ("p50, C / B", "C", "B", lambda c, b: _ratio(c.p50_ms, b.p50_ms)),
    ("p50, B / A", "B", "A", lambda b, a: _ratio(b.p50_ms, a.p50_ms)),
    ("added p50 ms, B − A", "B", "A", lambda b, a: b.p50_ms - a.p50_ms),
    ("added p50 ms, C − A", "C", "A", lambda c, a: c.p50_ms - a.p50_ms),
    ("added p99 ms, C − A", "C", "A", lambda c, a: c.p99_ms - a.p99_ms),
)


def rows(slices: Iterable[Slice]) -> list[Row]:
    """In the order in which cells and set-ups were first measured; sorted by set-up within a cell."""
    groups: dict[tuple[str, int], dict[str, list[Slice]]] = {}
    for each in slices:
        groups.setdefault((each.body, each.connections), {}).setdefault(each.set_up, []).append(each)
    return [_row(cell[key]) for cell in groups.values() for key in sorted(cell)]


def _row(group: list[Slice]) -> Row:
    first = group[0]
    return Row(
        body=first.body,
        connections=first.connections,
        set_up=first.set_up,
        p50_ms=median(each.p50_ms for each in group),
        p99_ms=median(each.p99_ms for each in group),
        requests_per_second=median(each.requests_per_second for each in group),
        cpu_us={role: median(each.cpu_us[role] for each in group) for role in first.cpu_us},
        rss_bytes={role: max(each.rss_bytes[role] for each in group) for role in first.rss_bytes},
        requests=sum(each.requests for each in group),
        fallbacks=sum(each.fallbacks for each in group),
        injected=sum(each.injected for each in group),
        failures=sum(each.failures + each.lost for each in group),
    )


def comparisons(slices: Iterable[Slice]) -> list[Comparison]:
    """Every comparison that the measured set-ups allow, cell by cell."""
    cells: dict[tuple[str, int], dict[tuple[str, int], Slice]] = {}
    for each in slices:
        cells.setdefault((each.body, each.connections), {})[each.set_up, each.round] = each
    found = []
    for (body, connections), measured in cells.items():
        rounds = sorted({number for _, number in measured})
        for name, left, right, compare in _COMPARED:
            pairs = [(measured.get((left, number)), measured.get((right, number))) for number in rounds]
            values = [compare(one, other) for one, other in pairs if one and other]
            if values:
                found.append(Comparison(name, body, connections, median(values), min(values), max(values)))
    return found


def saturation(measured: Iterable[Row], set_up: str, body: str) -> float:
    """The most requests per second that one set-up answered without falling back; 0 when it was not measured."""
    return max(
        (
            row.requests_per_second * (1 - row.fallbacks / max(1, row.requests))
            for row in measured
            if row.set_up == set_up and row.body == body
        ),
        default=0.0,
    )


def aims(compared: Iterable[Comparison], open_loop: Iterable[Row], body: str) -> list[Aim]:
    """For one body, `compared` being of the closed loop and `open_loop` of half the saturation rate."""
    mine = [each for each in compared if each.body == body]
    alone = [each for each in mine if each.connections == 1]
    filter_text = "filter CPU ≤ {limit:g} × the bare processor's"
    both_text = "filter + engine CPU ≤ {limit:g} × the bare pair's"
    return [
        *_limits(mine, "processor CPU, C / B", CPU_RATIO_LIMIT, filter_text),
        *_limits(mine, "processor + engine CPU, C / B", CPU_RATIO_LIMIT, both_text),
        *_limits(alone, "added p50 ms, C − A", ADDED_P50_LIMIT_MS, "added p50 < {limit:g} ms"),
        *_limits(alone, "added p99 ms, C − A", ADDED_P99_LIMIT_MS, "added p99 < {limit:g} ms"),
        *(_no_fallback(row) for row in open_loop if row.set_up == "C"),
    ]


def _limits(compared: list[Comparison], name: str, limit: float, text: str) -> list[Aim]:
    found = [each for each in compared if each.name == name]
    return [
        Aim(f"{text.format(limit=limit)}, {each.body} × {each.connections}", f"{each.middle:.2f}", each.middle <= limit)
        for each in found
    ] or [Aim(text.format(limit=limit), "not measured", None)]


def _no_fallback(row: Row) -> Aim:
    missing = row.fallbacks + row.failures
    return Aim(
        "no fallback at half of the saturation rate", f"{missing} of {row.requests + row.failures}", missing == 0
    )


def _both(one: Slice) -> float:
    return one.cpu_us["processor"] + one.cpu_us["engine"]


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
