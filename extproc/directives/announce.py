"""Writes directives to Redis, and tells filters of changes. Every method blocks; one thread uses an `Announcer`.

A change removes the key and does not write it: two changes at once might write in the wrong order, and both removals
are right in any order. Whoever answers a look-up from the database writes the key, if it is not there.
"""

from __future__ import annotations

from extproc.directives.directive import REDIS_TTL_S, change_message, channel_of, key_of
from extproc.redis.writer import NotWritten, RedisWriter

__all__ = ["DirectiveAnnouncer", "NotWritten"]


class DirectiveAnnouncer:
    def __init__(self, url: str) -> None:
        """`url`: IBEX_REDIS_URL. Connects to nothing yet. Raises SettingsError."""
        self._redis = RedisWriter(url)

    def changed(self, org_id: str, agent_id: str, version_id: str | None) -> None:
        """After the change was committed. `version_id`: what counts now; None: nothing. Raises NotWritten."""
        message = change_message(org_id, agent_id, version_id)
        # In this order: who hears of it must not find the old value.
        self._redis.do(lambda client: client.delete(key_of(org_id, agent_id)))
        self._redis.do(lambda client: client.publish(channel_of(org_id), message))

    def fill(self, org_id: str, agent_id: str, value: bytes) -> bool:
        """Whether it was written: False where there is one already. Raises NotWritten."""
        key = key_of(org_id, agent_id)
        return bool(self._redis.do(lambda client: client.set(key, value, ex=REDIS_TTL_S, nx=True)))

    def close(self) -> None:
        self._redis.close()
