"""The command: start everything, measure in rounds, print the tables, stop everything."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.children import PartsError
from bench.load_process import LoadError, LoadProcess
from bench.observer import recording, report, summary
from bench.observer.measure import measure_envoy, measure_reader, watch_memory
from bench.observer.parts import Parts, Server, counters
from bench.observer.plan import FULL, QUICK, Plan
from bench.observer.replay import Result
from bench.observer.slices import EnvoySlice, MemorySample, ReaderSlice
from bench.observer.transcript import Answer, chunks
from extproc.cli import GRPC_EXPERIMENTS

_T = TypeVar("_T")

_PIECES = ("cpu", "memory", "envoy")


@dataclass(slots=True)
class _Found:
    files: dict[Answer, Path] = field(default_factory=dict)
    message_bytes: dict[str, int] = field(default_factory=dict)
    readers: list[ReaderSlice] = field(default_factory=list)
    samples: list[MemorySample] = field(default_factory=list)
    memory: Result = field(default_factory=Result)
    counted: dict[str, int] = field(default_factory=dict)
    envoys: list[EnvoySlice] = field(default_factory=list)


def main() -> int:
    options = _options()
    plan = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    with tempfile.TemporaryDirectory(prefix="bench-observer-") as directory:
        parts = Parts(Path(directory))
        found = _Found()
        try:
            known = report.conditions(plan)
            asyncio.run(asyncio.wait_for(_measure_all(parts, plan, options.only, found), plan.limit_s))
        except (PartsError, LoadError, TimeoutError) as error:
            print(f"bench.observer: {str(error) or 'the run took too long'}", file=sys.stderr)
            return 1
        finally:
            parts.stop()
    result = _summarise(plan, known, found)
    text = result.to_markdown()
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.observer", description="What watching costs.")
    parser.add_argument("--quick", action="store_true", help="fewer cells, rounds and streams, in under 60 s")
    parser.add_argument("--only", action="append", choices=_PIECES, metavar="PIECE", help=" or ".join(_PIECES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every slice and the summary")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the printed Markdown")
    options = parser.parse_args()
    options.only = options.only or list(_PIECES)
    return options


async def _measure_all(parts: Parts, plan: Plan, only: list[str], found: _Found) -> None:
    provider, filter_ = parts.start_provider(), parts.start_filter()
    _record(parts, plan, provider, filter_, found)
    bare = parts.start_reader("bare")
    observer = parts.start_observer("extproc-observer")
    if "cpu" in only:
        await _compare_readers([bare, parts.start_reader("observer"), observer], plan, found)
    if "memory" in only:
        await _watch_memory(parts, plan, found)
    if "envoy" in only:
        await _compare_envoys(parts, plan, provider, filter_, bare, observer, found)


def _record(parts: Parts, plan: Plan, provider: Server, filter_: Server, found: _Found) -> None:
    """From the Envoy that is measured: its messages, not our idea of them."""
    running = len(parts.children)
    recorder = parts.start_reader("recorder")
    gateway = parts.start_envoy("envoy-recorder", filter_, provider, recorder)
    answers = list(dict.fromkeys(cell.recorded for cell in plan.cells))
    for answer, one in parts.record(gateway, answers).items():
        file = parts.directory / f"{answer.to_header().replace(' ', '-')}.exchange"
        recording.save(one, file)
        found.files[answer] = file
        found.message_bytes |= {cell.name: one.chunk_bytes for cell in plan.cells if cell.recorded == answer}
    for child in reversed(parts.children[running:]):
        child.stop(5.0)


async def _compare_readers(servers: list[Server], plan: Plan, found: _Found) -> None:
    async with _replay() as worker:
        for cell in plan.cells:
            file = found.files[cell.recorded]
            for server in servers:
                await measure_reader(worker, server, cell, file, plan.warm_up_s, 0)  # warms up, counts for nothing
            for number in range(plan.rounds):
                _say(f"{cell.name}, round {number + 1} of {plan.rounds}")
                for server in _rotated(servers, number):
                    found.readers.append(await measure_reader(worker, server, cell, file, plan.slice_s, number))


async def _watch_memory(parts: Parts, plan: Plan, found: _Found) -> None:
    observer = parts.start_observer("memory")
    _say(f"memory, {plan.memory_streams:,} streams")
    async with _replay() as worker:
        found.samples, found.memory = await watch_memory(worker, observer, found.files[plan.cells[0].recorded], plan)
    found.counted = await asyncio.to_thread(counters, observer)
    parts.children[-1].stop(8.0)


async def _compare_envoys(
    parts: Parts, plan: Plan, provider: Server, filter_: Server, bare: Server, observer: Server, found: _Found
) -> None:
    off = parts.start_envoy("envoy-off", filter_, provider, None)
    set_ups: list[tuple[str, Server, Server | None]] = [
        (summary.OFF, off, None),
        (summary.BARE, parts.start_envoy("envoy-bare", filter_, provider, bare), bare),
        (summary.OFF_AGAIN, off, None),
        (summary.ON, parts.start_envoy("envoy-observer", filter_, provider, observer), observer),
    ]
    async with LoadProcess("bench.observer.viewer") as worker:
        for number in range(plan.envoy_rounds):
            _say(f"through Envoy, round {number + 1} of {plan.envoy_rounds}")
            for clients in plan.clients:
                for name, gateway, watcher in _rotated(set_ups, number):
                    found.envoys.append(
                        await measure_envoy(worker, gateway, watcher, name, clients, plan.watched, number)
                    )


def _replay() -> LoadProcess:
    return LoadProcess("bench.observer.replay", {"GRPC_EXPERIMENTS": GRPC_EXPERIMENTS})


def _rotated(given: list[_T], by: int) -> list[_T]:
    """Another one begins each round: what one leaves behind for the next hits all alike."""
    at = by % len(given)
    return [*given[at:], *given[:at]]


def _summarise(plan: Plan, known: dict[str, object], found: _Found) -> report.Report:
    rows = summary.reader_rows(found.readers)
    memory = summary.growth(found.samples, plan.memory_streams) if found.samples else None
    compared = summary.differences(found.envoys)
    digest = hashlib.sha256(b"".join(chunks(plan.watched))).hexdigest()
    return report.Report(
        conditions=known,
        message_bytes=found.message_bytes,
        readers=rows,
        memory=memory,
        memory_samples=found.samples,
        memory_seconds=found.memory.seconds,
        counted=found.counted,
        differences=compared,
        aims=summary.aims(rows, memory, compared, found.envoys, digest),
        reader_slices=found.readers,
        envoy_slices=found.envoys,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
