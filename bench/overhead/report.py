"""The result as Markdown and as JSON."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from bench.children import ENVOY_THREADS
from bench.overhead.plan import QUICK, SKIPPED, Plan
from bench.overhead.setups import ROLES, TITLES
from bench.overhead.slice import Slice
from bench.overhead.summary import Aim, Comparison, Row
from extproc.stack import envoy

__all__ = ["Report", "conditions"]

_PACKAGES = ("ibex-extproc", "grpcio", "protobuf", "uvloop", "opentelemetry-sdk", "xds-protos", "msgspec", "psutil")
_MEGABYTE = 1024 * 1024


def conditions(plan: Plan, set_ups: str, bare_engine_ms: float) -> dict[str, Any]:
    """What has to be known to read the numbers."""
    return {
        "command": f"python -m bench.overhead{' --quick' * (plan is QUICK)} --set-ups {set_ups}"
        + (f" --bare-engine-ms {bare_engine_ms:g}" if bare_engine_ms else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "envoy": _envoy_version(),
        "envoy_worker_threads": ENVOY_THREADS,
        "packages": {name: version(name) for name in _PACKAGES},
        "rounds": plan.rounds,
        "slice_s": plan.slice_s,
    }


def _envoy_version() -> str:
    binary = envoy.find_envoy(os.environ.get("IBEX_ENVOY"), os.environ.get("ENVOY_VERSION", envoy.DEFAULT_VERSION))
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    found = re.search(r"/(\d+\.\d+\.\d+)/", said)
    return found[1] if found else "unknown"


@dataclass(frozen=True, slots=True)
class Report:
    conditions: dict[str, Any]
    rows: list[Row]
    comparisons: list[Comparison]
    open_rate: float
    """Requests per second of the open loop."""
    open_rows: list[Row]
    aims: list[Aim]
    spans_received: int | None
    slices: list[Slice]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("conditions", "open_rate", "spans_received")} | {
            name: [asdict(each) for each in getattr(self, name)]
            for name in ("rows", "comparisons", "open_rows", "aims", "slices")
        }

    def to_markdown(self) -> str:
        parts = [
            "# Overhead\n",
            self._preface(),
            "## Closed loop\n",
            _row_table(self.rows),
            SKIPPED + "\n",
            "## Compared within each round\n",
            "Median of the rounds, least and most in brackets.\n",
            _comparison_table(self.comparisons),
        ]
        if self.open_rows:
            title = f"## Open loop, 2 KB, {self.open_rate:.0f} requests/s: half of C's saturation rate\n"
            parts += [title, _row_table(self.open_rows)]
        parts += ["## Resident memory, most seen, MB\n", _memory_table(self.rows)]
        parts += ["## Aims\n", _aim_table(self.aims)]
        return "\n".join(parts)

    def _preface(self) -> str:
        known = self.conditions
        packages = ", ".join(f"{name} {number}" for name, number in known["packages"].items())
        set_ups = "; ".join(f"{key}: {title}" for key, title in TITLES.items())
        where = (
            f"`{known['command']}`, {known['date']}, {known['cpus']} CPUs ({known['machine']}), load average before "
            f"{known['load_average_before']}. Envoy {known['envoy']} with {known['envoy_worker_threads']} worker "
            f"threads, Python {known['python']}, {packages}. {known['rounds']} interleaved rounds, slices of "
            f"{known['slice_s']} s."
        )
        noise = (
            "Load generator, upstream and all set-ups share these CPUs with whatever else runs on the machine: times "
            "and rates are this machine's at this moment. What carries over is the comparison within a round."
        )
        reading = (
            f"{set_ups}. CPU in µs per request. *Fallbacks* are requests that went on without the processor's answer; "
            "where there are many, the processor's cost per request looks lower than it is."
        )
        lines = [where, noise, reading]
        if self.spans_received is not None:
            lines.append(f"The OTLP receiver of C counted {self.spans_received:,} spans.")
        return "\n\n".join(lines) + "\n"


def _row_table(rows: Iterable[Row]) -> str:
    heads = ["body × c", "set-up", "p50 ms", "p99 ms", "requests/s", *(f"{role} CPU" for role in ROLES)]
    heads += ["requests", "injected", "fallbacks", "failures"]
    return _table(heads, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    has_processor = "processor" in row.cpu_us
    return [
        f"{row.body} × {row.connections}",
        row.set_up,
        f"{row.p50_ms:.2f}",
        f"{row.p99_ms:.2f}",
        f"{row.requests_per_second:.0f}",
        *(f"{row.cpu_us[role]:.0f}" if role in row.cpu_us else "–" for role in ROLES),
        str(row.requests),
        f"{row.injected / max(1, row.requests):.0%}" if row.set_up == "C" else "–",
        str(row.fallbacks) if has_processor else "–",
        str(row.failures),
    ]


def _comparison_table(compared: list[Comparison]) -> str:
    cells = list(dict.fromkeys((each.body, each.connections) for each in compared))
    names = list(dict.fromkeys(each.name for each in compared))
    values = {
        (each.name, (each.body, each.connections)): f"{each.middle:.2f} ({each.least:.2f}–{each.most:.2f})"
        for each in compared
    }
    heads = ["", *(f"{body} × {connections}" for body, connections in cells)]
    return _table(heads, [[name, *(values.get((name, cell), "–") for cell in cells)] for name in names])


def _memory_table(rows: list[Row]) -> str:
    lines = []
    for key in sorted({row.set_up for row in rows}):
        seen = [row.rss_bytes for row in rows if row.set_up == key]
        most = {role: max(each[role] for each in seen) / _MEGABYTE for role in seen[0]}
        lines.append([f"{key}: {TITLES[key]}", *(f"{most[role]:.0f}" if role in most else "–" for role in ROLES)])
    return _table(["set-up", *ROLES], lines)


def _aim_table(aims: list[Aim]) -> str:
    marks = {True: "✓ met", False: "✗ missed", None: "–"}
    return _table(["aim", "measured", ""], [[aim.text, aim.value, marks[aim.is_met]] for aim in aims])


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *lines]) + "\n"
