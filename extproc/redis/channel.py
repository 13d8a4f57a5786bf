"""Listens to messages of Redis, and vouches for having heard all of them: that is what a cache may live from.

A PING every half second goes the same way as the messages. Its answer proves that each message up to the moment it was
sent has arrived, and is believed for 1.5 s: a server that is dead, frozen or unreachable, or a process that stood still
itself, is noticed within that time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, Protocol

import structlog
from redis.exceptions import RedisError

from extproc.redis.link import Wire, encode_command, open_wire
from extproc.turns.broker import Broker

__all__ = ["Channel", "Listener"]

_PING_S = 0.5
_BELIEVED_S = 1.5
_CONNECT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0

_log = structlog.get_logger("extproc.redis")


class Listener(Protocol):
    """Times are monotonic seconds."""

    def hear(self, channel: bytes, message: bytes) -> None: ...

    def trust(self, now: float, until: float) -> None:
        """Every message up to `now` was heard; without another word this is believed up to `until`."""
        ...

    def distrust(self) -> None:
        """A message may have been missed."""
        ...

    def found(self) -> None:
        """The channel is there, or there again."""
        ...

    def lost(self) -> None: ...


class Channel:
    """`start` it and `close` it; the listener hears of the rest. Connects, and connects again, on its own."""

    def __init__(self, broker: Broker, name: str, listener: Listener) -> None:
        """`name`: of one channel, or a pattern that ends with `*`."""
        self._broker = broker
        self._name = name
        self._listener = listener
        self._wire: Wire | None = None
        self._lost = asyncio.Event()
        self._pings: deque[float] = deque()
        """When those were sent that are not answered yet."""
        self._is_alive = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"listen to {self._name}")

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
                # wait_for loses a cancellation that comes as the attempt ends, and `close` would wait for ever.
                async with asyncio.timeout(_CONNECT_S):
                    await self._listen()
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
        wire.send(encode_command("PSUBSCRIBE" if self._name.endswith("*") else "SUBSCRIBE", self._name))

    async def _ping_until_lost(self) -> None:
        while not self._lost.is_set():
            now = time.monotonic()
            if self._pings and now - self._pings[0] > _BELIEVED_S:
                return
            if self._wire is not None:
                self._pings.append(now)
                self._wire.send(encode_command("PING"))
            try:
                async with asyncio.timeout(_PING_S):
                    await self._lost.wait()
            except TimeoutError:
                continue

    def _take(self, wire: Wire, reply: Any) -> None:
        if wire is not self._wire:
            return
        match reply:
            case [b"message", bytes(channel), bytes(message)] | [b"pmessage", _, bytes(channel), bytes(message)]:
                self._listener.hear(channel, message)
            case [b"pong", _]:
                self._take_pong()
            case [b"subscribe" | b"psubscribe", *_] | "OK":
                pass
            case _:
                # Not subscribed: a wrong password, or a user who may not. Its words may hold parts of a command.
                _log.warning("a channel is refused", channel=self._name, kind=type(reply).__name__)
                wire.abort()

    def _take_pong(self) -> None:
        if not self._pings:
            return
        sent = self._pings.popleft()
        self._listener.trust(time.monotonic(), sent + _BELIEVED_S)
        if not self._is_alive:
            self._is_alive = True
            self._listener.found()

    def _lose(self, wire: Wire) -> None:
        if wire is self._wire:
            self._lost.set()
            self._listener.distrust()

    def _give_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()
        self._listener.distrust()
        if self._is_alive:
            self._is_alive = False
            self._listener.lost()
