"""Slices to numbers: medians over the rounds, comparisons within each round, and the aims. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.observer.slices import EnvoySlice, MemorySample, ReaderSlice

__all__ = [
    "Aim",
    "Difference",
    "MemoryGrowth",
    "ReaderRow",
    "Spread",
    "aims",
    "differences",
    "growth",
    "quantile",
    "reader_rows",
]

CPU_RATIO_LIMIT = 1.2
"""Of a loop that only reads."""
GROWTH_LIMIT = 0.05
"""Of resident memory between a tenth of the streams, when caches and pools are full, and the last; less is flat."""

BARE = "bare"
OFF, OFF_AGAIN, ON = "off", "off again", "observer"
"""Set-ups of Envoy. The first two are one and the same: what they differ by is noise."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one number over the rounds."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for none."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class ReaderRow:
    """One server in one cell."""

    cell: str
    server: str
    cpu_us: Spread
    load_cpu_us: float
    chunks_per_second: float
    busy: float
    chunks: int
    """In all slices."""
    streams: int
    broken: int
    ratio: Spread | None
    """To the bare loop in the same round; None: it is the bare loop, or that was not measured."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One quantity of one set-up, minus that of `off` in the same round."""

    clients: int
    set_up: str
    quantity: str
    value: Spread
    """The quantity itself."""
    added: Spread


@dataclass(frozen=True, slots=True)
class MemoryGrowth:
    samples: tuple[MemorySample, ...]
    """At the beginning, at a tenth, at the half, at the end."""
    is_flat: bool


@dataclass(frozen=True, slots=True)
class Aim:
    text: str
    value: str
    is_met: bool | None
    """None: it was not measured."""


_QUANTITIES: tuple[tuple[str, Callable[[EnvoySlice], float]], ...] = (
    ("first byte p50, ms", lambda one: one.first_p50_ms),
    ("first byte p99, ms", lambda one: one.first_p99_ms),
    ("gap p50, ms", lambda one: one.gap_p50_ms),
    ("gap p99, ms", lambda one: one.gap_p99_ms),
    ("Envoy CPU, µs/chunk", lambda one: one.envoy_cpu_us),
)
_SEEN_BY_CLIENTS = tuple(name for name, _ in _QUANTITIES[:4])


def quantile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; NaN of nothing."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def reader_rows(slices: Iterable[ReaderSlice]) -> list[ReaderRow]:
    """In the order in which cells and servers were first measured."""
    groups: dict[str, dict[str, dict[int, ReaderSlice]]] = {}
    for each in slices:
        groups.setdefault(each.cell, {}).setdefault(each.server, {})[each.round] = each
    return [
        _reader_row(list(rounds.values()), servers.get(BARE, {}) if server != BARE else {})
        for servers in groups.values()
        for server, rounds in servers.items()
    ]


def _reader_row(group: list[ReaderSlice], bare: dict[int, ReaderSlice]) -> ReaderRow:
    ratios = [each.cpu_us / bare[each.round].cpu_us for each in group if each.round in bare]
    return ReaderRow(
        cell=group[0].cell,
        server=group[0].server,
        cpu_us=Spread.of([each.cpu_us for each in group]),
        load_cpu_us=median(each.load_cpu_us for each in group),
        chunks_per_second=median(each.chunks_per_second for each in group),
        busy=median(each.busy for each in group),
        chunks=sum(each.chunks for each in group),
        streams=sum(each.streams for each in group),
        broken=sum(each.broken for each in group),
        ratio=Spread.of(ratios) if ratios else None,
    )


def differences(slices: Iterable[EnvoySlice]) -> list[Difference]:
    """Every quantity of every set-up, by number of clients."""
    groups: dict[int, dict[str, dict[int, EnvoySlice]]] = {}
    for each in slices:
        groups.setdefault(each.clients, {}).setdefault(each.set_up, {})[each.round] = each
    found = []
    for clients, set_ups in groups.items():
        for name, quantity in _QUANTITIES:
            off = {number: quantity(each) for number, each in set_ups.get(OFF, {}).items()}
            for set_up, rounds in set_ups.items():
                values = {number: quantity(each) for number, each in rounds.items() if number in off}
                if values:
                    added = [value - off[number] for number, value in values.items()]
                    spread = Spread.of(list(values.values()))
                    found.append(Difference(clients, set_up, name, spread, Spread.of(added)))
    return found


def growth(samples: Sequence[MemorySample], streams: int) -> MemoryGrowth:
    """`streams`: how many there were to be."""
    marks = tuple(next((each for each in samples if each.streams >= mark), samples[-1]) for mark in _marks(streams))
    most_later = max(each.rss_bytes for each in samples if each.streams >= marks[1].streams)
    return MemoryGrowth(marks, most_later <= marks[1].rss_bytes * (1 + GROWTH_LIMIT))


def _marks(streams: int) -> tuple[int, ...]:
    return (0, streams // 10, streams // 2, streams)


def aims(
    rows: Iterable[ReaderRow],
    memory: MemoryGrowth | None,
    differences_: Sequence[Difference],
    slices: Sequence[EnvoySlice],
    expected_digest: str,
) -> list[Aim]:
    text = f"observer CPU a chunk ≤ {CPU_RATIO_LIMIT:g} × a loop that only reads"
    found = [
        Aim(f"{text}: {row.server}, {row.cell}", f"{row.ratio.middle:.2f}", row.ratio.middle <= CPU_RATIO_LIMIT)
        for row in rows
        if row.ratio is not None
    ] or [Aim(text, "not measured", None)]
    found.append(_memory_aim(memory))
    found += _noise_aims(differences_)
    found.append(_bytes_aim(slices, expected_digest))
    return found


def _memory_aim(memory: MemoryGrowth | None) -> Aim:
    text = f"memory grows by less than {GROWTH_LIMIT:.0%} from a tenth of the streams to the last"
    if memory is None:
        return Aim(text, "not measured", None)
    early, late = memory.samples[1].rss_bytes, memory.samples[-1].rss_bytes
    return Aim(text, f"{late / early - 1:+.1%}", memory.is_flat)


def _noise_aims(differences_: Sequence[Difference]) -> list[Aim]:
    """What the observer adds is noise when the same Envoy, measured twice, differs from itself as much."""
    found = []
    by_name = {(each.clients, each.quantity, each.set_up): each.added for each in differences_}
    for (clients, quantity, set_up), added in by_name.items():
        noise = by_name.get((clients, quantity, OFF_AGAIN))
        if set_up == ON and quantity in _SEEN_BY_CLIENTS and noise is not None:
            bound = max(abs(noise.least), abs(noise.most))
            value = f"{added.middle:+.3f}, noise ±{bound:.3f}"
            found.append(Aim(f"{quantity}, {clients} at a time: differs by noise", value, added.middle <= bound))
    return found or [Aim("what clients see differs by noise", "not measured", None)]


def _bytes_aim(slices: Sequence[EnvoySlice], expected_digest: str) -> Aim:
    text = "every body through Envoy is the provider's, byte for byte"
    if not slices:
        return Aim(text, "not measured", None)
    streams, failures = sum(each.streams for each in slices), sum(each.failures for each in slices)
    is_same = {digest for each in slices for digest in each.digests} == {expected_digest}
    return Aim(text, f"{streams} bodies, {failures} failed", is_same and not failures)
