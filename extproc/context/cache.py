"""The namespaces that this process holds, always as fresh as the store. Belongs to one event loop.

Each request asks the store for a version (microseconds). A partition that is behind is brought up to date in a thread:
the few rows that changed, or all of them. Requests that wait for the same partition share the work, and it goes on when
they have given up. What is not there soon is answered from the candidates that the store itself finds. Requests go
first: while one is in the house, what has been loading for a while stands aside.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import structlog

from extproc.context.index import Index
from extproc.memory.embedding import EmbedderUnavailable
from extproc.memory.features import MOST_OF_TURNS, Row, asked_date_stems, by_turn, window
from extproc.memory.lane import Lane
from extproc.memory.store import StoreAway, StoreError, Version
from extproc.memory.text import Moment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
    from contextlib import AbstractContextManager

    from extproc.memory.features import Indexer, Question
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.store import MemoryStore, Snapshot

__all__ = ["NamespaceCache", "load_index"]

_log = structlog.get_logger(__name__)

MOST_CHANGES = 256
"""Changed rows that go into a live index, on the event loop: some milliseconds. More: build anew, in the thread.
An index that many such changes have worn (`Index.is_worn`) is loaded anew too, without a request waiting for it."""
GRACE_S = 0.005
"""For a small namespace to be loaded, before the store is asked for candidates and the load stands aside."""
LARGE = 1_000
"""Memories from which on a load takes longer than that. When such a partition is pushed out and asked for again, the
store is asked for candidates at once."""
_MOST_LARGE = 100_000  # names of partitions, about 200 bytes each
COLD_CANDIDATES = 24
"""Of each source, about a third of a loaded namespace's: reading their rows is most of a cold answer's time."""
LEAST_COLD = 0.004
"""Seconds before the deadline that scoring takes; what comes later comes too late."""
MOST_ASIDE_S = 0.01
"""For which a load stands aside after a batch, about 1 ms of work: it gets a tenth of the CPU when requests never stop,
and ends."""
_MADE_AT_ONCE = 16
"""Memories whose features are made between two breaths."""
_BREATH_S = 0.0002
"""Sleep of a loading thread after each batch even when nobody is there, for the event loop to hear who comes."""
_THREADS = 2
"""For loads, and as many for what a request waits for."""
MOST_LOADS = 128
"""Namespaces that wait to be loaded or brought up to date: a second's work, when they are small. Beyond that, and of
one organisation beyond half of it, a load is not begun: a request gets candidates, and the next one asks again."""
MOST_WRITES = 64
"""Writes that wait or run."""
MOST_ASKED = 64
"""Stems that the store is asked for, the rarest by the word table: on SQLite each is looked up in every 16,384 rows."""


T = TypeVar("T")


@dataclass(slots=True)
class _Held:
    index: Index
    version: Version
    counted_bytes: int = 0
    """What the index counts for in the limit."""
    lists: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Readers:
    count: int = 0
    are_gone: asyncio.Event = field(default_factory=asyncio.Event)


class _Stopped(Exception):
    """Nobody waits for the load any more."""


class _Way:
    """Who goes first: requests on the event loop, or loads in their threads. Python runs one of them at a time."""

    def __init__(self) -> None:
        self._requests = 0
        self._is_free = threading.Event()
        self._is_free.set()
        self._is_closed = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """By a request."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """By a request that waits for a load."""
        self._add(-1)
        try:
            yield
        finally:
            self._add(1)

    def close(self) -> None:
        """Loads end."""
        self._is_closed = True
        self._is_free.set()

    def breath(self, grace_s: float) -> Callable[[], None]:
        """For a load to call after each batch, in its thread; from `grace_s` on it stands aside. Raises _Stopped."""
        until: float | None = None

        def breathe() -> None:
            nonlocal until
            time.sleep(_BREATH_S)
            if until is None:
                until = time.monotonic() + grace_s
            if time.monotonic() >= until:
                self._is_free.wait(MOST_ASIDE_S)
            if self._is_closed:
                raise _Stopped

        return breathe

    def _add(self, requests: int) -> None:
        self._requests += requests
        if self._requests:
            self._is_free.clear()
        else:
            self._is_free.set()


class NamespaceCache:
    def __init__(
        self,
        store: MemoryStore,
        indexer: Indexer,
        limit_bytes: int,
        on_held_back: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit_bytes`: of all indexes together, approximately; what a request waits for is kept whatever its size.
        `on_held_back` is told of each load that is not begun because too many wait."""
        self._store = store
        self._on_held_back = on_held_back
        self._indexer = indexer
        self._approximate_bytes = 0
        self._limit_bytes = limit_bytes
        self._way = _Way()
        self._held: OrderedDict[Namespace, _Held] = OrderedDict()
        self._updates: dict[Namespace, asyncio.Task[None]] = {}
        self._needed: dict[Namespace, set[Namespace]] = {}
        """By partition that is updated: all that requests waiting for it need, not to be pushed out by it."""
        self._large: set[Namespace] = set()
        """Partitions that have been held and were LARGE."""
        self._renewals: dict[Namespace, asyncio.Task[None]] = {}
        self._readers: dict[Index, _Readers] = {}
        """Whoever searches an index, which must not change meanwhile; it may have made room since it was found."""
        self._loads = ThreadPoolExecutor(_THREADS, thread_name_prefix="extproc-load")
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="extproc-changes")
        """What is held and only behind does not wait for large loads."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="extproc-memory")
        self._builds = ThreadPoolExecutor(1, thread_name_prefix="extproc-lists")
        self._writes = Lane("extproc-write", 1, MOST_WRITES)

    async def stop(self) -> None:
        """Loads end with the batch that they are at, and are awaited. Those that have not begun are dropped."""
        self._way.close()
        self._writes.close()
        for threads in (self._loads, self._changes):
            threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*self._updates.values(), *self._renewals.values(), return_exceptions=True)
        builds = [held.lists for held in self._held.values() if held.lists is not None]
        for build in builds:
            build.cancel()
        await asyncio.gather(*builds, return_exceptions=True)
        # Not on the event loop: a statement, or a step of building lists, may take seconds.
        await asyncio.gather(
            *(asyncio.to_thread(threads.shutdown, cancel_futures=True) for threads in (self._threads, self._builds))
        )

    @property
    def approximate_bytes(self) -> int:
        return self._approximate_bytes

    def __len__(self) -> int:
        return len(self._held)

    async def run(self, work: Callable[[], T]) -> T:
        """Blocking work for a request, in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def write(self, work: Callable[[], T]) -> T:
        """A write, in a thread of its own: what waits for another writer keeps no reader waiting. Raises LaneFull."""
        return await self._writes.run(work)

    async def find(self, namespace: Namespace, question: Question, deadline: float) -> Sequence[Index] | None:
        """What a question needs, before `deadline` (of `time.monotonic`): the namespace, or its candidates.

        None: neither is there yet; the namespace goes on being loaded. Raises StoreError.
        """
        found = self.ready(namespace)
        if found is not None:
            return found
        missing = [part for part in namespace.partitions() if part not in self._held]
        is_large = any(part in self._large or part in self._updates for part in missing)
        load = asyncio.ensure_future(self.whole(namespace, deadline))
        looking: asyncio.Future[Index] | None = None
        try:
            if not is_large:
                await asyncio.wait({load}, timeout=min(GRACE_S, _left(deadline)))
            if (whole := _whole(load)) is not None:
                return whole
            candidates = None
            if question.query.stems:
                looking = asyncio.ensure_future(self.run(partial(self._candidates, namespace, question)))
                looking.add_done_callback(_forget)
                racing = {looking} if load.done() else {load, looking}
                await asyncio.wait(racing, timeout=_left(deadline), return_when=asyncio.FIRST_COMPLETED)
                if (whole := _whole(load)) is not None:
                    return whole
                if not looking.done():
                    return None
                candidates = [looking.result()]
            if candidates is None or not len(candidates[0]):
                # The store finds nothing that it has no features of yet; the load makes them.
                with self._way.lent():
                    await asyncio.wait({load}, timeout=_left(deadline))
            return _whole(load) or candidates
        finally:
            if not load.done():
                load.cancel()
            if looking is not None and not looking.done():
                looking.cancel()  # if no thread has begun it yet, none will

    def hurry(self) -> AbstractContextManager[None]:
        """While a request is in the house, loads stand aside."""
        return self._way.taken()

    async def whole(self, namespace: Namespace, deadline: float) -> Sequence[Index] | None:
        """The namespace, before `deadline`. None: not loaded yet; that goes on. Raises StoreError."""
        return self.ready(namespace) or await self.wait(namespace, deadline - time.monotonic())

    @asynccontextmanager
    async def reading(self, indexes: Sequence[Index]) -> AsyncIterator[None]:
        """While a thread searches the indexes, they do not change."""
        for index in indexes:
            self._readers.setdefault(index, _Readers()).count += 1
        try:
            yield
        finally:
            for index in indexes:
                readers = self._readers[index]
                readers.count -= 1
                if not readers.count:
                    self._readers.pop(index).are_gone.set()

    async def settle(self, namespace: Namespace) -> None:
        """Wait until nothing is made behind the requests of a namespace that is loaded."""
        renewals = [renewal for part in namespace.partitions() if (renewal := self._renewals.get(part))]
        await asyncio.gather(*renewals, return_exceptions=True)
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
        """As `ready`, after at most `timeout_s` of work. None: not ready yet; the work goes on, or is not begun while
        MOST_LOADS wait. Raises StoreError."""
        deadline = time.monotonic() + timeout_s
        wanted = self._store.version(namespace.org_id, namespace.agent_id)
        if wanted is None:
            ask = partial(self._store.current_version, namespace.org_id, namespace.agent_id)
            asked = asyncio.ensure_future(self.run(ask))
            asked.add_done_callback(_forget)
            try:
                await asyncio.wait({asked}, timeout=max(0.0, timeout_s))
                if not asked.done():
                    return None
                wanted = asked.result()
            finally:
                asked.cancel()  # if no thread has begun it yet, none will
        while True:
            behind = [part for part in namespace.partitions() if not self._has(part, wanted)]
            if not behind:
                return [self._held[partition].index for partition in namespace.partitions()]
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            # An update that began before the version was read may end behind it; the second one cannot.
            updates = {task for partition in behind if (task := self._update(partition, namespace)) is not None}
            if len(updates) < len(behind):
                return None
            done, _ = await asyncio.wait(updates, timeout=left)
            for task in done:
                task.result()

    def _has(self, partition: Namespace, wanted: Version) -> bool:
        held = self._held.get(partition)
        return held is not None and held.version.changes >= wanted.changes

    def _update(self, partition: Namespace, namespace: Namespace) -> asyncio.Task[None] | None:
        """None: too many wait already."""
        task = self._updates.get(partition)
        if task is None and not self._has_room(partition.org_id):
            self._on_held_back()
            return None
        self._needed.setdefault(partition, set()).update(namespace.partitions())
        if task is None:
            task = self._updates[partition] = _task("update", partition, self._bring_up_to_date(partition))
            task.add_done_callback(partial(self._updated, partition))
        return task

    def _has_room(self, org_id: str) -> bool:
        mine = sum(one.org_id == org_id for one in self._updates)
        return len(self._updates) < MOST_LOADS and mine < MOST_LOADS // 2

    def _updated(self, partition: Namespace, task: asyncio.Task[None]) -> None:
        del self._updates[partition], self._needed[partition]
        _log_failure(partition, task)

    def _renewed(self, partition: Namespace, task: asyncio.Task[None]) -> None:
        del self._renewals[partition]
        _log_failure(partition, task)

    async def _bring_up_to_date(self, partition: Namespace) -> None:
        held = self._held.get(partition)
        before = (held.version, held.index) if held else None
        breathe = self._way.breath(0.0 if partition in self._large else GRACE_S)
        work = partial(_read, self._store, self._indexer, partition, before, breathe)
        threads = self._loads if before is None else self._changes
        update = await asyncio.get_running_loop().run_in_executor(threads, work)
        if update.whole is not None:
            held = _Held(update.whole, update.version)
        else:
            assert held is not None  # noqa: S101 (a partial update is only read for what is held)
            while (readers := self._readers.get(held.index)) is not None:
                await readers.are_gone.wait()
            held.index.update(update.changed)
            if update.ids is not None:
                held.index.keep_only(update.ids)
            held.version = update.version
        self._keep(partition, held)
        if held.index.is_worn and partition not in self._renewals:
            task = self._renewals[partition] = _task("renew", partition, self._renew(partition, held))
            task.add_done_callback(partial(self._renewed, partition))

    async def _renew(self, partition: Namespace, worn: _Held) -> None:
        """Load anew behind the requests, which go on with the worn index and its updates."""
        work = partial(_read, self._store, self._indexer, partition, None, self._way.breath(0.0))
        update = await asyncio.get_running_loop().run_in_executor(self._loads, work)
        while (under_way := self._updates.get(partition)) is not None:
            await asyncio.wait({under_way})  # it changes the worn index, and then holds that
        if self._held.get(partition) is worn and update.whole is not None:
            # What was written meanwhile is missing there; the version says so.
            self._keep(partition, _Held(update.whole, update.version))

    async def _make_lists(self, partition: Namespace, held: _Held) -> None:
        """Behind the requests, which compare with every vector until it is done."""
        vectors = held.index.vectors
        assert vectors is not None  # noqa: S101 (the caller looked)
        loop = asyncio.get_running_loop()
        async with self.reading([held.index]):
            codes = await loop.run_in_executor(self._builds, vectors.copied)
        breathe = self._way.breath(0.0)
        vectors.use(await loop.run_in_executor(self._builds, partial(vectors.prepared, codes, breathe)))
        if self._held.get(partition) is held:
            self._keep(partition, held)

    def _candidates(self, namespace: Namespace, question: Question) -> Index:
        """In a thread: what the store itself finds, as a small index of its own. Raises StoreError."""
        query = question.query
        vector = None if question.vector is None else question.vector.astype("<f2").tobytes()
        rows = self._store.candidates(
            namespace,
            _rarest(question),
            vector,
            COLD_CANDIDATES,
            with_superseded=query.moment is Moment.PAST or bool(asked_date_stems(query)),
        )
        return Index(namespace, _current(rows, self._indexer))

    def _keep(self, partition: Namespace, held: _Held) -> None:
        if len(held.index) >= LARGE and len(self._large) < _MOST_LARGE:
            self._large.add(partition)
        before = self._held.pop(partition, None)
        if before is not None:
            self._approximate_bytes -= before.counted_bytes
        held.counted_bytes = held.index.nbytes
        self._approximate_bytes += held.counted_bytes
        self._held[partition] = held
        vectors = held.index.vectors
        if vectors is not None and vectors.wants_lists and held.lists is None:
            held.lists = asyncio.create_task(self._make_lists(partition, held), name="make vector lists")
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
        if held is not None:
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
        left = _with_predecessors([*outdated, *known], {row.memory.id for row in outdated})
        while some := list(islice(left, _MADE_AT_ONCE)):
            yield _made(some, indexer)


def _current(rows: Sequence[Row], indexer: Indexer, index: Index | None = None) -> list[Row]:
    """The rows in order, with features of this indexer. `index`: where predecessors are that are not among them."""
    outdated = {row.memory.id for row in rows if row.features.version != indexer.version}
    if not outdated:
        return list(rows)
    made = {row.memory.id: row for row in _made(list(_with_predecessors(rows, outdated, index)), indexer)}
    return [made.get(row.memory.id, row) for row in rows]


def _made(these: Sequence[tuple[Memory, Sequence[Memory]]], indexer: Indexer) -> list[Row]:
    """`these`: memories with their predecessors."""
    wanted = [memory for memory, _ in these]
    try:
        features = indexer.features(wanted, [before for _, before in these])
    except EmbedderUnavailable:
        features = indexer.without_vectors(wanted)  # until the namespace is loaded anew
    return list(map(Row, wanted, features))


def _with_predecessors(
    rows: Sequence[Row], wanted: set[str], index: Index | None = None
) -> Iterator[tuple[Memory, Sequence[Memory]]]:
    """Those of the rows that are wanted, by id. `index`: where predecessors are that are not among the rows."""
    ordered = sorted((row.memory for row in rows), key=lambda memory: (memory.session_id or "", by_turn(memory)))
    for session, group in groupby(ordered, key=lambda memory: memory.session_id):
        earlier: list[Memory] = []
        for memory in group:
            if memory.id in wanted:
                known = earlier[-MOST_OF_TURNS:] if session else []
                if index is not None and session:
                    known = [*index.before(memory, MOST_OF_TURNS), *known]
                yield memory, window(memory, known)
            earlier.append(memory)


def _rarest(question: Question) -> list[str]:
    """Of its stems those to ask a store for: words that the table does not know, then by their place in it."""
    stems = question.query.stems
    if len(stems) <= MOST_ASKED:
        return list(stems)
    words = question.ids
    rarity = np.where(words < 0, np.iinfo(words.dtype).max, words)
    return [stems[place] for place in np.argsort(-rarity, kind="stable")[:MOST_ASKED]]


def _whole(load: asyncio.Future[Sequence[Index] | None]) -> Sequence[Index] | None:
    """What it gave, as far as it is done. Raises what it raised."""
    return load.result() if load.done() else None


def _left(deadline: float) -> float:
    """Seconds for what must then still be scored."""
    return max(0.0, deadline - LEAST_COLD - time.monotonic())


def _task(what: str, partition: Namespace, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(work, name=f"{what} {partition.org_id} {partition.agent_id}")


def _log_failure(partition: Namespace, task: asyncio.Task[None]) -> None:
    if task.cancelled() or (error := task.exception()) is None or isinstance(error, (_Stopped, StoreAway)):
        return  # a store says once that it is away, and not every load
    _log.warning("namespace_not_loaded", org_id=partition.org_id, agent_id=partition.agent_id, error=str(error))


def _forget(task: asyncio.Future[Index] | asyncio.Future[Version]) -> None:
    """Nobody waits for it any more; its failure is no news."""
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, StoreError):
        _log.warning("late_answer_failed", error=type(error).__name__)
