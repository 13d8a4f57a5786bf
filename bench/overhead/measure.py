"""Slices: one set-up, one body, one concurrency, about a second; and what each process spent on it.

CPU time comes from the kernel's clock of the process, in nanoseconds: the ticks of `/proc` (10 ms) would be too coarse
for a short slice. Where there is no such clock, `psutil` gives the ticks.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict
from types import TracebackType
from typing import Self

import psutil

from bench.overhead.load import GRACE_S, Order, Result
from bench.overhead.setups import SetUp
from bench.overhead.slice import Slice

__all__ = ["LoadError", "LoadGenerator", "measure"]

SETTLE_S = 0.6
"""Between the last answer and the second look at the CPU clocks: the filter exports spans every 500 ms, and that work
belongs to the slice that caused it, not to the next set-up's."""

_ANSWER_LIMIT_BYTES = 32 * 1024 * 1024


class LoadError(Exception):
    """The load generator did not answer in time, or ended."""


class LoadGenerator:
    """The generator's process. Use it as an asynchronous context."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bench.overhead.load",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_ANSWER_LIMIT_BYTES,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def prepare(self, order: Order) -> None:
        self._write(json.dumps(asdict(order)))
        if (answer := await self._read(30.0)).strip() != b"ready":
            raise LoadError(f"the load generator said {answer[:80]!r}")

    async def run(self, order: Order) -> Result:
        """The slice that was prepared."""
        self._write("go")
        return Result(**json.loads(await self._read(order.seconds + GRACE_S + 10.0)))

    def _write(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None, "used outside its context"  # noqa: PT018
        self._process.stdin.write(line.encode() + b"\n")

    async def _read(self, limit_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None, "used outside its context"  # noqa: PT018
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), limit_s)
        except TimeoutError:
            raise LoadError(f"the load generator did not answer within {limit_s:.0f} s") from None
        if not line:
            raise LoadError("the load generator ended")
        return line


async def measure(load: LoadGenerator, set_up: SetUp, order: Order, round_number: int) -> Slice:
    """One slice: connections made and warmed, clocks read, load, settled, clocks read again."""
    await load.prepare(order)
    await asyncio.sleep(0.05)
    before = _cpu_of(set_up)
    result = await load.run(order)
    await asyncio.sleep(SETTLE_S)
    spent = {role: after - before[role] for role, after in _cpu_of(set_up).items()}
    times = sorted(result.latencies_us)
    count = max(1, len(times))
    return Slice(
        set_up=set_up.key,
        body=order.body,
        connections=order.connections,
        round=round_number,
        rate=order.rate,
        requests=len(times),
        seconds=result.seconds,
        p50_ms=_quantile(times, 0.50) / 1e3,
        p99_ms=_quantile(times, 0.99) / 1e3,
        cpu_us={role: seconds * 1e6 / count for role, seconds in spent.items()},
        rss_bytes={role: psutil.Process(pid).memory_info().rss for role, pid in set_up.pids.items()},
        fallbacks=result.fallbacks,
        injected=result.injected,
        failures=result.failures,
        lost=result.lost,
    )


def _quantile(ordered: list[int], share: float) -> float:
    """Nearest rank; NaN of nothing."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def _cpu_of(set_up: SetUp) -> dict[str, float]:
    return {role: _cpu_seconds(pid) for role, pid in set_up.pids.items()}


def _cpu_seconds(pid: int) -> float:
    """User and system time of all its threads so far."""
    try:
        # clock_getcpuclockid(3) of Linux, which Python has not: the pid's complement above, CPUCLOCK_SCHED below.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
