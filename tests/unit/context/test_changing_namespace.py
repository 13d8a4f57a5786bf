"""A namespace that is written to while it is asked about, on a real store: every answer is of one moment."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from extproc.context import cache as cache_module
from extproc.context import index as index_module
from extproc.context.cache import NamespaceCache
from extproc.context.engine import Engine, Outcome, Request
from extproc.memory.features import WindowIndexer
from extproc.memory.model import Memory, Namespace, Status
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.settings import EngineSettings, load

from .conftest import NOON

MakeMemory = Callable[..., Memory]
LONG_S = 20.0
ROUNDS = 25
READERS = 2


class Shelf:
    """Boxes of two memories each, which come in one transaction; one thread writes, and notes what it has done."""

    def __init__(self, store: SqliteMemoryStore, make: MakeMemory, whose: Namespace, seed: int) -> None:
        self._store = store
        self._make = make
        self._whose = whose
        self._chance = random.Random(seed)
        self._made = 0
        self.is_done = False
        self.lock = threading.Lock()
        """Around notes, so that a reader copies all of them or none."""
        self.whole: dict[int, set[str]] = {}
        """By number, the ids of the boxes of which nothing has been taken."""
        self.gone: set[str] = set()
        """Ids whose `forget` or `revise` has returned."""

    def write(self) -> None:
        try:
            for _ in range(ROUNDS):
                self._chance.choice([self._add, self._add, self._forget, self._supersede])()
        finally:
            self.is_done = True

    def _add(self) -> None:
        number = self._made = self._made + 1
        box = [
            self._make(f"The {side} half of box{number} is green.", self._whose, session_id="s", turn_index=number)
            for side in ("left", "right")
        ]
        self._store.add_many(box)
        with self.lock:
            self.whole[number] = {one.id for one in box}

    def _taken(self) -> str | None:
        """An id of a box, which is from now on not whole."""
        with self.lock:
            if not self.whole:
                return None
            return self.whole.pop(self._chance.choice(list(self.whole))).pop()

    def _forget(self) -> None:
        if (memory_id := self._taken()) is not None:
            assert self._store.forget(self._whose, memory_id)
            with self.lock:
                self.gone.add(memory_id)

    def _supersede(self) -> None:
        if (memory_id := self._taken()) is not None:
            old = self._store.get(self._whose, memory_id)
            assert old is not None
            over = replace(old, status=Status.SUPERSEDED, valid_until=NOON - timedelta(days=1))
            self._store.transact(old.org_id, lambda rows: rows.revise(self._whose, [over], NOON))
            with self.lock:
                self.gone.add(memory_id)


@pytest.fixture
def store(tmp_path: Path, indexer: WindowIndexer) -> Iterator[SqliteMemoryStore]:
    opened = SqliteMemoryStore.open(f"sqlite:///{tmp_path}/memories.db", indexer)
    yield opened
    opened.close()


@pytest.fixture(params=[1, 10_000_000], ids=["no-room", "room"])
async def cache(
    request: pytest.FixtureRequest, store: SqliteMemoryStore, indexer: WindowIndexer
) -> AsyncIterator[NamespaceCache]:
    """Without room each user's partition is pushed out by the other's."""
    made = NamespaceCache(store, indexer, request.param)
    yield made
    await made.stop()


async def test_every_answer_is_of_one_moment(
    cache: NamespaceCache,
    store: SqliteMemoryStore,
    make: MakeMemory,
    agent: Namespace,
    indexer: WindowIndexer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_module, "MOST_DEAD", 8)  # worn every few writes
    monkeypatch.setattr(cache_module, "GRACE_S", 0.2)  # both ways: from the index, and from candidates
    users = [replace(agent, user_id=name) for name in ("u1", "u2")]
    shelves = [Shelf(store, make, whose, seed) for seed, whose in enumerate(users)]
    settings = load(EngineSettings, min_relevance=0.0, max_memories=500, memory_budget_tokens=20_000)
    foreign: list[int] = []
    engine = Engine(cache, indexer, settings, on_foreign=foreign.append, now=lambda: NOON)
    answers = 0

    async def ask(shelf: Shelf, whose: Namespace, chance: random.Random) -> None:
        nonlocal answers
        while not shelf.is_done:
            with shelf.lock:
                gone, whole = set(shelf.gone), dict(shelf.whole)
            number = chance.choice(list(whole) or [0])
            asked = Request(whose, "s", f"Which colour has the left half of box{number}?")
            answer = await engine.assemble(asked, LONG_S)
            found = {one.scored.memory.id for one in answer.included}
            assert answer.outcome in {Outcome.INJECTED, Outcome.NOTHING_FOUND}
            assert not found & gone
            with shelf.lock:
                still_whole = shelf.whole.get(number)
            if still_whole is not None:
                assert still_whole <= found
            answers += 1

    writing = [asyncio.create_task(asyncio.to_thread(shelf.write)) for shelf in shelves]
    readers = [
        ask(shelf, whose, random.Random(n)) for n in range(READERS) for shelf, whose in zip(shelves, users, strict=True)
    ]
    async with asyncio.timeout(2 * LONG_S):
        await asyncio.gather(*readers, *writing)
    assert answers >= READERS
    assert not foreign
    for shelf, whose in zip(shelves, users, strict=True):
        indexes = await cache.wait(whose, LONG_S)
        assert indexes is not None
        held = {index.memory(slot).id for index in indexes for slot in range(index.slots)} - shelf.gone
        assert set().union(*shelf.whole.values()) <= held
