"""Tells gates in the background: revocations that Redis did not take at once, and all limits once a minute."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import structlog

from extproc.auth.announce import Announcer, NotWritten
from extproc.auth.store import IdentityStore, all_pages
from extproc.memory.lane import Lane, LaneFull
from extproc.memory.store import StoreError

__all__ = ["Gossip", "Heard"]

_LIMITS_INTERVAL_S = 60.0
"""A Redis that lost its memory has all limits again after this."""
_LIMITS_RETRY_S = 5.0
_RETRY_S = 1.0
"""Between two attempts to publish what waits."""
_WORTH_TELLING_S = 300.0
"""The longest that a gate can be set to remember a token (IBEX_TOKEN_CACHE_S): after that nobody needs to hear."""
_MOST_WAITING = 10_000
"""Revocations; of more the oldest are dropped: at that rate somebody revokes everything, and Redis is away."""
_PAGE = 500

_log = structlog.get_logger(__name__)


class Heard(StrEnum):
    """What became of telling the gates."""

    PUBLISHED = "published"
    PENDING = "pending"
    """Redis did not take it; it is tried again for as long as a gate may remember the token."""
    NOWHERE = "nowhere"
    """There is no Redis, by setting: then no gate remembers tokens either, unless it has a Redis that we do not."""


@dataclass(frozen=True, slots=True)
class _Revocation:
    org_id: str
    token_id: str
    revoked_at: datetime
    until: float
    """Monotonic seconds."""


class Gossip:
    """Belongs to one event loop. `announcer`: None where there is no Redis; `database`: the lane of the store."""

    def __init__(self, store: IdentityStore, database: Lane, announcer: Announcer | None) -> None:
        self._store = store
        self._database = database
        self._announcer = announcer
        self._redis = Lane("auth-redis", threads=1, room=_MOST_WAITING)
        self._waiting: dict[str, _Revocation] = {}
        self._has_waiting = asyncio.Event()
        self._is_failing = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        if self._announcer is not None:
            self._tasks = [
                asyncio.create_task(self._tell_waiting(), name="tell revocations"),
                asyncio.create_task(self._tell_limits(self._announcer), name="tell limits"),
            ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        if self._waiting:
            _log.warning(
                "revocations_not_published",
                count=len(self._waiting),
                next="gates that remember these tokens take them until IBEX_TOKEN_CACHE_S has passed",
            )
        self._redis.close()
        if self._announcer is not None:
            self._announcer.close()

    async def revoked(self, org_id: str, token_id: str, revoked_at: datetime) -> Heard:
        """Tell gates now; what Redis does not take is tried again behind. Never raises."""
        if self._announcer is None:
            return Heard.NOWHERE
        one = _Revocation(org_id, token_id, revoked_at, time.monotonic() + _WORTH_TELLING_S)
        if await self._publish(one):
            return Heard.PUBLISHED
        self._waiting[token_id] = one
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.pop(next(iter(self._waiting)))
            _log.warning("revocation_dropped", next="gates may take that token until IBEX_TOKEN_CACHE_S has passed")
        self._has_waiting.set()
        return Heard.PENDING

    async def _publish(self, one: _Revocation) -> bool:
        announcer = self._announcer
        if announcer is None:
            return False
        try:
            await self._redis.run(lambda: announcer.revoked(one.org_id, one.token_id, one.revoked_at))
        except (NotWritten, LaneFull) as error:
            self._failed(str(error) or "too many revocations wait for Redis")
            return False
        except Exception:  # noqa: BLE001 - the token is revoked whatever happens here
            _log.exception("revocation_not_published_by_a_bug")
            return False
        self._succeeded()
        return True

    async def _tell_waiting(self) -> None:
        while True:
            await self._has_waiting.wait()
            for one in list(self._waiting.values()):
                if time.monotonic() < one.until and not await self._publish(one):
                    break
                # Told, or too late to be of use.
                self._waiting.pop(one.token_id, None)
            if self._waiting:
                await asyncio.sleep(_RETRY_S)
            else:
                self._has_waiting.clear()

    async def _tell_limits(self, announcer: Announcer) -> None:
        while True:
            try:
                limits = await self._database.run(self._limits)
                await self._redis.run(lambda limits=limits: announcer.limits(limits))  # type: ignore[misc]
                self._succeeded()
                await asyncio.sleep(_LIMITS_INTERVAL_S)
                continue
            except (NotWritten, LaneFull, StoreError) as error:
                self._failed(str(error) or "the database is busy")
            except Exception:  # noqa: BLE001 - whatever it is, the next attempt comes
                _log.exception("limits_not_published_by_a_bug")
            await asyncio.sleep(_LIMITS_RETRY_S)

    def _limits(self) -> dict[str, int | None]:
        found = all_pages(lambda after: self._store.organizations(_PAGE, after))
        return {organization.id: organization.rpm_limit for organization in found}

    def _failed(self, problem: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            _log.warning(
                "gates_not_told", error=problem, next="tried again; gates that cannot hear do not remember tokens"
            )

    def _succeeded(self) -> None:
        if self._is_failing:
            self._is_failing = False
            _log.info("gates_told_again")
