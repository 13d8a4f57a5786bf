"""The command: a server for each size, questions one after the other, the table."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
from ibex.context.v1 import context_pb2 as pb
from ibex.context.v1 import context_pb2_grpc

from bench.engine.corpus import questions
from bench.engine.pressure import cycle, flood, write_cost
from bench.engine.server import agent_of

SIZES = (1_000, 10_000, 100_000, 1_000_000)
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    options = _options()
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})
    sizes = [measure(size, options.questions, cpus[0]) for size in options.sizes]
    pressure = _pressure(cpus[0]) if options.pressure else {}
    result = {
        "conditions": {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "cpus": len(cpus),
            "load": os.getloadavg()[0],
            "command": " ".join(sys.argv[1:]),
        },
        "sizes": sizes,
        **pressure,
    }
    text = _markdown(sizes)
    for name, values in pressure.items():
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
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, help="memories in the namespace")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument(
        "--pressure", action="store_true", help="also a flood from one org, an LRU that is too small, and writes"
    )
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--table", type=Path, help="write the table to this file")
    return parser.parse_args()


def _pressure(cpu: int) -> dict[str, dict[str, float]]:
    found = {"a write into 10,000": write_cost()}
    with _server(cpu, ["10000"]) as port:
        found["a flood of 24 beside one"] = asyncio.run(flood(port, 10_000, 100, 24))
    with _server(cpu, ["--cache", str(200 << 20)]) as port:
        found["50 namespaces of 20,000, an LRU of ten"] = asyncio.run(cycle(port, 20_000, 50, 3))
    return found


@contextmanager
def _server(cpu: int, arguments: list[str]) -> Iterator[str]:
    command = [sys.executable, "-m", "bench.engine.server", "--cpu", str(cpu), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            while (line := server.stdout.readline().split())[0] != "port":
                pass
            yield line[1]
        finally:
            server.terminate()
            server.wait(30)


def measure(size: int, count: int, cpu: int) -> dict[str, float]:
    """One server on one CPU, this process on another; a question at a time, after a tenth of them unmeasured."""
    command = [sys.executable, "-m", "bench.engine.server", "--cpu", str(cpu), str(size)]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            _, _, resident, held = server.stdout.readline().split()
            port = server.stdout.readline().split()[1]
            loaded_s = time.monotonic() - began
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
                asked = questions(count + count // 10)
                took: list[float] = []
                injected, cpu_before = 0, 0.0
                for number, text in enumerate(asked):
                    if number == count // 10:
                        cpu_before = _cpu_s(server.pid)
                        took.clear()
                        injected = 0
                    request = pb.AssembleContextRequest(
                        org_id=agent_of(size).org_id,
                        agent_id=agent_of(size).agent_id,
                        session_id="bench",
                        model="m",
                        query=text,
                    )
                    start = time.perf_counter()
                    answer = stub.AssembleContext(request, timeout=10)
                    took.append((time.perf_counter() - start) * 1000)
                    injected += bool(answer.memories_included)
                cpu_s = _cpu_s(server.pid) - cpu_before
        finally:
            server.terminate()
            server.wait(30)
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "memories": size,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_ms": 1000 * cpu_s / count,
        "injected": injected / count,
        "resident_bytes": int(resident),
        "held_bytes": int(held),
        "loaded_s": loaded_s,
    }


def _cpu_s(pid: int) -> float:
    """User and system time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


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
