from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typing_extensions import override

from extproc.context import cache as cache_module
from extproc.context import index as index_module
from extproc.context import vectors as vectors_module
from extproc.context.cache import MOST_ASKED, MOST_CHANGES, MOST_LOADS, MOST_WRITES, NamespaceCache
from extproc.context.index import Index
from extproc.memory.embedding import EmbedderUnavailable
from extproc.memory.features import Features, Row, WindowIndexer
from extproc.memory.lane import LaneFull
from extproc.memory.model import Memory, Namespace
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.memory.store import Snapshot, StoreError, Version

from .conftest import Asking

MakeMemory = Callable[..., Memory]
LONG_S = 10.0


class SlowStore(SqliteMemoryStore):
    """Counts its snapshots, and holds or breaks them on demand."""

    snapshots = 0
    is_broken = False
    may_read: threading.Event

    @override
    @contextmanager
    def snapshot(self, partition: Namespace) -> Iterator[Snapshot]:
        self.snapshots += 1
        assert self.may_read.wait(LONG_S)
        if self.is_broken:
            raise StoreError("broken")
        with super().snapshot(partition) as snapshot:
            yield snapshot


@pytest.fixture
def store(tmp_path: Path, indexer: WindowIndexer) -> Iterator[SlowStore]:
    opened = SlowStore.open(f"sqlite:///{tmp_path}/memories.db", indexer)
    assert isinstance(opened, SlowStore)
    opened.may_read = threading.Event()
    opened.may_read.set()
    yield opened
    opened.close()


@pytest.fixture
async def cache(store: SlowStore, indexer: WindowIndexer) -> AsyncIterator[NamespaceCache]:
    made = NamespaceCache(store, indexer, 10_000_000)
    yield made
    store.may_read.set()
    await made.stop()


async def size(cache: NamespaceCache, namespace: Namespace) -> int:
    indexes = cache.ready(namespace) or await cache.wait(namespace, LONG_S)
    assert indexes is not None
    return sum(map(len, indexes))


async def test_a_write_is_in_the_very_next_answer(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    assert await size(cache, agent) == 0
    store.add(memory := make("tea"))
    assert cache.ready(agent) is None
    assert await size(cache, agent) == 1
    store.forget(agent, memory.id)
    assert await size(cache, agent) == 0


async def test_nothing_written_means_nothing_read(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    store.add(memory := make("tea"))
    await size(cache, agent)
    store.record_retrievals({(agent.org_id, memory.id): 1}, memory.created_at)
    assert cache.ready(agent) is not None
    assert store.snapshots == 1


async def test_users_share_the_agents_memories(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    u1, u2 = replace(agent, user_id="u1"), replace(agent, user_id="u2")
    store.add_many([make("tea"), make("coffee", u1)])
    assert [await size(cache, who) for who in (u1, u2, agent)] == [2, 1, 1]
    assert store.snapshots == 3
    first, second = cache.ready(u1), cache.ready(u2)
    assert first is not None
    assert second is not None
    assert first[0] is second[0]


@pytest.mark.parametrize("changes", [1, MOST_CHANGES + 1])
async def test_few_changes_go_into_the_index_and_many_make_a_new_one(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace, changes: int
) -> None:
    store.add_many([make(f"old {n}") for n in range(20)])
    await size(cache, agent)
    before = cache.ready(agent)
    store.add_many([make(f"new {n}") for n in range(changes)])
    assert await size(cache, agent) == 20 + changes
    after = cache.ready(agent)
    assert before is not None
    assert after is not None
    assert (before[0] is after[0]) == (changes == 1)


async def test_a_worn_index_is_loaded_anew_while_it_goes_on_answering(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MOST_DEAD", 2)
    store.add_many([make(f"old {n}") for n in range(8)])
    await size(cache, agent)
    read, may_go_on = store.snapshot, threading.Event()

    @contextmanager
    def paused(partition: Namespace) -> Iterator[Snapshot]:
        with read(partition) as snapshot:
            is_renewal = store.snapshots == 5
            yield snapshot
        assert not is_renewal or may_go_on.wait(LONG_S)

    monkeypatch.setattr(store, "snapshot", paused)
    for n in range(4):
        store.add(make(f"new {n}"))
        assert await size(cache, agent) == 9 + n
    worn = cache.ready(agent)
    assert worn is not None
    assert worn[0].is_worn
    may_go_on.set()
    await cache.settle(agent)
    assert await size(cache, agent) == 12
    new = cache.ready(agent)
    assert new is not None
    assert new[0] is not worn[0]
    assert not new[0].is_worn


async def test_a_load_stands_aside_while_a_request_is_in_the_house(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "GRACE_S", 0.0)
    monkeypatch.setattr(cache_module, "MOST_ASIDE_S", LONG_S)
    store.add_many([make(f"tea {n}") for n in range(100)])
    with cache.hurry():
        assert await cache.wait(agent, 0.2) is None
    assert await size(cache, agent) == 100


async def test_a_load_goes_on_however_many_requests_there_are(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "GRACE_S", 0.0)
    store.add_many([make(f"tea {n}") for n in range(100)])
    with cache.hurry():
        assert await size(cache, agent) == 100


async def test_a_load_that_stands_aside_ends_with_the_cache(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "GRACE_S", 0.0)
    monkeypatch.setattr(cache_module, "MOST_ASIDE_S", 10 * LONG_S)
    store.add_many([make(f"tea {n}") for n in range(100)])
    with cache.hurry():
        assert await cache.wait(agent, 0.2) is None
        async with asyncio.timeout(LONG_S):
            await cache.stop()


async def test_forgetting_very_many_makes_a_new_index(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    store.add_many([make(f"old {n}") for n in range(3 * MOST_CHANGES)])
    assert await size(cache, agent) == 3 * MOST_CHANGES
    store.forget_all(agent)
    store.add(make("new"))
    assert await size(cache, agent) == 1


async def test_requests_share_one_load(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    store.add(make("tea"))
    assert await asyncio.gather(*(size(cache, agent) for _ in range(5))) == [1] * 5
    assert store.snapshots == 1


async def test_at_the_wall_the_answer_is_no_and_the_load_goes_on(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    store.add(make("tea"))
    store.may_read.clear()
    assert await cache.wait(agent, 0.01) is None
    store.may_read.set()
    assert await size(cache, agent) == 1
    assert store.snapshots == 1


async def test_a_request_that_joins_an_older_load_still_gets_the_latest(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    entered, may_go_on = threading.Event(), threading.Event()
    read = store.snapshot

    @contextmanager
    def paused(partition: Namespace) -> Iterator[Snapshot]:
        with read(partition) as snapshot:
            entered.set()
            assert may_go_on.wait(LONG_S)
            yield snapshot

    store.snapshot = paused  # type: ignore[method-assign]
    early = asyncio.create_task(size(cache, agent))
    await asyncio.to_thread(entered.wait, LONG_S)
    store.add(make("tea"))
    late = asyncio.create_task(size(cache, agent))
    await asyncio.sleep(0.01)
    may_go_on.set()
    assert (await early, await late) == (0, 1)


async def test_a_failed_load_is_an_error_for_all_and_the_next_one_tries_again(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    store.add(make("tea"))
    store.is_broken = True
    results = await asyncio.gather(*(size(cache, agent) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [StoreError] * 3
    store.is_broken = False
    assert await size(cache, agent) == 1


async def test_a_cancelled_request_does_not_stop_the_others(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    store.add(make("tea"))
    store.may_read.clear()
    first, second = (asyncio.create_task(size(cache, agent)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    store.may_read.set()
    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


def one_user(asking: Asking, make: MakeMemory) -> int:
    """Bytes of a partition of ten memories."""
    return asking.index(*(make(f"tea {n}") for n in range(10))).nbytes + 200


async def test_the_least_recently_used_makes_room(
    store: SlowStore, make: MakeMemory, agent: Namespace, asking: Asking
) -> None:
    whose = [replace(agent, user_id=f"u{n}") for n in range(4)]
    for one in whose:
        store.add_many([make(f"tea {n}", one) for n in range(10)])
    # The agent's own partition, empty, is the fourth.
    limit = 3 * one_user(asking, make) + Index(agent).nbytes
    cache = NamespaceCache(store, asking.indexer, limit)
    for one in (whose[0], whose[1], whose[0], whose[2], whose[3]):
        assert await size(cache, one) == 10
        assert cache.approximate_bytes <= limit
    assert cache.ready(whose[3]) is not None
    assert cache.ready(whose[1]) is None
    await cache.stop()


async def test_what_one_request_needs_does_not_push_itself_out(
    store: SlowStore, make: MakeMemory, agent: Namespace, asking: Asking
) -> None:
    u1, u2 = replace(agent, user_id="u1"), replace(agent, user_id="u2")
    for one in (agent, u1, u2):
        store.add_many([make(f"tea {n}", one) for n in range(10)])
    cache = NamespaceCache(store, asking.indexer, one_user(asking, make))
    for user, snapshots in ((u1, 2), (u1, 2), (u2, 3), (u2, 3)):
        assert await size(cache, user) == 20
        assert store.snapshots == snapshots
    assert cache.ready(u1) is None
    await cache.stop()


async def test_loads_that_end_after_the_wall_do_not_push_each_other_out(
    store: SlowStore, make: MakeMemory, agent: Namespace, indexer: WindowIndexer
) -> None:
    user = replace(agent, user_id="u1")
    store.add_many([make("tea"), make("tea", user)])
    cache = NamespaceCache(store, indexer, 1)
    store.may_read.clear()
    assert await cache.wait(user, 0.01) is None
    store.may_read.set()
    assert await cache.wait(user, LONG_S) is not None
    assert cache.ready(user) is not None
    await cache.stop()


def contents(indexes: Sequence[Index] | None) -> set[str]:
    assert indexes is not None
    return {index.memory(slot).content for index in indexes for slot in range(index.slots)}


async def test_a_cold_namespace_is_answered_from_candidates_and_loaded_behind(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace, indexer: WindowIndexer
) -> None:
    store.add_many([make("green tea"), make("milk")])
    store.may_read.clear()
    found = await cache.find(agent, indexer.question("my tea"), time.monotonic() + LONG_S)
    assert contents(found) == {"green tea"}
    store.may_read.set()
    whole = await cache.find(agent, indexer.question("my tea"), time.monotonic() + LONG_S)
    assert whole is not None
    assert await size(cache, agent) == 2


async def test_a_large_namespace_that_comes_back_is_answered_from_candidates_at_once(
    store: SlowStore, make: MakeMemory, agent: Namespace, indexer: WindowIndexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LARGE", 2)
    monkeypatch.setattr(cache_module, "GRACE_S", 2 * LONG_S)
    cache = NamespaceCache(store, indexer, 1)
    store.add_many([make("green tea"), make("milk")])
    assert await size(cache, agent) == 2
    assert await size(cache, replace(agent, agent_id=agent.org_id)) == 0  # pushes it out
    store.may_read.clear()
    async with asyncio.timeout(LONG_S):
        found = await cache.find(agent, indexer.question("my tea"), time.monotonic() + 2 * LONG_S)
    assert contents(found) == {"green tea"}
    store.may_read.set()
    await cache.stop()


async def test_features_of_another_indexer_are_made_anew(
    store: SlowStore, make: MakeMemory, agent: Namespace, indexer: WindowIndexer, tmp_path: Path
) -> None:
    bare = SqliteMemoryStore.open(f"sqlite:///{tmp_path}/memories.db")
    turns = [make(text, session_id="s", turn_index=n) for n, text in enumerate(["a harbour", "green tea", "milk"])]
    bare.add_many(turns[:2])
    cache = NamespaceCache(store, indexer, 10_000_000)
    assert await size(cache, agent) == 2
    bare.add(turns[2])
    assert await size(cache, agent) == 3
    bare.close()
    (index,) = cache.ready(agent) or ()
    expected = indexer.features([turns[2]], [turns[:2]])[0]
    slot = next(slot for slot in range(3) if index.memory(slot).content == "milk")
    assert index.vectors is not None
    vector = np.frombuffer(expected.vector, "<f2").astype(np.float32)
    assert index.vectors.cosines(np.array([slot]), vector)[0] > 0.99
    await cache.stop()


async def test_an_index_does_not_change_while_a_thread_reads_it(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
) -> None:
    store.add(make("tea"))
    await size(cache, agent)
    held = cache.ready(agent)
    assert held is not None
    async with cache.reading(held):
        store.add(make("milk"))
        assert await cache.wait(agent, 0.1) is None
        assert len(held[0]) == 1
    assert await size(cache, agent) == 2


async def test_many_vectors_get_lists_behind_the_requests(
    cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "MOST_FLAT", 200)
    monkeypatch.setattr(vectors_module, "FEW_LISTS", 4)
    store.add_many([make(f"tea {n}") for n in range(201)])
    assert await size(cache, agent) == 201
    (index,) = cache.ready(agent) or ()
    before = cache.approximate_bytes
    await cache.settle(agent)
    assert index.vectors is not None
    assert not index.vectors.wants_lists
    assert cache.approximate_bytes > before


class TestWhenMuchIsAsked:
    async def test_loads_of_unknown_namespaces_are_bounded_and_leave_room_for_others(
        self, cache: NamespaceCache, store: SlowStore, make: MakeMemory, agent: Namespace
    ) -> None:
        theirs = Namespace(str(uuid.uuid4()), str(uuid.uuid4()))
        store.add(make("tea", theirs))
        store.may_read.clear()
        for number in range(3 * MOST_LOADS):
            assert await cache.wait(replace(agent, user_id=f"u{number}"), 0.0001) is None
        waiting = asyncio.create_task(size(cache, theirs))
        await asyncio.sleep(0)
        store.may_read.set()
        assert await waiting == 1
        assert await size(cache, agent) == 0
        assert store.snapshots <= MOST_LOADS // 2 + 2

    async def test_what_may_not_be_loaded_now_is_answered_from_candidates(
        self,
        cache: NamespaceCache,
        store: SlowStore,
        make: MakeMemory,
        agent: Namespace,
        indexer: WindowIndexer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(cache_module, "MOST_LOADS", 0)
        store.add(make("green tea"))
        question = indexer.question("What about the green tea?")
        assert contents(await cache.find(agent, question, time.monotonic() + LONG_S)) == {"green tea"}
        assert store.snapshots == 0

    async def test_what_is_held_is_brought_up_to_date_while_large_loads_run(
        self,
        cache: NamespaceCache,
        store: SlowStore,
        make: MakeMemory,
        agent: Namespace,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        store.add(make("tea"))
        assert await size(cache, agent) == 1
        read, may_go_on = store.snapshot, threading.Event()

        @contextmanager
        def paused(partition: Namespace) -> Iterator[Snapshot]:
            assert partition == agent or may_go_on.wait(LONG_S)
            with read(partition) as snapshot:
                yield snapshot

        monkeypatch.setattr(store, "snapshot", paused)
        for _ in range(4):
            assert await cache.wait(Namespace(agent.org_id, str(uuid.uuid4())), 0.001) is None
        store.add(make("milk"))
        assert await size(cache, agent) == 2
        may_go_on.set()

    async def test_versions_that_nobody_waits_for_are_not_asked_for(
        self, cache: NamespaceCache, store: SlowStore, agent: Namespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, may_answer = [], threading.Event()

        def current_version(org_id: str, _agent_id: str) -> Version:
            asked.append(org_id)
            assert may_answer.wait(LONG_S)
            return Version()

        monkeypatch.setattr(store, "version", lambda *_: None)
        monkeypatch.setattr(store, "current_version", current_version)
        for _ in range(20):
            assert await cache.wait(agent, 0.001) is None
        may_answer.set()
        assert await cache.run(lambda: "free") == "free"
        assert len(asked) <= 3

    async def test_a_write_that_waits_keeps_no_reader_waiting(self, cache: NamespaceCache) -> None:
        may_write = threading.Event()
        writes = [asyncio.create_task(cache.write(lambda: may_write.wait(LONG_S))) for _ in range(MOST_WRITES)]
        await asyncio.sleep(0)
        with pytest.raises(LaneFull):
            await cache.write(lambda: None)
        assert await cache.run(lambda: "read") == "read"
        may_write.set()
        assert all(await asyncio.gather(*writes))

    async def test_the_loop_goes_on_while_the_cache_waits_for_its_threads(
        self, store: SlowStore, indexer: WindowIndexer
    ) -> None:
        cache = NamespaceCache(store, indexer, 10_000_000)
        may_end = threading.Event()
        running = asyncio.create_task(cache.run(lambda: may_end.wait(LONG_S)))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, may_end.set)
        await cache.stop()
        assert await running

    async def test_a_store_is_asked_for_the_rarest_words_of_a_long_text(
        self,
        cache: NamespaceCache,
        store: SlowStore,
        agent: Namespace,
        indexer: WindowIndexer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked: list[Sequence[str]] = []
        find = store.candidates

        def candidates(namespace: Namespace, stems: Sequence[str], *given: Any, **more: Any) -> list[Row]:
            asked.append(stems)
            return find(namespace, stems, *given, **more)

        monkeypatch.setattr(store, "candidates", candidates)
        monkeypatch.setattr(cache_module, "MOST_LOADS", 0)
        common = ["water", "house", "school", "music", "summer"]
        letters = "bcdfghjklm"
        rare = [f"zq{one}{two}x" for one in letters for two in letters]
        await cache.find(agent, indexer.question(" ".join([*common, *rare])), time.monotonic() + LONG_S)
        assert [len(stems) for stems in asked] == [MOST_ASKED]
        assert set(asked[0]) <= set(rare)


class TestFeaturesMadeAtLoading:
    @pytest.fixture
    def bare(self, tmp_path: Path, make: MakeMemory, store: SlowStore) -> None:
        """400 memories that nobody has made features of."""
        assert not store.snapshots
        writer = SqliteMemoryStore.open(f"sqlite:///{tmp_path}/memories.db")
        writer.add_many([make(f"tea {n}", session_id="s", turn_index=n) for n in range(400)])
        writer.close()

    @pytest.mark.usefixtures("bare")
    async def test_without_an_embedder_words_are_compared(
        self, store: SlowStore, agent: Namespace, indexer: WindowIndexer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def embed(_texts: Sequence[str]) -> NDArray[np.float32]:
            raise EmbedderUnavailable("away")

        monkeypatch.setattr(indexer, "_embedder", SimpleNamespace(embed=embed))
        cache = NamespaceCache(store, indexer, 10_000_000)
        assert await size(cache, agent) == 400
        (index,) = cache.ready(agent) or ()
        assert index.count("tea") == 400
        await cache.stop()

    @pytest.mark.usefixtures("bare")
    async def test_they_are_made_between_breaths(
        self, store: SlowStore, agent: Namespace, indexer: WindowIndexer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[int] = []
        features = indexer.features

        def counted(memories: Sequence[Memory], before: Sequence[Sequence[Memory]]) -> list[Features]:
            made.append(len(memories))
            if len(made) == 3:
                loading._way.close()
            return features(memories, before)

        monkeypatch.setattr(indexer, "features", counted)
        loading = NamespaceCache(store, indexer, 10_000_000)
        with suppress(cache_module._Stopped):
            await loading.wait(agent, LONG_S)
        await loading.stop()
        assert len(made) == 3
        assert sum(made) < 100
