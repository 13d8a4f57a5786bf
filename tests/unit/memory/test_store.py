"""What every store of memories does. Here on SQLite; tests/integration/memory runs the same on PostgreSQL.

Fixtures `store` and `other` are two stores on one database, as of two processes, each with a StubIndexer.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event

from extproc.memory.features import Features, Row
from extproc.memory.model import Category, Memory, Namespace, Status
from extproc.memory.reindex import reindex
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.memory.store import Added, MemoryStore, Version
from tests.unit.memory.stub_indexer import StubIndexer

MakeMemory = Callable[..., Memory]


@pytest.fixture
def store(url: str) -> Iterator[MemoryStore]:
    opened = SqliteMemoryStore.open(url, StubIndexer())
    yield opened
    opened.close()


@pytest.fixture
def other(url: str) -> Iterator[MemoryStore]:
    opened = SqliteMemoryStore.open(url, StubIndexer())
    yield opened
    opened.close()


def wait_until(is_so: Callable[[], bool], limit_s: float = 45.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def known(store: MemoryStore, agent: Namespace) -> Version | None:
    """What the store knows without waiting; as an engine does, the database is asked when it knows nothing."""
    version = store.version(agent.org_id, agent.agent_id)
    if version is None:
        store.current_version(agent.org_id, agent.agent_id)
    return version


def contents(memories: list[Memory]) -> set[str]:
    return {memory.content for memory in memories}


def rows(store: MemoryStore, partition: Namespace, *, with_superseded: bool = False) -> dict[str, Row]:
    """By content."""
    with store.snapshot(partition) as snapshot:
        batches = list(snapshot.active(with_superseded=with_superseded))
    return {row.memory.content: row for batch in batches for row in batch}


def loaded(store: MemoryStore, partition: Namespace) -> set[str]:
    return set(rows(store, partition))


def window(*texts: str) -> bytes:
    return StubIndexer().vector(" ".join(texts))


class TestRows:
    def test_it_comes_back_as_it_went_in(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        memory = make(
            "tea",
            category=Category.PREFERENCE,
            confidence=0.3,
            session_id="s1",
            turn_index=0,
            valid_until=make("x").created_at + timedelta(days=1),
            metadata={"tags": ["drinks"]},
        )
        store.add(memory)
        assert store.get(agent, memory.id) == memory

    def test_the_same_text_again_gives_the_same_id_and_no_new_version(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        first = store.add(make("The user likes tea."))
        before = store.current_version(agent.org_id, agent.agent_id)
        assert store.add(make("The user  likes tea. ")) == Added(first.id, is_new=False)
        assert store.current_version(agent.org_id, agent.agent_id) == before

    def test_the_same_text_of_another_user_is_another_memory(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        user = replace(agent, user_id="u1")
        added = store.add_many([make("tea"), make("tea", user), make("tea"), make("tea", user)])
        assert [one is not None and one.is_new for one in added] == [True, True, False, False]

    def test_a_superseded_text_can_be_learned_again(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add(replace(make("lives in Berlin"), status=Status.SUPERSEDED))
        assert store.add(make("lives in Berlin")).is_new
        assert loaded(store, agent) == {"lives in Berlin"}

    @pytest.mark.parametrize("whose", ["another agent", "another user"])
    def test_an_id_that_is_taken_is_refused(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace, whose: str
    ) -> None:
        other = replace(agent, agent_id=str(uuid.uuid4())) if whose == "another agent" else replace(agent, user_id="u")
        memory = make("tea", other)
        store.add(memory)
        assert store.add_many([make("coffee", id=memory.id)]) == [None]
        assert store.get(other, memory.id) == memory

    def test_the_same_memory_again_is_known_whatever_became_of_it(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        old = replace(make("likes tea"), status=Status.SUPERSEDED)
        assert store.add(old) == Added(old.id, is_new=True)
        assert store.add_many([old, replace(old, status=Status.ACTIVE)]) == [Added(old.id, is_new=False)] * 2
        someone_elses = replace(old, user_id="u1", status=Status.ACTIVE)
        assert store.add_many([someone_elses]) == [None]
        assert [memory.status for memory in store.page(agent)] == [Status.SUPERSEDED]

    def test_pages_follow_each_other(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        store.add_many([make(f"fact {n}") for n in range(5)])
        first = store.page(agent, 3)
        assert len(contents(first) | contents(store.page(agent, 3, first[-1].id))) == 5


class TestIsolation:
    def test_every_page_is_of_the_namespace_alone(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        user, other = Namespace(agent.org_id, agent.agent_id, "u1"), Namespace(agent.org_id, agent.agent_id, "u2")
        made = [make(f"fact {n}", whose=(agent, user, other)[n % 3]) for n in range(12)]
        store.add_many(made)
        seen = [memory for memory in made if memory.user_id != "u2"]
        found, after = [], ""
        while page := store.page(user, 3, after):
            found += page
            after = page[-1].id
        assert found == sorted(seen, key=lambda memory: memory.id)
        assert [memory.user_id for memory in store.page(agent, 2, min(one.id for one in made))] == [None, None]

    def test_each_reader_gets_what_is_its_own(self, store: MemoryStore, make: MakeMemory) -> None:
        orgs, agents = [str(uuid.uuid4()) for _ in range(2)], [str(uuid.uuid4()) for _ in range(2)]
        spaces = [Namespace(org, agent, user) for org in orgs for agent in agents for user in (None, "u1", "u2")]
        memories = {space: make("secret", space) for space in spaces}
        store.add_many(list(memories.values()))
        for space in spaces:
            seen = {Namespace(one.org_id, one.agent_id, one.user_id) for one in store.page(space)}
            assert seen == set(space.partitions())
            with store.snapshot(space) as snapshot:
                assert snapshot.ids() == {memories[space].id}
                assert [one.memory.id for one in snapshot.changed(0, 10)] == [memories[space].id]
            for other, memory in memories.items():
                assert (store.get(space, memory.id) is None) == (not space.can_see(memory))
                if other != space:
                    assert not store.forget(space, memory.id)

    def test_forgetting_a_user_leaves_everyone_else(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        u1, u2 = replace(agent, user_id="u1"), replace(agent, user_id="u2")
        store.add_many([make("one", u1), make("two", u1), make("three", u2), make("four")])
        assert store.forget_all(u1) == 2
        assert (loaded(store, u1), loaded(store, u2), loaded(store, agent)) == (set(), {"three"}, {"four"})

    def test_feedback_of_another_org_changes_nothing(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("tea")
        store.add(memory)
        assert store.move_usefulness(str(uuid.uuid4()), [memory.id], 0.1) == []
        store.record_retrievals({(str(uuid.uuid4()), memory.id): 5}, memory.created_at)
        assert store.get(agent, memory.id) == memory


class TestVersions:
    def test_every_write_that_can_change_an_answer_counts(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("tea")
        versions = [store.current_version(agent.org_id, agent.agent_id)]

        def after(_: object) -> None:
            versions.append(store.current_version(agent.org_id, agent.agent_id))

        after(store.add(memory))
        after(store.move_usefulness(agent.org_id, [memory.id], 0.1))
        after(store.move_usefulness(agent.org_id, [memory.id], 0.0))
        store.record_retrievals({(agent.org_id, memory.id): 2}, memory.created_at)
        after(None)
        after(store.forget(agent, memory.id))
        after(store.forget(agent, memory.id))
        numbers = [(0, 0), (1, 0), (2, 0), (2, 0), (2, 0), (3, 1), (3, 1)]
        assert versions == [Version(*pair) for pair in numbers]

    def test_a_write_through_another_store_is_seen(
        self, store: MemoryStore, other: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        assert store.current_version(agent.org_id, agent.agent_id) == Version()
        other.add(make("tea"))
        assert store.current_version(agent.org_id, agent.agent_id) == Version(1, 0)
        wait_until(lambda: known(store, agent) == Version(1, 0))

    def test_a_write_through_the_store_itself_is_seen_at_once(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        wait_until(lambda: known(store, agent) == Version())
        for count in range(1, 6):
            store.add(make(f"tea {count}"))
            assert store.version(agent.org_id, agent.agent_id) in {Version(count, 0), None}

    def test_a_reader_gets_only_what_changed_since(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        old = make("old")
        store.add_many([old, make("older")])
        store.add(make("new"))
        store.move_usefulness(agent.org_id, [old.id], 0.1)
        with store.snapshot(agent) as snapshot:
            assert {row.memory.content for row in snapshot.changed(1, 10)} == {"new", "old"}
            assert len(snapshot.changed(0, 2)) == 2

    def test_a_snapshot_stands_still(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        store.add(make("before"))
        with store.snapshot(agent) as snapshot:
            store.add(make("after"))
            assert snapshot.version == Version(1, 0)
            assert [len(batch) for batch in snapshot.active()] == [1]


class TestCounts:
    def test_usefulness_stays_on_its_scale(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        memory = make("tea")
        store.add(memory)
        (update,) = store.move_usefulness(agent.org_id, [memory.id, memory.id, str(uuid.uuid4())], 0.7)
        assert (update.memory_id, update.previous, update.new) == (memory.id, 0.5, 1.0)

    def test_retrievals_add_up(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        memory = make("tea")
        store.add(memory)
        for count in (2, 3):
            store.record_retrievals({(agent.org_id, memory.id): count}, memory.created_at)
        found = store.get(agent, memory.id)
        assert found is not None
        assert (found.retrieval_count, found.last_retrieved_at) == (5, memory.created_at)

    def test_retrievals_stay_within_their_column(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        most = 2**31 - 1
        memory = replace(make("tea"), retrieval_count=most - 3)
        store.add(memory)
        seen = []
        for count in (2, 5, 1):
            store.record_retrievals({(agent.org_id, memory.id): count}, memory.created_at)
            found = store.get(agent, memory.id)
            seen.append(found and found.retrieval_count)
        assert seen == [most - 1, most, most]


class TestFeatures:
    def test_they_are_in_the_row_as_the_indexer_made_them(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("Likes green tea")
        store.add(memory)
        (expected,) = StubIndexer().features([memory], [[]])
        assert rows(store, agent)["Likes green tea"].features == expected
        with store.snapshot(agent) as snapshot:
            assert [row.features for row in snapshot.changed(0, 10)] == [expected]

    def test_the_window_is_of_the_session_in_order_of_turns_however_they_are_written(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        turns = [make(f"turn{n}", session_id="s1", turn_index=n) for n in range(8)]
        noise = [make(f"noise{n}", session_id="s2", turn_index=n) for n in range(8)]
        mixed = turns + noise + [make("loose")]
        random.Random(7).shuffle(mixed)
        for start in range(0, len(mixed), 5):
            store.add_many(mixed[start : start + 5])
        found = rows(store, agent)
        for session in ("turn", "noise"):
            for n in range(8):
                expected = window(*(f"{session}{before}" for before in range(max(0, n - 2), n + 1)))
                assert found[f"{session}{n}"].features.vector == expected
        assert found["loose"].features.vector == window("loose")

    @pytest.mark.parametrize("batch", [100, 12, 1], ids=["at once", "in parts", "one by one"])
    def test_windows_of_many_sessions_are_whole_however_they_are_divided(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace, batch: int
    ) -> None:
        mixed = [make(f"{name}{n}", session_id=name, turn_index=n) for n in range(4) for name in "abcdef"]
        for start in range(0, len(mixed), batch):
            store.add_many(mixed[start : start + batch])
        found = rows(store, agent)
        for name in "abcdef":
            assert found[f"{name}1"].features.vector == window(f"{name}0", f"{name}1")
            assert found[f"{name}3"].features.vector == window(f"{name}1", f"{name}2", f"{name}3")

    def test_memories_of_no_turn_follow_each_other_in_time_and_those_of_one_turn_do_not(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        now = make("x").created_at
        for place, turn in enumerate((None, None, 3, 3)):
            store.add(make(f"fact{place}", session_id="s", turn_index=turn, created_at=now + timedelta(seconds=place)))
        found = rows(store, agent)
        assert found["fact1"].features.vector == window("fact0", "fact1")
        assert found["fact3"].features.vector == window("fact0", "fact1", "fact3")

    def test_another_users_turn_is_in_no_window(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        u1, u2 = replace(agent, user_id="u1"), replace(agent, user_id="u2")
        store.add_many([make(f"of-{one.user_id}", one, session_id="s", turn_index=1) for one in (u1, agent)])
        store.add(make("mine", u2, session_id="s", turn_index=2))
        assert rows(store, u2)["mine"].features.vector == window("mine")

    def test_what_is_forgotten_leaves_the_windows_after_it(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        turns = [make(f"turn{n}", session_id="s", turn_index=n) for n in range(5)]
        store.add_many(turns)
        before = store.current_version(agent.org_id, agent.agent_id)
        store.forget(agent, turns[1].id)
        found = rows(store, agent)
        assert found["turn2"].features.vector == window("turn0", "turn2")
        assert found["turn3"].features.vector == window("turn0", "turn2", "turn3")
        with store.snapshot(agent) as snapshot:
            changed = {row.memory.content for row in snapshot.changed(before.changes, 10)}
        assert changed == {"turn2", "turn3"}

    def test_what_nobody_may_see_is_in_no_window(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        bad = replace(make("secret", session_id="s", turn_index=0), status=Status.QUARANTINED)
        store.add_many([bad, make("open", session_id="s", turn_index=1)])
        assert rows(store, agent)["open"].features.vector == window("open")


class TestThePast:
    def test_superseded_memories_come_with_their_time_when_asked_for(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        now = make("x").created_at
        new = make("lives in Bern", valid_from=now)
        old = make("lives in Berlin", valid_until=now)
        store.add_many([new, replace(old, status=Status.SUPERSEDED, superseded_by=new.id)])
        assert loaded(store, agent) == {"lives in Bern"}
        past = rows(store, agent, with_superseded=True)["lives in Berlin"].memory
        assert (past.status, past.valid_until, past.superseded_by) == (Status.SUPERSEDED, now, new.id)
        assert {row.memory.id for row in store.candidates(agent, ["lives"], None)} == {new.id}
        assert len(store.candidates(agent, ["lives"], None, with_superseded=True)) == 2

    @pytest.mark.parametrize("status", [Status.MERGED, Status.ARCHIVED, Status.QUARANTINED, Status.DELETED])
    def test_no_other_status_is_ever_read(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace, status: Status
    ) -> None:
        store.add(replace(make("secret tea"), status=status))
        assert rows(store, agent, with_superseded=True) == {}
        assert store.candidates(agent, ["tea"], window("tea"), with_superseded=True) == []


class TestKnown:
    def test_they_are_found_by_hash_slot_and_id_in_exactly_one_partition(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        ana = Namespace(agent.org_id, agent.agent_id, "ana")
        home = {"slot": "home", "value": "Lisbon"}
        by_slot, by_hash, by_id = make("lives in Lisbon", ana, metadata=home), make("likes tea", ana), make("x", ana)
        agents, past = make("lives in Bern", metadata=home), make("lived in Faro", ana, metadata=home)
        others = [make("y", ana, metadata={"slot": "age"}), make("z", ana, metadata={"slot": None}), agents]
        store.add_many([by_slot, by_hash, by_id, *others, replace(past, status=Status.SUPERSEDED)])
        asked = ([by_hash.content_hash], ["home"], [by_id.id, by_slot.id])
        found = store.transact(agent.org_id, lambda rows: rows.known(ana, *asked))
        assert found == sorted([by_slot, by_hash, by_id], key=lambda memory: memory.id)
        assert store.transact(agent.org_id, lambda rows: rows.known(agent, [], ["home"], [])) == [agents]
        assert store.transact(agent.org_id, lambda rows: rows.known(ana, [], [], [])) == []

    def test_a_slot_of_any_length_and_kind_can_be_stored_and_found(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        long = "attribute:" + "".join(str(uuid.uuid4()) for _ in range(300))  # longer than an index's entry may be
        memories = [make(f"m{n}", metadata={"slot": slot}) for n, slot in enumerate((long, 5, ["a"], {"b": 1}))]
        store.add_many(memories)
        assert store.transact(agent.org_id, lambda rows: rows.known(agent, [], [long], [])) == memories[:1]

    def test_each_way_has_its_index(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        """Also below row-level security, which lets few comparisons near an index."""
        ana = Namespace(agent.org_id, agent.agent_id, "ana")
        store.add_many([make(f"m{n}", ana, metadata={"slot": f"slot{n}"}) for n in range(400)])
        asked = (["0" * 64], ["slot7", "slot8"], [str(uuid.uuid4())])
        plan = store.transact(agent.org_id, lambda rows: explained(rows.connection, lambda: rows.known(ana, *asked)))
        for column in ("content_hash", "slot", "id"):
            assert re.search(rf"(?:Index Cond|USING INDEX).*\b{column}\b(?:\)::text)? ?=", plan), plan
        assert "memories_by_slot" in plan or "_slot_idx" in plan, plan  # PostgreSQL names those of partitions itself


def explained(connection: Connection, ask: Callable[[], object]) -> str:
    """How the database goes about the one question that `ask` puts."""
    said: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, values: Any, *_: object) -> None:
        said.append((statement, values))

    event.listen(connection, "before_cursor_execute", note)
    ask()
    event.remove(connection, "before_cursor_execute", note)
    ((statement, values),) = said
    is_sqlite = connection.dialect.name == "sqlite"
    connection.exec_driver_sql("ANALYZE memories" if is_sqlite else "ANALYZE ibex_core.memories")
    explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
    return "\n".join(str(row[-1]) for row in connection.exec_driver_sql(f"{explain} {statement}", values))


@contextmanager
def said() -> Iterator[list[str]]:
    """The statements that SQLAlchemy is given, on any connection. SQLite's own driver is asked without it where a
    question is put often: that costs no round trip, and no statement that is built anew."""
    heard: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        heard.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield heard
    finally:
        event.remove(Engine, "before_cursor_execute", note)


class TestCandidates:
    def found(self, store: MemoryStore, namespace: Namespace, text: str, limit: int = 64) -> set[str]:
        return {row.memory.content for row in store.candidates(namespace, text.split(), None, limit)}

    def test_they_hold_the_rarest_words(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        store.add_many([make(f"common word number{n}") for n in range(1_200)])
        store.add(make("common kumquat"))
        assert "common kumquat" in self.found(store, agent, "common kumquat", 5)
        assert self.found(store, agent, "kumquat nowhere") == {"common kumquat"}
        assert len(self.found(store, agent, "common word", 5)) == 5
        assert self.found(store, agent, "nowhere") == self.found(store, agent, "") == set()

    def test_more_matching_words_count_more(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        store.add_many([make(f"a{n} red") for n in range(5)] + [make(f"b{n} fox") for n in range(5)])
        store.add(make("red fox"))
        assert self.found(store, agent, "red fox", 1) == {"red fox"}

    def test_they_come_with_their_neighbours_and_features(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add_many([make(f"turn{n}", session_id="s", turn_index=n) for n in range(9)])
        store.add_many([make(f"else{n}", session_id="t", turn_index=n) for n in range(9)])
        store.add(replace(make("bad", session_id="s", turn_index=4), status=Status.QUARANTINED))
        found = store.candidates(agent, ["turn4"], None)
        assert {row.memory.content for row in found} == {f"turn{n}" for n in (2, 3, 4, 5, 6)}
        assert len(found) == 5
        assert {row.memory.content: row for row in found} == {
            text: row for text, row in rows(store, agent).items() if text in {f"turn{n}" for n in (2, 3, 4, 5, 6)}
        }

    def test_a_users_memories_have_neighbours_among_the_users_own(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        u1, u2 = replace(agent, user_id="u1"), replace(agent, user_id="u2")
        for whose in (agent, u1, u2):
            name = whose.user_id or "agent"
            store.add_many([make(f"{name} turn{n}", whose, session_id="s", turn_index=n) for n in range(6)])
        assert self.found(store, u1, "u1 turn3", 1) == {f"u1 turn{n}" for n in (1, 2, 3, 4, 5)}

    @pytest.mark.parametrize("turn", [0, 2**31 - 1])
    def test_turns_at_the_ends_of_their_range_are_no_error(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace, turn: int
    ) -> None:
        store.add(make("tea", session_id="s", turn_index=turn))
        assert self.found(store, agent, "tea") == {"tea"}

    def test_they_are_of_the_namespace_alone(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        orgs, agents = [agent.org_id, str(uuid.uuid4())], [agent.agent_id, str(uuid.uuid4())]
        spaces = [Namespace(org, its, user) for org in orgs for its in agents for user in (None, "u1", "u2")]
        store.add_many(
            [
                make(f"tea {place} {n}", space, session_id="s", turn_index=n)
                for place, space in enumerate(spaces)
                for n in range(3)
            ]
        )
        for space in spaces:
            found = store.candidates(space, ["tea"], window("tea"))
            assert {Namespace(row.memory.org_id, row.memory.agent_id, row.memory.user_id) for row in found} == set(
                space.partitions()
            )
            assert len(found) == 3 * len(space.partitions())

    def test_what_is_forgotten_is_none(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        memories = [make(f"tea {n}") for n in range(3)]
        store.add_many(memories)
        store.forget(agent, memories[0].id)
        assert self.found(store, agent, "tea") == {"tea 1", "tea 2"}
        assert store.forget_all(agent) == 2
        assert store.candidates(agent, ["tea"], window("tea")) == []
        store.add(make("tea 0"))
        assert self.found(store, agent, "tea") == {"tea 0"}


class TestReindexing:
    def test_memories_without_features_get_them(
        self, store: MemoryStore, other: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        plain = [make(f"turn{n}", session_id="s", turn_index=n) for n in range(5)]
        store._indexer = None  # type: ignore[attr-defined]
        store.add_many(plain)
        assert {row.features for row in rows(store, agent).values()} == {Features("", "", b"", b"")}
        assert store.candidates(agent, ["turn1"], None) == []
        before = store.current_version(agent.org_id, agent.agent_id)
        assert reindex(other, StubIndexer(), organisations=[agent.org_id], batch=2) == 5
        assert rows(store, agent)["turn3"].features.vector == window("turn1", "turn2", "turn3")
        assert len(store.candidates(agent, ["turn1"], None)) == 4
        assert store.current_version(agent.org_id, agent.agent_id) == before

    def test_another_version_takes_the_place_of_the_old_while_both_are_read(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add_many([make(f"fact{n} tea") for n in range(7)])
        new = StubIndexer("stub-2", 384)
        told: list[tuple[int, int]] = []

        def tell(done: int, total: int) -> None:
            told.append((done, total))
            versions = {row.features.version for row in rows(store, agent).values()}
            assert versions == ({"stub-1", "stub-2"} if done < 7 else {"stub-2"})
            assert len(store.candidates(agent, ["tea"], window("tea"))) == 7

        assert reindex(store, new, organisations=[agent.org_id], batch=3, tell=tell) == 7
        assert told == [(3, 7), (6, 7), (7, 7)]
        assert {len(row.features.vector) for row in rows(store, agent).values()} == {768}
        assert store.count_outdated(agent.org_id, "stub-2") == 0
        assert store.count_outdated(agent.org_id, "stub-1") == 7

    def test_a_batch_of_any_sessions_of_any_owners_has_each_its_own_predecessors(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        second = Namespace(agent.org_id, str(uuid.uuid4()))
        owners = [agent, replace(agent, user_id="ana"), replace(agent, user_id="bob"), second]
        spoken = [
            make(f"o{o}s{s}t{turn}", whose, session_id=f"s{s}", turn_index=turn)
            for o, whose in enumerate(owners)
            for s in range(3)
            for turn in range(5)
        ]
        random.Random(3).shuffle(spoken)
        for memory in spoken:
            store.add(memory)
        assert reindex(store, StubIndexer("stub-2"), organisations=[agent.org_id], batch=7) == 60
        found = {content: row for whose in owners for content, row in rows(store, whose).items()}
        for content, row in found.items():
            of_session, turn = content.split("t")
            texts = [f"{of_session}t{earlier}" for earlier in range(max(0, int(turn) - 2), int(turn) + 1)]
            assert row.features == Features("stub-2", content, row.features.words, window(*texts))

    def test_a_batch_takes_few_statements_however_many_sessions_and_owners_it_is_of(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        for number in range(40):
            whose = Namespace(agent.org_id, str(uuid.UUID(int=number % 4)), f"user{number}" if number % 3 else None)
            store.add_many([make(f"turn {n}", whose, session_id=f"s{number}", turn_index=n) for n in range(2)])
        with said() as of_reading:
            found = store.outdated(agent.org_id, "stub-2", 60)
        made = StubIndexer("stub-2").features([one.memory for one in found], [one.before for one in found])
        with said() as of_writing:
            assert store.write_features(
                agent.org_id, {one.memory.id: its for one, its in zip(found, made, strict=True)}
            )
        assert len(found) == 60
        assert len(of_reading) <= 6, of_reading
        assert len(of_writing) <= 8, of_writing

    def test_what_was_forgotten_meanwhile_does_not_come_back_in_a_vector(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        turns = [make(f"turn{n}", session_id="s", turn_index=n) for n in range(2)]
        indexer, store._indexer = store._indexer, None  # type: ignore[attr-defined]
        store.add_many(turns)
        found = store.outdated(agent.org_id, "stub-1", 10)
        made = StubIndexer().features([one.memory for one in found], [one.before for one in found])
        store._indexer = indexer  # type: ignore[attr-defined]
        assert store.forget(agent, turns[0].id)
        stale = {one.memory.id: its for one, its in zip(found, made, strict=True)}
        assert store.write_features(agent.org_id, stale) == 0
        assert rows(store, agent)["turn1"].features.vector == window("turn1")

    def test_it_ends_when_told_to(self, store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
        store.add_many([make(f"fact{n}") for n in range(7)])
        is_enough = iter([False, True])
        done = reindex(
            store, StubIndexer("stub-2"), organisations=[agent.org_id], batch=3, should_stop=lambda: next(is_enough)
        )
        assert done == 3

    def test_an_indexer_that_gives_another_version_than_its_own_ends_nevertheless(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add_many([make(f"fact{n}") for n in range(7)])
        wrong = StubIndexer("stub-3")
        wrong.features = StubIndexer("stub-2").features  # type: ignore[method-assign]
        assert reindex(store, wrong, organisations=[agent.org_id], batch=3) <= 9

    def test_another_organisations_memories_are_left_alone(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("tea")
        store.add(memory)
        (new,) = StubIndexer("stub-2").features([memory], [[]])
        assert store.write_features(str(uuid.uuid4()), {memory.id: new}) == 0
        assert store.outdated(str(uuid.uuid4()), "stub-2", 10) == []
        assert agent.org_id in store.organisations()
        assert rows(store, agent)["tea"].features.version == "stub-1"


class TestPinning:
    def test_it_is_set_and_taken_back_in_exactly_this_partition(
        self, store: MemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("tea", metadata={"tags": ["drinks"]})
        store.add(memory)
        assert not store.pin(replace(agent, user_id="u1"), memory.id, is_pinned=True)
        assert not store.pin(agent, str(uuid.uuid4()), is_pinned=True)
        for is_pinned in (True, False):
            before = store.current_version(agent.org_id, agent.agent_id)
            assert store.pin(agent, memory.id, is_pinned=is_pinned)
            assert store.pin(agent, memory.id, is_pinned=is_pinned)
            with store.snapshot(agent) as snapshot:
                (changed,) = snapshot.changed(before.changes, 10)
            assert changed.memory.is_pinned == is_pinned
            assert changed.memory.metadata["tags"] == ["drinks"]
            assert store.current_version(agent.org_id, agent.agent_id).changes == before.changes + 1


def test_statistics_can_be_had_for_any_organisation(store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
    store.add(make("green tea"))
    store.refresh_statistics(agent.org_id)
    store.refresh_statistics(str(uuid.uuid4()))
    assert loaded(store, agent) == {"green tea"}


def test_a_text_with_nul_is_kept_without_it(store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
    store.add(make("green\0tea", metadata={"k": "a\0b"}))
    assert loaded(store, agent) == {"green tea"}


def test_many_at_once_are_forgotten_batch_by_batch(store: MemoryStore, make: MakeMemory, agent: Namespace) -> None:
    store.add_many([make(f"fact {n}", session_id="s", turn_index=n) for n in range(1_100)])
    assert store.forget_all(agent) == 1_100
    assert loaded(store, agent) == set()
