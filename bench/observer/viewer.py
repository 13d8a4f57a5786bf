"""Clients of a gateway: raw HTTP/1.1 sockets that receive streamed answers and note when each piece came.

A process of its own, the same for every gateway. Lines of JSON with the parent: an `Order` comes in, `ready` goes out
once each connection has received one answer; any line starts it, a `Result` goes out.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import time
from dataclasses import asdict, dataclass, field
from typing import cast

import uvloop
from typing_extensions import override

from bench.load_process import lines_of_standard_input, say
from bench.observer.transcript import ANSWER_HEADER, Answer, question

__all__ = ["GRACE_S", "Order", "Result", "dechunk", "main"]

GRACE_S = 5.0
"""What an answer gets beyond its own length."""
_END = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Order:
    port: int
    answer: str
    """`Answer.to_header`"""
    clients: int
    seconds: float
    """No answer is asked for afterwards."""


@dataclass(slots=True)
class Result:
    first_us: list[int] = field(default_factory=list)
    """From a request to the first byte of its answer's body, the head of the answer included."""
    gaps_us: list[int] = field(default_factory=list)
    """Between two arrivals in one answer."""
    streams: int = 0
    failures: int = 0
    digests: list[str] = field(default_factory=list)
    """SHA-256 of each different body."""


class _Connection(asyncio.Protocol):
    """One connection, one answer at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._done: asyncio.Future[bytes] | None = None
        self.times: list[float] = []
        """Of each arrival with bytes of the body in it."""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has the methods, not the base class

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the connection ended within an answer"))

    @override
    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._received += data
        if self.times or 0 <= self._received.find(b"\r\n\r\n") < len(self._received) - 4:
            self.times.append(now)
        if self._received.endswith(_END) and self._done is not None and not self._done.done():
            self._done.set_result(bytes(self._received))

    async def ask(self, request: bytes, limit_s: float) -> bytes:
        """The whole answer, head and all. Raises OSError (ConnectionError, TimeoutError)."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection has ended")
        self._received.clear()
        self.times = []
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await asyncio.wait_for(self._done, limit_s)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def dechunk(body: bytes) -> bytes:
    """A body out of its `transfer-encoding: chunked`, without trailers. Raises ValueError."""
    pieces: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _request(answer: Answer) -> bytes:
    body = question(answer)
    head = [
        f"POST {answer.path} HTTP/1.1",
        "host: gateway",
        "content-type: application/json",
        "accept: text/event-stream",
        "authorization: Bearer sk-0000000000000000000000000000000000000000000000",
        "user-agent: bench",
        f"{ANSWER_HEADER}: {answer.to_header()}",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


class _Clients:
    """One order: `connect`, then `run`, then `close`."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._answer = Answer.from_header(order.answer)
        self._request = _request(self._answer)
        self._length_s = self._answer.chunks * self._answer.pause_ms / 1e3
        self._connections: list[_Connection] = []
        self._ends_at = 0.0
        self._result = Result()

    async def connect(self) -> None:
        """Each connection carries one answer before any counts."""
        loop = asyncio.get_running_loop()
        for _ in range(self._order.clients):
            _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._order.port)
            self._connections.append(connection)
        await asyncio.gather(*(self._receive(connection) for connection in self._connections))
        if self._result.failures:
            raise ConnectionError(f"{self._result.failures} of the first answers on port {self._order.port} failed")
        self._result = Result()

    async def run(self) -> Result:
        self._ends_at = time.perf_counter() + self._order.seconds
        await asyncio.gather(*(self._ask_again_and_again(connection) for connection in self._connections))
        return self._result

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    async def _ask_again_and_again(self, connection: _Connection) -> None:
        if self._order.clients > 1:
            await asyncio.sleep(random.random() * self._length_s)  # clients do not begin together
        while time.perf_counter() < self._ends_at:
            if not await self._receive(connection):
                return

    async def _receive(self, connection: _Connection) -> bool:
        result, asked = self._result, time.perf_counter()
        try:
            answer = await connection.ask(self._request, self._length_s + GRACE_S)
            head, _, body = answer.partition(b"\r\n\r\n")
            digest = hashlib.sha256(dechunk(body)).hexdigest()
        except (OSError, ValueError):
            result.failures += 1
            return False
        if not head.startswith(b"HTTP/1.1 200"):
            result.failures += 1
            return False
        times = connection.times
        result.streams += 1
        result.first_us.append(round((times[0] - asked) * 1e6))
        result.gaps_us += [round((late - early) * 1e6) for early, late in itertools.pairwise(times)]
        if digest not in result.digests:
            result.digests.append(digest)
        return True


async def _serve() -> None:
    """Orders until standard input ends."""
    lines = await lines_of_standard_input()
    while line := await lines.readline():
        clients = _Clients(Order(**json.loads(line)))
        try:
            await clients.connect()
            say("ready")
            await lines.readline()
            result = await clients.run()
        finally:
            clients.close()
        say(json.dumps(asdict(result)))


def main() -> None:
    uvloop.run(_serve())


if __name__ == "__main__":
    main()
