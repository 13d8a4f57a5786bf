"""The result as Markdown and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from bench.children import ENVOY_THREADS
from bench.observer.parts import envoy_version
from bench.observer.plan import QUICK, Plan
from bench.observer.slices import EnvoySlice, MemorySample, ReaderSlice
from bench.observer.summary import OFF, Aim, Difference, MemoryGrowth, ReaderRow, Spread

__all__ = ["Report", "conditions"]

_PACKAGES = ("ibex-extproc", "grpcio", "protobuf", "uvloop", "msgspec", "xds-protos", "psutil")
_MEGABYTE = 1024 * 1024

_READERS = (
    "*bare*: a grpc.aio loop that only reads, bytes in. *observer*: `StreamObserver`, its turns thrown away. "
    "*extproc-observer*: the command, with outbox and SQLite, without broker and ClickHouse. CPU in µs per chunk of an "
    "answer, whole process; median of the rounds, least and most in brackets. *Ratio* is to *bare* in the same round. "
    "*Busy* is the share of one CPU. *Load* is what the sending process spent."
)
_GATEWAYS = (
    "*off*: envoy.yaml without the observer; *off again* is the same process measured once more, so what it differs by "
    "is noise. *bare* and *observer*: with a loop that only reads, and with `extproc observer`, as the observer."
)


def conditions(plan: Plan) -> dict[str, Any]:
    """What has to be known to read the numbers."""
    return {
        "command": f"python -m bench.observer{' --quick' * (plan is QUICK)}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "envoy": envoy_version(),
        "envoy_worker_threads": ENVOY_THREADS,
        "packages": {name: version(name) for name in _PACKAGES},
        "rounds": plan.rounds,
        "slice_s": plan.slice_s,
        "envoy_rounds": plan.envoy_rounds,
        "envoy_slices_s": dict(plan.clients),
    }


@dataclass(frozen=True, slots=True)
class Report:
    conditions: dict[str, Any]
    message_bytes: Mapping[str, int]
    """Of one message with a chunk in it, by cell."""
    readers: list[ReaderRow]
    memory: MemoryGrowth | None
    memory_samples: list[MemorySample]
    memory_seconds: float
    counted: Mapping[str, int]
    """What the observer whose memory was watched counted."""
    differences: list[Difference]
    aims: list[Aim]
    reader_slices: list[ReaderSlice]
    envoy_slices: list[EnvoySlice]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        parts = ["# Observer cost\n", self._preface()]
        if self.readers:
            parts += ["## CPU per chunk\n", _READERS + "\n", self._reader_table(), self._message_sizes()]
        if self.memory is not None:
            parts += ["## Memory\n", self._memory()]
        if self.differences:
            parts += ["## Through Envoy\n", _GATEWAYS + "\n", _difference_table(self.differences), self._behind_envoy()]
        parts += ["## Aims\n", _aim_table(self.aims)]
        return "\n".join(parts)

    def _preface(self) -> str:
        known = self.conditions
        packages = ", ".join(f"{name} {number}" for name, number in known["packages"].items())
        return (
            f"`{known['command']}`, {known['date']}, {known['cpus']} CPUs ({known['machine']}), load average before "
            f"{known['load_average_before']}. Envoy {known['envoy']} with {known['envoy_worker_threads']} worker "
            f"threads, Python {known['python']}, {packages}. {known['rounds']} rounds of interleaved slices of "
            f"{known['slice_s']} s; through Envoy {known['envoy_rounds']} rounds.\n"
        )

    def _reader_table(self) -> str:
        heads = ["cell", "server", "CPU/chunk", "ratio", "chunks/s", "busy", "load", "chunks", "streams", "broken"]
        return _table(heads, [_reader_cells(row) for row in self.readers])

    def _message_sizes(self) -> str:
        sizes = "; ".join(f"{cell}: {size}" for cell, size in self.message_bytes.items())
        return f"Bytes of one message, as Envoy sent it: {sizes}.\n"

    def _memory(self) -> str:
        assert self.memory is not None
        lines = [[f"{each.streams:,}", f"{each.rss_bytes / _MEGABYTE:.1f}"] for each in self.memory.samples]
        counted = ", ".join(f"{name} {number:,}" for name, number in self.counted.items())
        state = "flat" if self.memory.is_flat else "**not flat**"
        said = (
            f"One `extproc observer`, short streams, 200 at a time, {self.memory_seconds:.0f} s: {state}. It counted: "
            f"{counted}.\n"
        )
        return said + "\n" + _table(["streams", "resident, MB"], lines)

    def _behind_envoy(self) -> str:
        """CPU of what observes, a chunk."""
        groups: dict[tuple[int, str], list[float]] = {}
        for each in self.envoy_slices:
            if each.observer_cpu_us is not None:
                groups.setdefault((each.clients, each.set_up), []).append(each.observer_cpu_us)
        lines = [[str(clients), name, _spread(Spread.of(values), 1)] for (clients, name), values in groups.items()]
        said = "What observes, whole streams of 50 chunks, opening and end included:\n"
        return said + "\n" + _table(["clients", "process", "CPU/chunk, µs"], lines)


def _reader_cells(row: ReaderRow) -> list[str]:
    return [
        row.cell,
        row.server,
        _spread(row.cpu_us, 1),
        _spread(row.ratio, 2) if row.ratio is not None else "–",
        f"{row.chunks_per_second:.0f}",
        f"{row.busy:.0%}",
        f"{row.load_cpu_us:.0f}",
        f"{row.chunks:,}",
        f"{row.streams:,}" if row.streams else "–",
        str(row.broken),
    ]


def _difference_table(found: Iterable[Difference]) -> str:
    lines = [
        [
            str(each.clients),
            each.quantity,
            each.set_up,
            _spread(each.value, 2),
            _spread(each.added, 2, sign="+") if each.set_up != OFF else "–",
        ]
        for each in found
    ]
    return _table(["clients", "", "set-up", "measured", "minus *off*"], lines)


def _aim_table(aims: list[Aim]) -> str:
    marks = {True: "✓ met", False: "✗ missed", None: "–"}
    return _table(["aim", "measured", ""], [[aim.text, aim.value, marks[aim.is_met]] for aim in aims])


def _spread(value: Spread, digits: int, sign: str = "") -> str:
    shape = f"{sign}.{digits}f"
    return f"{value.middle:{shape}} ({value.least:{shape}} to {value.most:{shape}})"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines]) + "\n"
