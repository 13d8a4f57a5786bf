"""What gates hear of through Redis or Valkey: tokens that were revoked, and limits that an organisation has of its own.

    channel ibex:token:revocations   {"v": 1, "token_id", "revoked_at" (RFC 3339, UTC), "org_id"}
    key ratelimit:{org_id}:limit     requests a minute, 0: any number; absent: what the gate is set to

Both are copies: the database is the truth. Every method blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import partial

from redis import Redis
from redis.cluster import RedisCluster

from extproc.redis.writer import NotWritten, RedisWriter

__all__ = ["REVOCATIONS", "Announcer", "NotWritten", "limit_key", "revocation_message"]

REVOCATIONS = "ibex:token:revocations"
_VERSION = 1

_LIMITS_AT_ONCE = 500


def limit_key(org_id: str) -> str:
    return f"ratelimit:{org_id}:limit"


def revocation_message(org_id: str, token_id: str, revoked_at: datetime) -> bytes:
    at = revoked_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"v": _VERSION, "token_id": token_id, "revoked_at": at, "org_id": org_id}).encode()


class Announcer:
    """One thread uses it."""

    def __init__(self, url: str) -> None:
        """`url`: IBEX_REDIS_URL. Raises SettingsError."""
        self._redis = RedisWriter(url)

    def revoked(self, org_id: str, token_id: str, revoked_at: datetime) -> None:
        """Raises NotWritten. Again does no harm."""
        message = revocation_message(org_id, token_id, revoked_at)
        self._redis.do(lambda client: client.publish(REVOCATIONS, message))

    def limits(self, limits: Mapping[str, int | None]) -> None:
        """Requests a minute of each of these organisations; None: none of its own. Raises NotWritten."""
        everything = list(limits.items())
        for start in range(0, len(everything), _LIMITS_AT_ONCE):
            some = everything[start : start + _LIMITS_AT_ONCE]
            self._redis.do(partial(_write_limits, limits=some))

    def close(self) -> None:
        self._redis.close()


def _write_limits(client: Redis | RedisCluster, limits: list[tuple[str, int | None]]) -> None:
    pipeline = client.pipeline(transaction=False)
    for org_id, rpm in limits:
        if rpm is None:
            pipeline.delete(limit_key(org_id))
        else:
            pipeline.set(limit_key(org_id), rpm)
    pipeline.execute()
