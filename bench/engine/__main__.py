"""The command: a server for each size, questions one after the other, the table."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import grpc
import numpy as np
from ibex.context.v1 import context_pb2_grpc

from bench.engine.cold import STORES, Cycle, cold
from bench.engine.corpus import questions
from bench.engine.pressure import asking, cycle, flood, write_cost
from bench.engine.process import serving
from bench.engine.server import agent_of
from extproc.settings import FilterSettings

SIZES = (1_000, 10_000, 100_000, 1_000_000)


def main() -> int:
    options = _options()
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})
    if options.cold:
        sizes, others = [], _cold(cpus[0], options)
    else:
        sizes = [measure(size, options.questions, cpus[0]) for size in options.sizes or SIZES]
        others = _pressure(cpus[0]) if options.pressure else {}
    result = {
        "conditions": {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "cpus": len(cpus),
            "load": os.getloadavg()[0],
            "command": " ".join(sys.argv[1:]),
        },
        "sizes": sizes,
        **others,
    }
    text = _markdown(sizes) if sizes else ""
    for name, values in others.items():
        text += f"\n\n| {name} | |\n|---|---|\n"
        text += "\n".join(f"| {key.replace('_', ' ')} | {value:.2f} |" for key, value in values.items())
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, help="memories in the namespace")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument(
        "--pressure", action="store_true", help="also a flood from one org, an LRU that is too small, and writes"
    )
    parser.add_argument(
        "--cold", action="store_true", help="only namespaces that are not loaded, 10,000 each: SQLite and PostgreSQL"
    )
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES), help="of --cold")
    parser.add_argument("--namespaces", type=int, default=4, help="of --cold, asked in turn")
    parser.add_argument("--room", type=float, default=1.5, help="namespaces that the cache of --cold holds")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--table", type=Path, help="write the table to this file")
    return parser.parse_args()


def _pressure(cpu: int) -> dict[str, dict[str, float]]:
    found = {"a write into 10,000": write_cost()}
    with serving(cpu, ["10000"]) as server:
        shipped = FilterSettings.model_fields["engine_most_open"].default
        for width, most_open in ((24, 24), (100, shipped), (100, 100)):
            name = f"a flood of {width} beside one, {most_open} of them let through"
            found[name] = flood(server.port, 10_000, 200, width, most_open)
    with serving(cpu, ["--cache", str(200 << 20)]) as server:
        found["50 namespaces of 20,000, an LRU of ten"] = asyncio.run(cycle(server.port, 20_000, 50, 3))
    return found


def _cold(cpu: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    return {
        f"cold, {store}, {size:,}": cold(
            partial(serving, cpu), store, Cycle(size, options.namespaces, options.room), options.questions
        )
        for size in options.sizes or [10_000]
        for store in options.stores
    }


def measure(size: int, count: int, cpu: int) -> dict[str, float]:
    """One server on one CPU, this process on another; a question at a time, after a tenth of them unmeasured."""
    began = time.monotonic()
    with serving(cpu, [str(size)]) as server:
        loaded_s = time.monotonic() - began
        ((resident, held),) = server.warmed
        took: list[float] = []
        injected, cpu_before = 0, 0.0
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
            for number, text in enumerate(questions(count + count // 10)):
                if number == count // 10:
                    cpu_before = server.cpu_s()
                    took.clear()
                    injected = 0
                start = time.perf_counter()
                answer = stub.AssembleContext(asking(agent_of(size), text), timeout=10)
                took.append((time.perf_counter() - start) * 1000)
                injected += bool(answer.memories_included)
            cpu_s = server.cpu_s() - cpu_before
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "memories": size,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_ms": 1000 * cpu_s / count,
        "injected": injected / count,
        "resident_bytes": resident,
        "held_bytes": held,
        "loaded_s": loaded_s,
    }


def _markdown(sizes: list[dict[str, float]]) -> str:
    lines = [
        "| memories | p50 ms | p99 ms | CPU ms a request | injected | MB resident a 100k | MB counted a 100k |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sizes:
        per = 100_000 / one["memories"] / 1e6
        lines.append(
            f"| {one['memories']:,} | {one['p50_ms']:.1f} | {one['p99_ms']:.1f} | {one['cpu_ms']:.1f} | "
            f"{one['injected']:.0%} | {one['resident_bytes'] * per:.0f} | {one['held_bytes'] * per:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
