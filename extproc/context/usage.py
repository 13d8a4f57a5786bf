"""Counting which memories were used, off the request path: requests add to a dictionary, a task writes it."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import structlog

from extproc.memory.lane import LaneFull
from extproc.memory.store import StoreAway, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.context.cache import NamespaceCache
    from extproc.memory.model import Memory
    from extproc.memory.store import MemoryStore

__all__ = ["RetrievalCounts"]

_log = structlog.get_logger(__name__)

INTERVAL_S = 5.0
MOST_PENDING = 100_000
"""Memories that wait to be counted; more are lost, which shifts a statistic and nothing else."""


class RetrievalCounts:
    def __init__(self, store: MemoryStore, cache: NamespaceCache, on_lost: Callable[[int], None]) -> None:
        self._store = store
        self._cache = cache
        self._on_lost = on_lost
        self._pending: Counter[tuple[str, str]] = Counter()
        self._task: asyncio.Task[None] | None = None

    def add(self, memories: Iterable[Memory]) -> None:
        if len(self._pending) < MOST_PENDING:
            self._pending.update((memory.org_id, memory.id) for memory in memories)
        else:
            self._on_lost(sum(1 for _ in memories))

    def start(self) -> None:
        self._task = asyncio.create_task(self._write_now_and_then(), name="write retrieval counts")

    async def stop(self) -> None:
        """What is pending is written, or lost when the database is away."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self.write()
        if self._pending:
            self._lose(self._pending, "the database is away")

    async def write(self) -> None:
        """What is pending. While the database is away, or many writes wait, it goes on waiting."""
        pending, self._pending = self._pending, Counter()
        if not pending:
            return
        try:
            await self._cache.write(partial(self._store.record_retrievals, pending, datetime.now(UTC)))
        except (StoreAway, LaneFull):
            self._pending.update(pending)
        except StoreError as error:
            self._lose(pending, str(error))

    def _lose(self, pending: Counter[tuple[str, str]], error: str) -> None:
        self._on_lost(pending.total())
        _log.warning("retrieval_counts_lost", memories=len(pending), error=error)

    async def _write_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.write()
