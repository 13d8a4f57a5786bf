"""The thread that makes features anew, over a real SQLite store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from extproc.context.reindexing import BATCH, Reindexing
from extproc.memory.embedding import EmbedderUnavailable
from extproc.memory.features import Indexer, Row, open_indexer
from extproc.memory.model import Memory, Namespace
from extproc.memory.sqlite import SqliteMemoryStore

LIMIT_S = 30.0


@pytest.fixture
def org_id(agent: Namespace) -> str:
    return agent.org_id


@pytest.fixture
def store(tmp_path: Path, make: Callable[..., Memory]) -> SqliteMemoryStore:
    """120 memories that nobody has made features of: three batches."""
    opened = SqliteMemoryStore.open(f"sqlite:///{tmp_path}/memories.db", None)
    opened.add_many([make(f"The user's note number {number}.") for number in range(120)])
    return opened


def wait_until_done(store: SqliteMemoryStore, indexer: Indexer, org_id: str, *, only_unmade: bool = False) -> None:
    deadline = time.monotonic() + LIMIT_S
    while store.count_outdated(org_id, indexer.version, only_unmade=only_unmade):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_has_no_features_gets_them(store: SqliteMemoryStore, org_id: str) -> None:
    indexer = open_indexer()
    reindexing = Reindexing(store, lambda: indexer)
    assert store.count_outdated(org_id, indexer.version) == 120
    reindexing.start()
    wait_until_done(store, indexer, org_id)
    reindexing.stop()
    store.close()


def test_an_embedder_that_is_away_is_asked_again(
    store: SqliteMemoryStore, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.context.reindexing.RETRY_S", 0.05)
    indexer = open_indexer()
    attempts = 0

    def open_later() -> Indexer:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise EmbedderUnavailable("away")
        return indexer

    reindexing = Reindexing(store, open_later)
    reindexing.start()
    wait_until_done(store, indexer, org_id)
    reindexing.stop()
    assert attempts == 3
    store.close()


def test_what_writers_leave_is_made_again_and_again_and_engines_hear_of_it(
    store: SqliteMemoryStore, make: Callable[..., Memory], agent: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.context.reindexing.AGAIN_S", 0.02)
    indexer = open_indexer()
    reindexing = Reindexing(store, lambda: indexer, is_left_to_us=True)
    reindexing.start()
    wait_until_done(store, indexer, agent.org_id)
    for number in range(2):
        added = store.current_version(agent.org_id, agent.agent_id).changes + 1
        store.add(make(f"The user's late note {number}."))
        wait_until_done(store, indexer, agent.org_id)
        with store.snapshot(agent) as snapshot:
            (changed,) = snapshot.changed(added, 10)
        assert (changed.memory.content, changed.features.version) == (
            f"The user's late note {number}.",
            indexer.version,
        )
    reindexing.stop()
    store.close()


def test_what_another_release_made_meanwhile_is_left_to_it(
    store: SqliteMemoryStore, org_id: str, make: Callable[..., Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.context.reindexing.AGAIN_S", 0.02)
    indexer = open_indexer()
    reindexing = Reindexing(store, lambda: indexer, is_left_to_us=True)
    reindexing.start()
    wait_until_done(store, indexer, org_id)
    memory = make("The user's note of a later release.")
    store.add(memory)
    wait_until_done(store, indexer, org_id)
    (row,) = [row for batch in _all(store, memory) for row in batch if row.memory.id == memory.id]
    with store._writing() as rows:
        rows.write_features(org_id, {memory.id: replace(row.features, version="later")})
    store.add(make("The user's last note."))
    wait_until_done(store, indexer, org_id, only_unmade=True)
    assert store.count_outdated(org_id, indexer.version) == 1
    reindexing.stop()
    store.close()


def _all(store: SqliteMemoryStore, memory: Memory) -> list[list[Row]]:
    with store.snapshot(Namespace(memory.org_id, memory.agent_id, memory.user_id)) as snapshot:
        return list(snapshot.active())


def test_it_stops_in_the_middle(store: SqliteMemoryStore, org_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.context.reindexing.PAUSE_S", 60.0)
    indexer = open_indexer()
    reindexing = Reindexing(store, lambda: indexer)
    reindexing.start()
    deadline = time.monotonic() + LIMIT_S
    while store.count_outdated(org_id, indexer.version) == 120:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    reindexing.stop()
    assert time.monotonic() - began < 20, "it would have waited a minute"
    assert 0 < store.count_outdated(org_id, indexer.version) < 120
    store.close()


def test_it_stands_aside_while_requests_are_inside(
    store: SqliteMemoryStore, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.context.reindexing.STAND_ASIDE_S", 600.0)
    indexer = open_indexer()
    asked = threading.Semaphore(0)
    is_busy = True

    def look() -> bool:
        asked.release()
        return is_busy

    reindexing = Reindexing(store, lambda: indexer, look)
    reindexing.start()
    for _ in range(20):
        assert asked.acquire(timeout=LIMIT_S)
    assert store.count_outdated(org_id, indexer.version) == 120 - BATCH
    assert REGISTRY.get_sample_value("ibex_engine_memories_to_reindex") == 120 - BATCH
    is_busy = False
    wait_until_done(store, indexer, org_id)
    reindexing.stop()
    assert REGISTRY.get_sample_value("ibex_engine_memories_to_reindex") == 0
    store.close()


def test_requests_without_end_do_not_stop_it(
    store: SqliteMemoryStore, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.context.reindexing.STAND_ASIDE_S", 0.1)
    indexer = open_indexer()
    reindexing = Reindexing(store, lambda: indexer, lambda: True)
    reindexing.start()
    wait_until_done(store, indexer, org_id)
    reindexing.stop()
    store.close()


def test_one_that_never_ran_stops(store: SqliteMemoryStore) -> None:
    Reindexing(store, open_indexer).stop()
    store.close()
