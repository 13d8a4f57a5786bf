"""One connection to Redis or Valkey for everything that one process asks: many questions on their way, in order.

A check is to take little more than a bare gRPC call, and a client library's call alone costs as much as half of one
(60 µs; a question here: 8). So this speaks RESP2 itself, of which little is needed, and knows no retries: a question
is answered within its deadline or not. How to get there (Sentinels, TLS, credentials) is `Broker`'s.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

from redis.asyncio.sentinel import Sentinel
from redis.exceptions import RedisError
from typing_extensions import override

from extproc.turns.broker import Broker, Mode

__all__ = ["LinkProblem", "RedisLink", "Refusal", "Wire", "encode_command", "open_wire", "read_reply"]

_CONNECT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
"""Between two attempts to connect."""
_STALLED_DEADLINES = 5
"""After so many deadlines without a word the connection is given up: questions would only wait for nothing."""
_LONGEST_BULK = 1024 * 1024
_LONGEST_ARRAY = 1024


class LinkProblem(Enum):
    DOWN = auto()
    TIMEOUT = auto()


class Refusal(str):
    """An error that the server answered, such as `NOSCRIPT No matching script`."""

    __slots__ = ()


class _NotRedis(Exception):
    """What came is no RESP2."""


def encode_command(*parts: bytes | str) -> bytes:
    encoded = [part if isinstance(part, bytes) else part.encode() for part in parts]
    return b"*%d\r\n%b" % (len(encoded), b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in encoded]))


def read_reply(buffer: bytes, at: int) -> tuple[Any, int]:
    """The reply that begins at `at`, and where the next one does; `(_, -1)` while it is not all there.

    Raises _NotRedis.
    """
    end = buffer.find(b"\r\n", at)
    if end < 0:
        if len(buffer) - at > _LONGEST_BULK:
            raise _NotRedis("a line without end")
        return None, -1
    kind, line = buffer[at], buffer[at + 1 : end]
    match kind:
        case 0x3A:  # :
            return _integer(line), end + 2
        case 0x2B:  # +
            return line.decode("latin-1"), end + 2
        case 0x2D:  # -
            return Refusal(line.decode("latin-1")), end + 2
        case 0x24:  # $
            return _read_bulk(buffer, _integer(line), end + 2)
        case 0x2A:  # *
            return _read_array(buffer, _integer(line), end + 2)
        case _:
            raise _NotRedis("a reply of an unknown kind")


def _integer(line: bytes) -> int:
    try:
        return int(line)
    except ValueError:
        raise _NotRedis("a number was expected") from None


def _read_bulk(buffer: bytes, length: int, at: int) -> tuple[bytes | None, int]:
    if length > _LONGEST_BULK:
        raise _NotRedis("a string that long is none of ours")
    if length < 0:
        return None, at
    end = at + length
    return (None, -1) if len(buffer) < end + 2 else (buffer[at:end], end + 2)


def _read_array(buffer: bytes, length: int, at: int) -> tuple[list[Any] | None, int]:
    if length > _LONGEST_ARRAY:
        raise _NotRedis("an array that long is none of ours")
    items = []
    for _ in range(length):
        item, at = read_reply(buffer, at)
        if at < 0:
            return None, -1
        items.append(item)
    return items, at


class Wire(asyncio.Protocol):
    """A connection: bytes become replies, in order. `on_lost` is called once."""

    def __init__(self, on_reply: Callable[[Any], None], on_lost: Callable[[], None]) -> None:
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without saying so

    @override
    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        at = 0
        try:
            while at < len(buffer):
                reply, after = read_reply(buffer, at)
                if after < 0:
                    break
                at = after
                self._on_reply(reply)
        except (_NotRedis, RecursionError):
            self.abort()
            return
        self._buffer = buffer[at:]

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    def send(self, command: bytes) -> None:
        """Does nothing once the connection is lost."""
        if self._transport is not None:
            self._transport.write(command)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def open_wire(broker: Broker, wire: Wire) -> list[bytes]:
    """Connect `wire`; returns the commands that have to be answered with OK before it can be used.

    Raises OSError, TimeoutError or RedisError.
    """
    loop = asyncio.get_running_loop()
    context = _tls_context(broker)
    if broker.mode is Mode.SOCKET:
        await loop.create_unix_connection(lambda: wire, broker.path)
    else:
        host, port = await _address(broker)
        await loop.create_connection(lambda: wire, host, port, ssl=context)
    greeting = []
    if broker.password is not None:
        user = (broker.username,) if broker.username is not None else ()
        greeting.append(encode_command("AUTH", *user, broker.password))
    if broker.db:
        greeting.append(encode_command("SELECT", str(broker.db)))
    return greeting


async def _address(broker: Broker) -> tuple[str, int]:
    if broker.mode is not Mode.SENTINEL:
        return broker.addresses[0]
    own: dict[str, Any] = {
        "username": broker.sentinel_username,
        "password": broker.sentinel_password,
        "protocol": 2,
        "socket_connect_timeout": _CONNECT_S / 2,
        "socket_timeout": _CONNECT_S / 2,
        **({"ssl": True, **broker.tls} if broker.tls is not None else {}),
    }
    sentinels = Sentinel(list(broker.addresses), sentinel_kwargs=own)  # type: ignore[no-untyped-call]
    try:
        host, port = await sentinels.discover_master(broker.master)
        return str(host), int(port)
    finally:
        for sentinel in sentinels.sentinels:
            await sentinel.aclose()


def _tls_context(broker: Broker) -> ssl.SSLContext | None:
    if broker.tls is None:
        return None
    options = broker.tls
    context = ssl.create_default_context(cafile=str(options["ssl_ca_certs"]) if "ssl_ca_certs" in options else None)
    context.check_hostname = bool(options["ssl_check_hostname"]) and options["ssl_cert_reqs"] != "none"
    context.verify_mode = {
        "required": ssl.CERT_REQUIRED,
        "optional": ssl.CERT_OPTIONAL,
        "none": ssl.CERT_NONE,
    }[str(options["ssl_cert_reqs"])]
    if "ssl_certfile" in options:
        key = options.get("ssl_keyfile")
        context.load_cert_chain(str(options["ssl_certfile"]), str(key) if key else None)
    return context


class _Question:
    __slots__ = ("answer", "sent")

    def __init__(self, answer: asyncio.Future[Any], sent: float) -> None:
        self.answer = answer
        self.sent = sent


class RedisLink:
    """`start` it, `ask`, `close` it. Connects, and connects again, on its own."""

    def __init__(self, broker: Broker, timeout_s: float) -> None:
        """`timeout_s`: for each answer."""
        self._broker = broker
        self._timeout_s = timeout_s
        self._current: Wire | None = None
        """Being opened, or in use."""
        self._wire: Wire | None = None
        """In use."""
        self._questions: deque[_Question] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the first attempt to connect has ended, well or not."""
        first = asyncio.Event()
        self._task = asyncio.create_task(self._run(first), name="redis-link")
        await first.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._give_up()

    @property
    def is_up(self) -> bool:
        return self._wire is not None

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        """The reply, or a LinkProblem within the deadline. Never raises but CancelledError."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if self._wire is None:
            answer.set_result(LinkProblem.DOWN)
            return answer
        self._put(self._wire, command, answer, loop)
        return answer

    def _put(self, wire: Wire, command: bytes, answer: asyncio.Future[Any], loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._questions.append(_Question(answer, now))
        if self._timer is None:
            self._timer = loop.call_at(now + self._timeout_s, self._look_at_clock, loop)
        wire.send(command)

    def _take_reply(self, reply: Any) -> None:
        if not self._questions:
            return
        answer = self._questions.popleft().answer
        if not answer.done():
            answer.set_result(reply)

    def _look_at_clock(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all questions. One that nobody waits for any more stays: its reply will come."""
        self._timer = None
        if not self._questions:
            return
        now = loop.time()
        if now - self._questions[0].sent >= _STALLED_DEADLINES * self._timeout_s:
            self._give_up()
            return
        wake = self._questions[0].sent + _STALLED_DEADLINES * self._timeout_s
        for question in self._questions:
            due = question.sent + self._timeout_s
            if question.answer.done():
                continue
            if due > now:
                wake = min(wake, due)
                break
            question.answer.set_result(LinkProblem.TIMEOUT)
        self._timer = loop.call_at(wake, self._look_at_clock, loop)

    def _lose(self, wire: Wire) -> None:
        if wire is self._current:
            self._give_up()

    def _give_up(self) -> None:
        wire, self._current, self._wire = self._current, None, None
        if wire is not None:
            wire.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._questions:
            answer = self._questions.popleft().answer
            if not answer.done():
                answer.set_result(LinkProblem.DOWN)
        self._lost.set()

    async def _run(self, first: asyncio.Event) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            self._lost.clear()
            try:
                # wait_for loses a cancellation that comes as the attempt ends, and `close` would wait for ever.
                async with asyncio.timeout(_CONNECT_S):
                    await self._connect()
                pause_s = _FIRST_PAUSE_S
            except (OSError, TimeoutError, RedisError):
                self._give_up()
            first.set()
            await self._lost.wait()
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        wire = Wire(self._take_reply, lambda: self._lose(wire))
        self._current = wire
        for command in (*await open_wire(self._broker, wire), encode_command("PING")):
            answer: asyncio.Future[Any] = loop.create_future()
            self._questions.append(_Question(answer, loop.time()))
            wire.send(command)
            if await answer not in {"OK", "PONG"}:
                raise ConnectionRefusedError("the server refuses the user, the password or the database")
        self._wire = wire
