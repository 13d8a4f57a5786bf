"""Slices: load from another process, and what each process spent on it by the kernel's clock.

That clock counts nanoseconds of all threads of a process; the ticks of `/proc` (10 ms) would be too coarse.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import psutil

from bench.load_process import LoadError, LoadProcess
from bench.observer import replay, viewer
from bench.observer.parts import Server
from bench.observer.plan import Cell, Plan
from bench.observer.slices import EnvoySlice, MemorySample, ReaderSlice
from bench.observer.summary import quantile
from bench.observer.transcript import Answer

__all__ = ["measure_envoy", "measure_reader", "watch_memory"]

_SETTLE_S = 0.4
"""Until the clocks are read again: what a slice left in sockets and queues belongs to it. The observer writes turns
to disk within it, and envoys close their observer streams later, which is a small share of a slice."""

_SHORT_STREAM_CHUNKS = 4
_STREAMS = 200


async def measure_reader(
    worker: LoadProcess, server: Server, cell: Cell, file: Path, seconds: float, number: int
) -> ReaderSlice:
    """Raises LoadError."""
    order = replay.Order(server.port, str(file), cell.streams, seconds, cell.interval_ms, cell.chunks_per_stream)
    limit_s = seconds + replay.GRACE_S + 20.0
    worker.tell(json.dumps(asdict(order)))
    await worker.expect("ready", limit_s)
    before = _cpu_seconds(server.pid), _cpu_seconds(worker.pid)
    worker.tell("go")
    result = replay.Result(**json.loads(await worker.hear(limit_s)))
    await asyncio.sleep(_SETTLE_S)
    after = _cpu_seconds(server.pid), _cpu_seconds(worker.pid)
    worker.tell("close")
    await worker.expect("closed", limit_s)
    count = max(1, result.chunks)
    return ReaderSlice(
        cell=cell.name,
        server=server.name,
        round=number,
        chunks=result.chunks,
        streams=result.streams,
        broken=result.broken,
        seconds=result.seconds,
        cpu_us=(after[0] - before[0]) * 1e6 / count,
        load_cpu_us=(after[1] - before[1]) * 1e6 / count,
    )


async def measure_envoy(
    worker: LoadProcess,
    gateway: Server,
    observer: Server | None,
    name: str,
    clients: tuple[int, float],
    answer: Answer,
    number: int,
) -> EnvoySlice:
    """Raises LoadError."""
    order = viewer.Order(gateway.port, answer.to_header(), *clients)
    limit_s = order.seconds + 2 * (answer.chunks * answer.pause_ms / 1e3 + viewer.GRACE_S) + 10.0
    worker.tell(json.dumps(asdict(order)))
    await worker.expect("ready", limit_s)
    await asyncio.sleep(_SETTLE_S)
    pids = [gateway.pid] + ([observer.pid] if observer is not None else [])
    before = [_cpu_seconds(pid) for pid in pids]
    worker.tell("go")
    result = viewer.Result(**json.loads(await worker.hear(limit_s)))
    await asyncio.sleep(_SETTLE_S)
    chunks = max(1, result.streams * answer.chunks)
    spent = [(_cpu_seconds(pid) - start) * 1e6 / chunks for pid, start in zip(pids, before, strict=True)]
    return EnvoySlice(
        set_up=name,
        clients=order.clients,
        round=number,
        streams=result.streams,
        failures=result.failures,
        first_p50_ms=_milliseconds(result.first_us, 0.50),
        first_p99_ms=_milliseconds(result.first_us, 0.99),
        gap_p50_ms=_milliseconds(result.gaps_us, 0.50),
        gap_p99_ms=_milliseconds(result.gaps_us, 0.99),
        chunks=chunks,
        envoy_cpu_us=spent[0],
        observer_cpu_us=spent[1] if observer is not None else None,
        digests=tuple(result.digests),
    )


async def watch_memory(
    worker: LoadProcess, server: Server, file: Path, plan: Plan
) -> tuple[list[MemorySample], replay.Result]:
    """Resident memory each second while short streams go through, 200 at a time. Raises LoadError."""
    order = replay.Order(
        server.port, str(file), _STREAMS, plan.memory_limit_s, None, _SHORT_STREAM_CHUNKS, plan.memory_streams
    )
    process = psutil.Process(server.pid)
    worker.tell(json.dumps(asdict(order)))
    await worker.expect("ready", 30.0)
    samples = [MemorySample(0, process.memory_info().rss)]
    worker.tell("go")
    deadline = time.monotonic() + plan.memory_limit_s
    while (line := await worker.hear(30.0)).startswith("done "):
        samples.append(MemorySample(int(line.removeprefix("done ")), process.memory_info().rss))
        if time.monotonic() > deadline:
            raise LoadError(f"{samples[-1].streams} streams took more than {plan.memory_limit_s:.0f} s")
    result = replay.Result(**json.loads(line))
    samples.append(MemorySample(result.streams, process.memory_info().rss))
    worker.tell("close")
    await worker.expect("closed", 30.0)
    return samples, result


def _milliseconds(times_us: Iterable[int], share: float) -> float:
    return quantile(sorted(times_us), share) / 1e3


def _cpu_seconds(pid: int) -> float:
    """User and system time of all its threads so far."""
    try:
        # clock_getcpuclockid(3) of Linux, which Python has not: the pid's complement above, CPUCLOCK_SCHED below.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
