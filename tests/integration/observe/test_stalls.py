"""An observer that stands still holds no client up: killed, frozen, or with a blocked event loop, under heavy streams.

Envoy's flow control stops a stream when what it shows the observer piles up. What ends the wait is in the shipped
configuration (keepalive, health check) and in the watchdog, so these tests run both as they are.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from extproc.stack.envoy import Address
from tests.integration.http_side import AUTHORIZED
from tests.integration.observe.conftest import Watched, watched
from tests.integration.observe.transcript_provider import Provider, Script
from tests.integration.processor import Processor

LONGEST_WAIT_S = 2.5
SLACK_S = 5.0
"""For a machine that is busy with other tests. Without what is tested here a stream waits as long as the observer."""
LIMIT_S = 45
MOST_GROWTH_MB = 256
"""Of Envoy: what it may hold while it waits. 500 streams of 200 KB are 100 MB, and two of 100 MB twice as many."""

STALLS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP, "blocked": signal.SIGUSR1}


@dataclass(frozen=True)
class Load:
    streams: int
    piece: bytes
    pieces: int
    pause_s: float
    stall_after_s: float

    @property
    def size(self) -> int:
        return len(self.piece) * self.pieces


LOADS = {
    "two streams of 100 MB": Load(2, b"x" * 1_000_000, 100, 0.0, 0.1),
    "500 streams of 200 KB": Load(500, b"x" * 10_000, 20, 0.1, 1.0),
}


@dataclass
class Download:
    size: int = 0
    longest_wait_s: float = 0.0


async def download(address: Address, size: int) -> Download:
    """Over a socket of our own, since what is measured is when bytes arrive."""
    result = Download()
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=1 << 20)
    body = b'{"model":"gpt-4o","stream":true,"messages":[{"role":"user","content":"hello"}]}'
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: gateway", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in AUTHORIZED.items()]
    lines += [f"content-length: {len(body)}", "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    last = time.monotonic()
    while result.size < size and (chunk := await reader.read(1 << 20)):
        now = time.monotonic()
        result.longest_wait_s = max(result.longest_wait_s, now - last)
        result.size += len(chunk)
        last = now
    writer.close()
    return result


async def run(one: Watched, load: Load, stall: signal.Signals | None) -> tuple[list[Download], int]:
    """All downloads, and by how many bytes Envoy grew at most."""
    envoy = psutil.Process(one.gateway.envoy.process.pid)
    before = most = envoy.memory_info().rss
    tasks = [asyncio.create_task(download(one.gateway.address, load.size)) for _ in range(load.streams)]
    async with asyncio.timeout(LIMIT_S):
        await asyncio.sleep(load.stall_after_s)
        if stall is not None:
            os.kill(one.observer.pid, stall)
        while not all(task.done() for task in tasks):
            most = max(most, envoy.memory_info().rss)
            await asyncio.sleep(0.05)
    return [task.result() for task in tasks], most - before


@contextmanager
def fresh(binary: Path, directory: Path, context: Address, gate: Address, provider: Provider) -> Iterator[Watched]:
    """An observer that may be harmed."""
    with watched(binary, "envoy.yaml", directory, [context], provider, gate=gate) as one:
        try:
            yield one
        finally:
            if one.observer.poll() is None:
                os.kill(one.observer.pid, signal.SIGCONT)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("how", STALLS)
def test_every_stream_arrives_whole_and_waits_once_at_most(
    how: str,
    name: str,
    envoy_binary: Path,
    processor: Processor,
    processor_address: Address,
    gate_address: Address,
    transcript_provider: Provider,
    tmp_path: Path,
) -> None:
    load = LOADS[name]
    transcript_provider.script = Script([load.piece] * load.pieces, pause_s=load.pause_s, has_length=True)
    with fresh(envoy_binary, tmp_path, processor_address, gate_address, transcript_provider) as one:
        downloads, growth = asyncio.run(run(one, load, STALLS[how]))
        assert [each.size for each in downloads] == [load.size] * load.streams
        assert max(each.longest_wait_s for each in downloads) < LONGEST_WAIT_S + SLACK_S
        assert growth < MOST_GROWTH_MB * 1024 * 1024
        # Without an observer requests go on, and none waits for it.
        transcript_provider.script = Script([b"data: [DONE]\n\n"])
        started = time.monotonic()
        assert one.gateway.chat().status_code == 200
        assert time.monotonic() - started < LONGEST_WAIT_S + SLACK_S


def test_a_blocked_observer_ends_itself(
    envoy_binary: Path,
    processor: Processor,
    processor_address: Address,
    gate_address: Address,
    transcript_provider: Provider,
    tmp_path: Path,
) -> None:
    with fresh(envoy_binary, tmp_path, processor_address, gate_address, transcript_provider) as one:
        os.kill(one.observer.pid, signal.SIGUSR1)
        assert one.observer.wait(20) == 70
