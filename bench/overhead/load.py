"""The load generator: a raw HTTP/1.1 keep-alive client in a process of its own, the same for every set-up.

It speaks lines of JSON with its parent: an `Order` comes in, `ready` goes out once all connections stand and each has
carried one request, any line starts the slice, a `Result` goes out. It reads of a response what is measured: status,
`content-length`, and two x-ibex headers.

Closed loop: each connection sends its next request when the last is answered. Open loop: requests arrive at random
times (a seeded Poisson process), whatever the answers do, and a time counts from the arrival, waiting for a connection
included. Arrivals are looked for each millisecond, which is the clock of libuv: up to 1 ms is the generator's own.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

import uvloop
from typing_extensions import override

from bench.load_process import lines_of_standard_input, say
from bench.overhead.payload import BODY_SIZES, http_requests

__all__ = ["Order", "Result", "main"]

GRACE_S = 5.0
"""What requests that run at the end of a slice get; afterwards they count as lost."""

_TICK_S = 0.001


@dataclass(frozen=True, slots=True)
class Order:
    port: int
    body: str
    """A name of `BODY_SIZES`."""
    connections: int
    seconds: float
    rate: float | None
    """Requests per second of an open loop; None: closed loop."""
    max_requests: int
    """A slice ends early with this many sent."""


@dataclass(slots=True)
class Result:
    latencies_us: list[int] = field(default_factory=list)
    """Of every answered request, in the order of the answers."""
    seconds: float = 0.0
    """From the start to the last answer."""
    fallbacks: int = 0
    injected: int = 0
    """Answers that say one memory or more."""
    failures: int = 0
    """Answers other than 200, and connections that broke."""
    lost: int = 0
    """Requests without an answer at the end."""


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, on_answer: Callable[[_Connection, bytes], None], on_loss: Callable[[_Connection], None]) -> None:
        self._on_answer = on_answer
        self._on_loss = on_loss
        self._head = b""
        self._missing = -1
        """Bytes of the body still to come; -1: the head is not complete."""
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self.sent_at = 0.0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has the methods, not the base class

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_loss(self)

    @override
    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._received += data
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = self._received[: end + 2]
            self._missing = int(_header(self._head, b"content-length") or 0) - (len(self._received) - end - 4)
            self._received = b""
        else:
            self._missing -= len(data)
        if self._missing <= 0:
            self._missing = -1
            self._on_answer(self, self._head)

    def send(self, request: bytes, at: float) -> None:
        """`at`: `time.perf_counter` from when the request's time counts."""
        self.sent_at = at
        if self._transport is not None:
            self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _header(head: bytes, name: bytes) -> bytes:
    """Empty when absent. Envoy writes names in lower case."""
    start = head.find(b"\r\n" + name + b": ")
    return head[start + len(name) + 4 : head.find(b"\r\n", start + 2)] if start >= 0 else b""


class _Slice:
    """One order: `connect`, then `run`, then `close`."""

    def __init__(self, order: Order, requests: list[bytes]) -> None:
        self._order = order
        self._requests = requests
        self._next = 0
        self._connections: list[_Connection] = []
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[float] = deque()
        """Open loop: arrivals that found no idle connection."""
        self._sent = 0
        self._is_open = order.rate is not None
        self._ends_at = 0.0
        self._is_closing = False
        self._answered = asyncio.Event()
        """Set on each answer."""
        self._result = Result()

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self._order.connections):
            _, connection = await loop.create_connection(
                lambda: _Connection(self._on_answer, self._on_loss), "127.0.0.1", self._order.port
            )
            self._connections.append(connection)
        await self._warm()

    async def _warm(self) -> None:
        """One request on each connection, one after the other: all at once would be a burst that no client sends.

        Afterwards the result is empty again and no request is on its way.
        """
        for connection in self._connections:
            self._send(connection, time.perf_counter())
            await self._wait_for_answers()
        if len(self._result.latencies_us) < len(self._connections):
            raise ConnectionError(f"no answer to the first request on port {self._order.port}")
        self._result, self._sent = Result(), 0
        self._idle = deque(self._connections)

    async def run(self) -> Result:
        started = time.perf_counter()
        self._ends_at = started + self._order.seconds
        if self._order.rate is None:
            while self._idle and self._may_send():
                self._send(self._idle.popleft(), time.perf_counter())
            await asyncio.sleep(self._order.seconds)
        else:
            await self._arrive(started, self._order.rate)
        await self._wait_for_answers()
        self._result.seconds = max(self._result.seconds - started, 1e-9)
        self._result.lost = self._outstanding() + len(self._waiting)
        return self._result

    def close(self) -> None:
        self._is_closing = True
        for connection in self._connections:
            connection.close()

    async def _arrive(self, started: float, rate: float) -> None:
        draw = random.Random(1)
        due = started + draw.expovariate(rate)
        while (now := time.perf_counter()) < self._ends_at:
            while due <= now:
                if self._idle:
                    self._send(self._idle.popleft(), due)
                else:
                    self._waiting.append(due)
                due += draw.expovariate(rate)
            await asyncio.sleep(_TICK_S)

    async def _wait_for_answers(self) -> None:
        deadline = time.perf_counter() + GRACE_S
        while self._outstanding() > 0 or self._waiting:
            self._answered.clear()
            try:
                await asyncio.wait_for(self._answered.wait(), deadline - time.perf_counter())
            except TimeoutError:
                return

    def _outstanding(self) -> int:
        return self._sent - len(self._result.latencies_us) - self._result.failures

    def _may_send(self) -> bool:
        return time.perf_counter() < self._ends_at and self._sent < self._order.max_requests

    def _send(self, connection: _Connection, at: float) -> None:
        request = self._requests[self._next % len(self._requests)]
        self._next += 1
        self._sent += 1
        connection.send(request, at)

    def _on_answer(self, connection: _Connection, head: bytes) -> None:
        now = time.perf_counter()
        result = self._result
        if head.startswith(b"HTTP/1.1 200"):
            result.latencies_us.append(round((now - connection.sent_at) * 1e6))
            result.fallbacks += _header(head, b"x-ibex-context-fallback") == b"true"
            result.injected += _header(head, b"x-ibex-memories-injected") not in {b"", b"0"}
        else:
            result.failures += 1
        result.seconds = now
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        elif not self._is_open and self._may_send():
            self._send(connection, now)
        else:
            self._idle.append(connection)
            self._answered.set()

    def _on_loss(self, _connection: _Connection) -> None:
        if not self._is_closing:
            self._result.failures += 1
            self._answered.set()


async def _serve() -> None:
    """Orders until standard input ends."""
    bodies = {name: http_requests(size) for name, size in BODY_SIZES.items()}
    lines = await lines_of_standard_input()
    while line := await lines.readline():
        order = Order(**json.loads(line))
        work = _Slice(order, bodies[order.body])
        try:
            await work.connect()
            say("ready")
            if not await lines.readline():
                return
            result = await work.run()
        finally:
            work.close()
        say(json.dumps(asdict(result)))


def main() -> None:
    uvloop.run(_serve())


if __name__ == "__main__":
    main()
