"""What gates hear of through Redis or Valkey: tokens that were revoked, and limits that an organisation has of its own.

    channel ibex:token:revocations   {"v": 1, "token_id", "revoked_at" (RFC 3339, UTC), "org_id"}
    key ratelimit:{org_id}:limit     requests a minute, 0: any number; absent: what the gate is set to

Both are copies: the database is the truth. Every method blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from redis import Redis
from redis.cluster import RedisCluster
from redis.exceptions import AuthenticationError, AuthorizationError, RedisClusterException, RedisError

from extproc.settings import SettingsError
from extproc.turns.broker import Broker, BrokerUrlError
from extproc.turns.broker_client import connect

__all__ = ["REVOCATIONS", "Announcer", "NotAnnounced", "limit_key", "revocation_message"]

REVOCATIONS = "ibex:token:revocations"
_VERSION = 1

_TIMEOUT_S = 1.0
"""Of connecting, and of an answer: who revokes a token waits for this."""
_LIMITS_AT_ONCE = 500


class NotAnnounced(Exception):
    """Redis did not take it. The message has no credentials in it."""


def limit_key(org_id: str) -> str:
    return f"ratelimit:{org_id}:limit"


def revocation_message(org_id: str, token_id: str, revoked_at: datetime) -> bytes:
    at = revoked_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"v": _VERSION, "token_id": token_id, "revoked_at": at, "org_id": org_id}).encode()


class Announcer:
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

    def revoked(self, org_id: str, token_id: str, revoked_at: datetime) -> None:
        """Raises NotAnnounced. Again does no harm."""
        message = revocation_message(org_id, token_id, revoked_at)
        self._do(lambda client: client.publish(REVOCATIONS, message))

    def limits(self, limits: Mapping[str, int | None]) -> None:
        """Requests a minute of each of these organisations; None: none of its own. Raises NotAnnounced."""
        everything = list(limits.items())
        for start in range(0, len(everything), _LIMITS_AT_ONCE):
            some = everything[start : start + _LIMITS_AT_ONCE]
            self._do(lambda client, some=some: _write_limits(client, some))

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _do(self, work: Any) -> None:
        try:
            if self._client is None:
                self._client = connect(self._server, _TIMEOUT_S, _TIMEOUT_S)
            work(self._client)
        except (RedisError, RedisClusterException, OSError) as error:
            # The next attempt begins from the URL: names are looked up, Sentinels and nodes asked again.
            self.close()
            raise NotAnnounced(f"Redis ({self._server.where}) {_problem(error)}") from None


def _write_limits(client: Redis | RedisCluster, limits: list[tuple[str, int | None]]) -> None:
    pipeline = client.pipeline(transaction=False)
    for org_id, rpm in limits:
        if rpm is None:
            pipeline.delete(limit_key(org_id))
        else:
            pipeline.set(limit_key(org_id), rpm)
    pipeline.execute()


def _problem(error: Exception) -> str:
    """The server's own words are not repeated: they may hold parts of a command."""
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return "refuses the user or the password; check both in IBEX_REDIS_URL"
    return f"did not take it: {type(error).__name__}"
