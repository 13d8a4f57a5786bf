"""The namespaces that this process holds, always as fresh as the store. Belongs to one event loop.

Each request asks the store for a version (microseconds). A partition that is behind is brought up to date in a thread:
the few rows that changed, or all of them. Requests that wait for the same partition share the work, and it goes on when
they have given up. What is not there soon is answered from the candidates that the store itself finds.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import structlog

from extproc.context.index import Index
from extproc.memory.features import MOST_OF_TURNS, Row, asked_date_stems, turn_of, window
from extproc.memory.store import StoreError, Version
from extproc.memory.text import Moment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from extproc.memory.features import Indexer, Question
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.store import MemoryStore, Snapshot

__all__ = ["NamespaceCache", "load_index"]

_log = structlog.get_logger(__name__)

MOST_CHANGES = 256
"""Changed rows that go into a live index, on the event loop: some milliseconds. More: build anew, in the thread."""
GRACE_S = 0.005
"""For a small namespace to be loaded, before the store is asked for candidates."""
COLD_CANDIDATES = 32
"""Of each source, half as many as of a loaded namespace: reading their rows is most of a cold answer's time."""
LEAST_COLD = 0.002
"""Seconds before the deadline that scoring takes; what comes later comes too late."""
_BREATH_S = 0.0002
"""Sleep of a loading thread after each batch, for the event loop to get the interpreter."""
_MOST_BREATHS = 200
"""While a request waits for candidates, the loading threads stand aside between two batches: 40 ms, beyond any wall."""
_THREADS = 4
"""Two for loads, and as many for what a request waits for."""


T = TypeVar("T")


@dataclass(slots=True)
class _Held:
    index: Index
    version: Version
    counted_bytes: int = 0
    """What the index counts for in the limit."""
    readers: int = 0
    """Threads that search it: it must not change meanwhile."""
    is_idle: asyncio.Event = field(default_factory=asyncio.Event)
    lists: asyncio.Task[None] | None = None


class NamespaceCache:
    def __init__(self, store: MemoryStore, indexer: Indexer, limit_bytes: int) -> None:
        """`limit_bytes`: of all indexes together, approximately; what a request waits for is kept whatever its size."""
        self._store = store
        self._indexer = indexer
        self._approximate_bytes = 0
        self._limit_bytes = limit_bytes
        self._hurried = 0
        """Requests that wait for candidates."""
        self._held: OrderedDict[Namespace, _Held] = OrderedDict()
        self._updates: dict[Namespace, asyncio.Task[None]] = {}
        self._needed: dict[Namespace, set[Namespace]] = {}
        """By partition that is updated: all that requests waiting for it need, not to be pushed out by it."""
        self._loads = ThreadPoolExecutor(_THREADS // 2, thread_name_prefix="extproc-load")
        self._threads = ThreadPoolExecutor(_THREADS // 2, thread_name_prefix="extproc-memory")
        self._builds = ThreadPoolExecutor(1, thread_name_prefix="extproc-lists")

    async def stop(self) -> None:
        """Updates that run are awaited: they end within one load. Those that have not begun are dropped."""
        self._loads.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*self._updates.values(), return_exceptions=True)
        builds = [held.lists for held in self._held.values() if held.lists is not None]
        for build in builds:
            build.cancel()
        await asyncio.gather(*builds, return_exceptions=True)
        for threads in (self._threads, self._builds):
            threads.shutdown(cancel_futures=True)

    @property
    def approximate_bytes(self) -> int:
        return self._approximate_bytes

    def __len__(self) -> int:
        return len(self._held)

    async def run(self, work: Callable[[], T]) -> T:
        """Blocking work for a request, in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def find(self, namespace: Namespace, question: Question, deadline: float) -> Sequence[Index] | None:
        """What a question needs, before `deadline` (of `time.monotonic`): the namespace, or its candidates.

        None: neither is there yet; the namespace goes on being loaded. Raises StoreError.
        """
        found = self.ready(namespace)
        if found is not None:
            return found
        load = asyncio.ensure_future(self.whole(namespace, deadline))
        try:
            await asyncio.wait({load}, timeout=min(GRACE_S, max(0.0, deadline - time.monotonic())))
            if load.done() or not question.query.stems:
                return await load
            self._hurried += 1
            candidates = asyncio.ensure_future(self.run(partial(self._candidates, namespace, question)))
            candidates.add_done_callback(self._unhurry)
            left = max(0.0, deadline - LEAST_COLD - time.monotonic())
            done, _ = await asyncio.wait({load, candidates}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if load in done:
                candidates.add_done_callback(_forget)
                return load.result()
            if candidates in done:
                index = candidates.result()
                if not len(index):  # the store finds nothing that it has no features of yet; the load makes them
                    await asyncio.wait({load}, timeout=max(0.0, deadline - LEAST_COLD - time.monotonic()))
                return load.result() if load.done() else [index]
            candidates.add_done_callback(_forget)
            return None
        finally:
            if not load.done():
                load.cancel()

    def _unhurry(self, _: object) -> None:
        self._hurried -= 1

    def _breathe(self) -> None:
        """In a loading thread."""
        for _ in range(_MOST_BREATHS):
            time.sleep(_BREATH_S)
            if not self._hurried:
                return

    async def whole(self, namespace: Namespace, deadline: float) -> Sequence[Index] | None:
        """The namespace, before `deadline`. None: not loaded yet; that goes on. Raises StoreError."""
        return self.ready(namespace) or await self.wait(namespace, deadline - time.monotonic())

    @asynccontextmanager
    async def reading(self, indexes: Sequence[Index]) -> AsyncIterator[None]:
        """While a thread searches the indexes, they do not change."""
        held = [one for one in (self._held.get(index.partition) for index in indexes) if one and one.index in indexes]
        for one in held:
            one.readers += 1
            one.is_idle.clear()
        try:
            yield
        finally:
            for one in held:
                one.readers -= 1
                if not one.readers:
                    one.is_idle.set()

    async def settle(self, namespace: Namespace) -> None:
        """Wait until nothing is made behind the requests of a namespace that is loaded."""
        made = [held.lists for part in namespace.partitions() if (held := self._held.get(part)) and held.lists]
        await asyncio.gather(*made)

    def ready(self, namespace: Namespace) -> Sequence[Index] | None:
        """The indexes of the namespace's partitions, or None when one is not held or not fresh. Raises StoreError."""
        version = self._store.version(namespace.org_id, namespace.agent_id)
        if version is None:
            return None
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
        if wanted is None:
            ask = partial(self._store.current_version, namespace.org_id, namespace.agent_id)
            asked = asyncio.ensure_future(self.run(ask))
            await asyncio.wait({asked}, timeout=max(0.0, timeout_s))
            if not asked.done():
                asked.add_done_callback(_forget)
                return None
            wanted = asked.result()
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
        before = (held.version, held.index) if held else None
        work = partial(_read, self._store, self._indexer, partition, before, self._breathe)
        update = await asyncio.get_running_loop().run_in_executor(self._loads, work)
        if update.whole is not None:
            held = _Held(update.whole, update.version)
        else:
            assert held is not None  # noqa: S101 (a partial update is only read for what is held)
            while held.readers:
                await held.is_idle.wait()
            held.index.update(update.changed)
            if update.ids is not None:
                held.index.keep_only(update.ids)
            held.version = update.version
        self._keep(partition, held)
        vectors = held.index.vectors
        if vectors is not None and vectors.wants_lists and held.lists is None:
            held.lists = asyncio.create_task(self._make_lists(partition, held), name="make vector lists")

    async def _make_lists(self, partition: Namespace, held: _Held) -> None:
        """Behind the requests, which compare with every vector until it is done."""
        vectors = held.index.vectors
        assert vectors is not None  # noqa: S101 (the caller looked)
        loop = asyncio.get_running_loop()
        async with self.reading([held.index]):
            codes = await loop.run_in_executor(self._builds, vectors.copied)
        vectors.use(await loop.run_in_executor(self._builds, partial(vectors.prepared, codes)))
        if self._held.get(partition) is held:
            self._keep(partition, held)

    def _candidates(self, namespace: Namespace, question: Question) -> Index:
        """In a thread: what the store itself finds, as a small index of its own. Raises StoreError."""
        query = question.query
        vector = None if question.vector is None else question.vector.astype("<f2").tobytes()
        rows = self._store.candidates(
            namespace,
            list(query.stems),
            vector,
            COLD_CANDIDATES,
            with_superseded=query.moment is Moment.PAST or bool(asked_date_stems(query)),
        )
        return Index(namespace, _current(rows, self._indexer))

    def _keep(self, partition: Namespace, held: _Held) -> None:
        before = self._held.pop(partition, None)
        if before is not None:
            self._approximate_bytes -= before.counted_bytes
        held.counted_bytes = held.index.nbytes
        self._approximate_bytes += held.counted_bytes
        self._held[partition] = held
        for oldest in [one for one in self._held if one not in self._needed.get(partition, {partition})]:
            if self._approximate_bytes <= self._limit_bytes:
                break
            self._approximate_bytes -= self._held.pop(oldest).counted_bytes


@dataclass(frozen=True, slots=True)
class _Update:
    version: Version
    whole: Index | None = None
    """The partition built anew; else what changed since the version that was held:"""
    changed: Sequence[Row] = ()
    ids: set[str] | None = None
    """All that are left, when some were removed."""


def _read(
    store: MemoryStore,
    indexer: Indexer,
    partition: Namespace,
    held: tuple[Version, Index] | None,
    breathe: Callable[[], None],
) -> _Update:
    """In a thread. `held`: version and index of what is there already; nobody else changes it meanwhile."""
    with store.snapshot(partition) as snapshot:
        if held is not None and not held[1].is_worn:
            version, before = held
            changed = snapshot.changed(version.changes, MOST_CHANGES + 1)
            ids = snapshot.ids() if snapshot.version.removals != version.removals else None
            gone = 0 if ids is None else len(before) + len(changed) - len(ids)
            if len(changed) <= MOST_CHANGES and gone <= 2 * MOST_CHANGES:
                return _Update(snapshot.version, changed=_current(changed, indexer, before), ids=ids)
        return _Update(snapshot.version, whole=_loaded(snapshot, indexer, partition, breathe))


def load_index(store: MemoryStore, indexer: Indexer, partition: Namespace) -> Index:
    """What an engine would hold. Blocks. Raises StoreError."""
    with store.snapshot(partition) as snapshot:
        return _loaded(snapshot, indexer, partition, lambda: None)


def _loaded(snapshot: Snapshot, indexer: Indexer, partition: Namespace, breathe: Callable[[], None]) -> Index:
    index = Index(partition)
    index.load(_batches(snapshot.active(with_superseded=True), indexer), breathe)
    return index


def _batches(batches: Iterator[list[Row]], indexer: Indexer) -> Iterator[Sequence[Row]]:
    """The rows with features of this engine's indexer. Others are made anew, last, when all predecessors are known."""
    outdated: list[Row] = []
    current: list[Row] = []
    for batch in batches:
        fresh = [row for row in batch if row.features.version == indexer.version]
        if len(fresh) < len(batch):
            outdated += [row for row in batch if row.features.version != indexer.version]
        if outdated:
            current += fresh
        yield fresh
    if outdated:
        sessions = {row.memory.session_id for row in outdated}
        known = [row for row in current if row.memory.session_id in sessions and row.memory.session_id]
        made = _current([*outdated, *known], indexer)
        for first in range(0, len(outdated), MOST_CHANGES):
            yield made[first : min(first + MOST_CHANGES, len(outdated))]


def _current(rows: Sequence[Row], indexer: Indexer, index: Index | None = None) -> list[Row]:
    """The rows in order, with features of this indexer. `index`: where predecessors are that are not among them."""
    outdated = {row.memory.id for row in rows if row.features.version != indexer.version}
    if not outdated:
        return list(rows)

    ordered = sorted((row.memory for row in rows), key=lambda memory: (memory.session_id or "", turn_of(memory)))
    wanted: list[Memory] = []
    before: list[Sequence[Memory]] = []
    for session, group in groupby(ordered, key=lambda memory: memory.session_id):
        earlier: list[Memory] = []
        for memory in group:
            if memory.id in outdated:
                wanted.append(memory)
                known = earlier[-MOST_OF_TURNS:] if session else []
                if index is not None and session:
                    known = [*index.before(memory, MOST_OF_TURNS), *known]
                before.append(window(memory, known))
            earlier.append(memory)
    made = dict(zip([memory.id for memory in wanted], indexer.features(wanted, before), strict=True))
    return [Row(row.memory, made.get(row.memory.id, row.features)) for row in rows]


def _forget(task: asyncio.Future[Index] | asyncio.Future[Version]) -> None:
    """Nobody waits for it any more; its failure is no news."""
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, StoreError):
        _log.warning("late_answer_failed", error=type(error).__name__)
