"""The namespaces that this process holds, always as fresh as the store. Belongs to one event loop.

Each request asks the store for a version (microseconds). A partition that is behind is brought up to date in a thread:
the few rows that changed, or all of them. Requests that wait for the same partition share the work, and it goes on when
they have given up.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from extproc.context.retrieve import Document, Index
from extproc.memory.store import Version

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.memory.model import Namespace
    from extproc.memory.store import MemoryStore

__all__ = ["NamespaceCache"]

_log = structlog.get_logger(__name__)

MOST_CHANGES = 256
"""Changed rows that go into a live index, on the event loop: about 1 ms. More of them: build anew, in the thread."""
_BREATH_S = 0.0002
"""Sleep of a loading thread after each batch. Without it the event loop gets the interpreter every 5 ms only."""
_THREADS = 2


T = TypeVar("T")


@dataclass(slots=True)
class _Held:
    index: Index
    version: Version
    counted_bytes: int = 0
    """What the index counts for in the limit."""


class NamespaceCache:
    def __init__(self, store: MemoryStore, limit_bytes: int) -> None:
        """`limit_bytes`: of all indexes together, approximately; what a request waits for is kept whatever its size."""
        self._store = store
        self._approximate_bytes = 0
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[Namespace, _Held] = OrderedDict()
        self._updates: dict[Namespace, asyncio.Task[None]] = {}
        self._needed: dict[Namespace, set[Namespace]] = {}
        """By partition that is updated: all that requests waiting for it need, not to be pushed out by it."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="extproc-memory")

    async def stop(self) -> None:
        """Updates that run are awaited: they end within one load."""
        await asyncio.gather(*self._updates.values(), return_exceptions=True)
        self._threads.shutdown()

    @property
    def approximate_bytes(self) -> int:
        return self._approximate_bytes

    def __len__(self) -> int:
        return len(self._held)

    async def run(self, work: Callable[[], T]) -> T:
        """Blocking work with the store, in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def ready(self, namespace: Namespace) -> Sequence[Index] | None:
        """The indexes of the namespace's partitions, or None when one is not held or not fresh. Raises StoreError."""
        version = self._store.version(namespace.org_id, namespace.agent_id)
        found = []
        for partition in namespace.partitions():
            held = self._held.get(partition)
            if held is None or held.version != version:
                return None
            self._held.move_to_end(partition)
            found.append(held.index)
        return found

    async def wait(self, namespace: Namespace, timeout_s: float) -> Sequence[Index] | None:
        """As `ready`, after at most `timeout_s` of work. None: not ready yet; the work goes on. Raises StoreError."""
        deadline = time.monotonic() + timeout_s
        wanted = self._store.version(namespace.org_id, namespace.agent_id)
        while True:
            behind = [part for part in namespace.partitions() if not self._has(part, wanted)]
            if not behind:
                return [self._held[partition].index for partition in namespace.partitions()]
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            # An update that began before the version was read may end behind it; the second one cannot.
            done, _ = await asyncio.wait({self._update(partition, namespace) for partition in behind}, timeout=left)
            for task in done:
                task.result()

    def _has(self, partition: Namespace, wanted: Version) -> bool:
        held = self._held.get(partition)
        return held is not None and held.version.changes >= wanted.changes

    def _update(self, partition: Namespace, namespace: Namespace) -> asyncio.Task[None]:
        self._needed.setdefault(partition, set()).update(namespace.partitions())
        task = self._updates.get(partition)
        if task is None:
            name = f"update {partition.org_id} {partition.agent_id}"
            task = self._updates[partition] = asyncio.create_task(self._bring_up_to_date(partition), name=name)
            task.add_done_callback(partial(self._updated, partition))
        return task

    def _updated(self, partition: Namespace, task: asyncio.Task[None]) -> None:
        del self._updates[partition], self._needed[partition]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("namespace_not_loaded", org_id=partition.org_id, agent_id=partition.agent_id, error=str(error))

    async def _bring_up_to_date(self, partition: Namespace) -> None:
        held = self._held.get(partition)
        update = await self.run(
            partial(_read, self._store, partition, (held.version, len(held.index)) if held else None)
        )
        if update.whole is not None:
            held = _Held(update.whole, update.version)
        else:
            assert held is not None  # noqa: S101 (a partial update is only read for what is held)
            for document in update.changed:
                held.index.put(document)
            if update.ids is not None:
                held.index.keep_only(update.ids)
            held.version = update.version
        self._keep(partition, held)

    def _keep(self, partition: Namespace, held: _Held) -> None:
        before = self._held.pop(partition, None)
        if before is not None:
            self._approximate_bytes -= before.counted_bytes
        held.counted_bytes = held.index.approximate_bytes
        self._approximate_bytes += held.counted_bytes
        self._held[partition] = held
        for oldest in [one for one in self._held if one not in self._needed[partition]]:
            if self._approximate_bytes <= self._limit_bytes:
                break
            self._approximate_bytes -= self._held.pop(oldest).counted_bytes


@dataclass(frozen=True, slots=True)
class _Update:
    version: Version
    whole: Index | None = None
    """The partition built anew; else what changed since the version that was held:"""
    changed: Sequence[Document] = ()
    ids: set[str] | None = None
    """All that are left, when some were removed."""


def _read(store: MemoryStore, partition: Namespace, held: tuple[Version, int] | None) -> _Update:
    """In a thread. `held`: version and size of what is there already."""
    with store.snapshot(partition) as snapshot:
        if held is not None:
            version, size = held
            changed = snapshot.changed(version.changes, MOST_CHANGES + 1)
            ids = snapshot.ids() if snapshot.version.removals != version.removals else None
            gone = 0 if ids is None else size + len(changed) - len(ids)
            if len(changed) <= MOST_CHANGES and gone <= 2 * MOST_CHANGES:
                return _Update(snapshot.version, changed=[Document.of(memory) for memory in changed], ids=ids)
        index = Index()
        for batch in snapshot.active():
            for memory in batch:
                index.put(Document.of(memory))
            time.sleep(_BREATH_S)
        return _Update(snapshot.version, whole=index)
