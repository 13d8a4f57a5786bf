"""Sends recorded exchanges to a server as Envoy would, in a process of its own, the same for every server.

Lines of JSON with the parent: an `Order` comes in, `ready` goes out; any line starts it, a `Result` goes out; any line
ends the streams that stayed open, `closed` goes out. With `total_streams`, `done NUMBER` goes out each second before
the result.

Each stream is one exchange with a request id of its own, over one connection with the others, as Envoy has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio
import uvloop

from bench.load_process import lines_of_standard_input, say
from bench.observer.recording import Recording, load
from extproc.filter.service import SERVICE_NAME

__all__ = ["GRACE_S", "Order", "Result", "main"]

GRACE_S = 10.0
"""What streams get to end after the load."""

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
Call: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Order:
    port: int
    file: str
    """A recording."""
    streams: int
    """At a time."""
    seconds: float
    interval_ms: float | None
    """Between two chunks of one stream; None: the next when the last is sent."""
    chunks_per_stream: int | None
    """Streams end after as many, and others begin; None: they stay open until the parent says so."""
    total_streams: int = 0
    """End after as many, whatever the time; 0: after the time."""


@dataclass(slots=True)
class Result:
    chunks: int = 0
    """Chunks of answers that were sent, without those that open and close a stream."""
    streams: int = 0
    """That were ended."""
    broken: int = 0
    """That the server ended before us, or with another status than OK."""
    seconds: float = 0.0


class _Load:
    """One order: `open`, then `run`, then `close`."""

    def __init__(self, order: Order, recording: Recording, channel: grpc.aio.Channel) -> None:
        self._order = order
        self._recording = recording
        self._begin: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            f"/{SERVICE_NAME}/Process"
        )
        self._calls: list[Call] = []
        self._ends_at = 0.0
        self._begun = 0
        self.result = Result()

    async def open(self) -> None:
        if self._order.chunks_per_stream is None:
            self._calls = [await self._open_one() for _ in range(self._order.streams)]
            await asyncio.sleep(0.3)  # until the server has read all of it

    async def run(self) -> None:
        started = time.perf_counter()
        self._ends_at = started + self._order.seconds
        if self._calls:
            await asyncio.gather(*(self._feed(call, None) for call in self._calls))
        else:
            await asyncio.gather(*(self._stream_after_stream() for _ in range(self._order.streams)))
        self.result.seconds = time.perf_counter() - started

    async def close(self) -> None:
        await asyncio.gather(*(self._close_one(call) for call in self._calls))

    async def _open_one(self) -> Call:
        metadata = tuple((key, value) for key, value in self._recording.metadata)
        call = self._begin(metadata=metadata)
        for message in self._recording.opening_of(str(uuid.uuid4()).encode()):
            await call.write(message)
        return call

    async def _close_one(self, call: Call) -> None:
        """An observer may end its side at the answer's end, before we end ours."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            for message in self._recording.closing:
                await call.write(message)
            await call.done_writing()
        code = await asyncio.wait_for(call.code(), GRACE_S)
        self.result.streams += 1
        self.result.broken += code is not grpc.StatusCode.OK

    async def _feed(self, call: Call, count: int | None) -> None:
        """Chunks until the time is over, or as many."""
        interval_s = (self._order.interval_ms or 0.0) / 1e3
        due = time.perf_counter() + random.random() * interval_s  # streams do not beat in time
        chunks = itertools.islice(itertools.cycle(self._recording.chunks), count)
        try:
            for chunk in chunks:
                if interval_s:
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    due += interval_s
                if time.perf_counter() > self._ends_at and not self._order.total_streams:
                    return
                await call.write(chunk)
                self.result.chunks += 1
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            self.result.broken += 1

    async def _stream_after_stream(self) -> None:
        if self._order.interval_ms:
            length_s = (self._order.chunks_per_stream or 0) * self._order.interval_ms / 1e3
            await asyncio.sleep(random.random() * min(length_s, self._order.seconds / 2))
        while self._may_begin():
            self._begun += 1
            call = await self._open_one()
            await self._feed(call, self._order.chunks_per_stream)
            await self._close_one(call)

    def _may_begin(self) -> bool:
        if self._order.total_streams:
            return self._begun < self._order.total_streams
        return time.perf_counter() < self._ends_at


async def _tell_progress(load_: _Load) -> None:
    while True:
        await asyncio.sleep(1.0)
        say(f"done {load_.result.streams}")


async def _follow(order: Order, lines: asyncio.StreamReader) -> None:
    recording = load(Path(order.file))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{order.port}", options=_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), GRACE_S)
        work = _Load(order, recording, channel)
        await work.open()
        say("ready")
        await lines.readline()
        progress = asyncio.create_task(_tell_progress(work)) if order.total_streams else None
        try:
            await work.run()
        finally:
            if progress is not None:
                progress.cancel()
        say(json.dumps(asdict(work.result)))
        await lines.readline()
        await work.close()
        say("closed")


async def _serve() -> None:
    """Orders until standard input ends."""
    lines = await lines_of_standard_input()
    while line := await lines.readline():
        await _follow(Order(**json.loads(line)), lines)


def main() -> None:
    uvloop.run(_serve())


if __name__ == "__main__":
    main()
