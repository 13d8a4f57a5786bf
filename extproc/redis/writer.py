"""One thread's way to write to Redis: a client that is made when needed, and made anew after a failure. Blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import AuthenticationError, AuthorizationError, RedisClusterException, RedisError

from extproc.settings import SettingsError
from extproc.turns.broker import Broker, BrokerUrlError
from extproc.turns.broker_client import connect

__all__ = ["NotWritten", "RedisWriter"]

_TIMEOUT_S = 1.0
"""Of connecting, and of an answer: who changes something waits for this."""

T = TypeVar("T")


class NotWritten(Exception):
    """Redis did not take it. The message has no credentials in it."""


class RedisWriter:
    """One thread uses it."""

    def __init__(self, url: str) -> None:
        """Reads IBEX_REDIS_URL (the forms of `extproc.turns.broker`) and connects to nothing yet.

        Raises SettingsError.
        """
        try:
            self._server = Broker.parse(url, "IBEX_REDIS_URL")
        except BrokerUrlError as error:
            raise SettingsError(str(error)) from None
        self._client: Redis | RedisCluster | None = None

    def do(self, work: Callable[[Redis | RedisCluster], T]) -> T:
        """Raises NotWritten."""
        try:
            if self._client is None:
                self._client = connect(self._server, _TIMEOUT_S, _TIMEOUT_S)
            return work(self._client)
        except (RedisError, RedisClusterException, OSError) as error:
            # The next attempt begins from the URL: names are looked up, Sentinels and nodes asked again.
            self.close()
            raise NotWritten(f"Redis ({self._server.where}) {_problem(error)}") from None

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


def _problem(error: Exception) -> str:
    """The server's own words are not repeated: they may hold parts of a command."""
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return "refuses the user or the password; check both in IBEX_REDIS_URL"
    return f"did not take it: {type(error).__name__}"
