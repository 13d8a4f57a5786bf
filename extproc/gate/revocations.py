"""Listens to revoked tokens: what the token cache lives from. `extproc.redis.channel` vouches for having heard them."""

from __future__ import annotations

import time

import msgspec
import structlog

from extproc.gate import metrics
from extproc.gate.token_cache import TokenCache
from extproc.redis.channel import Channel
from extproc.turns.broker import Broker

__all__ = ["CHANNEL", "RevocationChannel"]

CHANNEL = "ibex:token:revocations"
"""Auth service publishes, gates listen (contract, section 4)."""

_log = structlog.get_logger("extproc.gate")


class _Revocation(msgspec.Struct):
    """What of a message is needed."""

    token_id: str


_decode = msgspec.json.Decoder(_Revocation).decode


class RevocationChannel:
    """`start` it and `close` it; the cache hears of the rest."""

    def __init__(self, broker: Broker, cache: TokenCache) -> None:
        self._cache = cache
        self._channel = Channel(broker, CHANNEL, self)

    @property
    def is_alive(self) -> bool:
        return self._cache.is_trusted(time.monotonic())

    def start(self) -> None:
        metrics.CHANNEL_ALIVE.set_function(lambda: float(self.is_alive))
        self._channel.start()

    async def close(self) -> None:
        await self._channel.close()

    def hear(self, _channel: bytes, message: bytes) -> None:
        try:
            self._cache.revoke(_decode(message).token_id, time.monotonic())
        except msgspec.MsgspecError:
            # Some token was revoked, and nobody knows which.
            _log.warning("a revocation cannot be read; the token cache is emptied")
            self._cache.distrust()

    def trust(self, now: float, until: float) -> None:
        self._cache.trust(now, until)

    def distrust(self) -> None:
        self._cache.distrust()

    def found(self) -> None:
        _log.info("revocations are heard; tokens may be cached")

    def lost(self) -> None:
        _log.warning("the revocation channel is lost; until it is back every request asks the auth service")
