"""Slices: one set-up, one body, one concurrency, about a second; and what each process spent on it.

CPU time comes from the kernel's clock of the process, in nanoseconds: the ticks of `/proc` (10 ms) would be too coarse
for a short slice. Where there is no such clock, `psutil` gives the ticks.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict

import psutil

from bench.load_process import LoadProcess
from bench.overhead.load import GRACE_S, Order, Result
from bench.overhead.setups import SetUp
from bench.overhead.slice import Slice

__all__ = ["load_generator", "measure"]

SETTLE_S = 0.6
"""Between the last answer and the second look at the CPU clocks: the filter exports spans every 500 ms, and that work
belongs to the slice that caused it, not to the next set-up's."""


def load_generator() -> LoadProcess:
    return LoadProcess("bench.overhead.load")


async def _prepare(load: LoadProcess, order: Order) -> None:
    load.tell(json.dumps(asdict(order)))
    await load.expect("ready", 30.0)


async def _run(load: LoadProcess, order: Order) -> Result:
    """The slice that was prepared."""
    load.tell("go")
    return Result(**json.loads(await load.hear(order.seconds + GRACE_S + 10.0)))


async def measure(load: LoadProcess, set_up: SetUp, order: Order, round_number: int) -> Slice:
    """One slice: connections made and warmed, clocks read, load, settled, clocks read again."""
    await _prepare(load, order)
    await asyncio.sleep(0.05)
    before = _cpu_of(set_up)
    result = await _run(load, order)
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
