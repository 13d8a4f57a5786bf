"""Listens to revoked tokens, and vouches for having heard all of them: that is what the token cache lives from.

A PING every half second goes the same way as the messages. Its answer proves that each message up to the moment it was
sent has arrived, and is believed for 1.5 s: a server that is dead, frozen or unreachable, or a gate that stood still
itself, empties the cache within that time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import msgspec
import structlog
from redis.exceptions import RedisError

from extproc.gate import metrics
from extproc.gate.redis_link import Wire, encode_command, open_wire
from extproc.gate.token_cache import TokenCache
from extproc.turns.broker import Broker

__all__ = ["CHANNEL", "RevocationChannel"]

CHANNEL = "ibex:token:revocations"
"""Auth service publishes, gates listen (contract, section 4)."""

_PING_S = 0.5
_BELIEVED_S = 1.5
_CONNECT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0

_log = structlog.get_logger("extproc.gate")


class _Revocation(msgspec.Struct):
    """What of a message is needed."""

    token_id: str


_decode = msgspec.json.Decoder(_Revocation).decode


class RevocationChannel:
    """`start` it and `close` it; the cache hears of the rest."""

    def __init__(self, broker: Broker, cache: TokenCache) -> None:
        self._broker = broker
        self._cache = cache
        self._wire: Wire | None = None
        self._lost = asyncio.Event()
        self._pings: deque[float] = deque()
        """When those were sent that are not answered yet."""
        self._is_alive = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_alive(self) -> bool:
        return self._cache.is_trusted(time.monotonic())

    def start(self) -> None:
        metrics.CHANNEL_ALIVE.set_function(lambda: float(self.is_alive))
        self._task = asyncio.create_task(self._run(), name="revocations")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._give_up()

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            self._lost.clear()
            try:
                await asyncio.wait_for(self._listen(), _CONNECT_S)
                await self._ping_until_lost()
                pause_s = _FIRST_PAUSE_S
            except (OSError, TimeoutError, RedisError):
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
            finally:
                self._give_up()
            await asyncio.sleep(pause_s)

    async def _listen(self) -> None:
        wire = Wire(lambda reply: self._take(wire, reply), lambda: self._lose(wire))
        self._wire = wire
        self._pings.clear()
        for command in await open_wire(self._broker, wire):
            wire.send(command)
        wire.send(encode_command("SUBSCRIBE", CHANNEL))

    async def _ping_until_lost(self) -> None:
        while not self._lost.is_set():
            now = time.monotonic()
            if self._pings and now - self._pings[0] > _BELIEVED_S:
                return
            if self._wire is not None:
                self._pings.append(now)
                self._wire.send(encode_command("PING"))
            try:
                await asyncio.wait_for(self._lost.wait(), _PING_S)
            except TimeoutError:
                continue

    def _take(self, wire: Wire, reply: Any) -> None:
        if wire is not self._wire:
            return
        match reply:
            case [b"message", _, bytes(message)]:
                self._take_message(message)
            case [b"pong", _]:
                self._take_pong()
            case [b"subscribe", *_] | "OK":
                pass
            case _:
                # Not subscribed: a wrong password, or a user who may not. Its words may hold parts of a command.
                _log.warning("the revocation channel is refused; no token is cached", kind=type(reply).__name__)
                wire.abort()

    def _take_message(self, message: bytes) -> None:
        try:
            self._cache.revoke(_decode(message).token_id, time.monotonic())
        except msgspec.MsgspecError:
            # Some token was revoked, and nobody knows which.
            _log.warning("a revocation cannot be read; the token cache is emptied")
            self._cache.distrust()

    def _take_pong(self) -> None:
        if not self._pings:
            return
        sent = self._pings.popleft()
        self._cache.trust(time.monotonic(), sent + _BELIEVED_S)
        if not self._is_alive:
            self._is_alive = True
            _log.info("revocations are heard; tokens may be cached")

    def _lose(self, wire: Wire) -> None:
        if wire is self._wire:
            self._lost.set()
            self._cache.distrust()

    def _give_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()
        self._cache.distrust()
        if self._is_alive:
            self._is_alive = False
            _log.warning("the revocation channel is lost; until it is back every request asks the auth service")
