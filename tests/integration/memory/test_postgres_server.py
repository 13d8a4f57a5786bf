"""What only a server has: row-level security, other engines, an extension, and days on which it is away."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from psycopg import sql

from extproc.memory import listen, vectors
from extproc.memory.database import Database, migrate, open_engine
from extproc.memory.migrations import config
from extproc.memory.model import Memory, Namespace
from extproc.memory.postgres import _AROUND, PostgresMemoryStore, _asked, _candidates
from extproc.memory.rows import Rows, Stretch
from extproc.memory.store import StoreAway, StoreError, Version, open_store
from extproc.settings import StoreSettings, load
from tests.integration.turns import postgres_side
from tests.unit.memory.conftest import NOON
from tests.unit.memory.stub_indexer import StubIndexer
from tests.unit.memory.test_store import known, loaded, rows, wait_until

MakeMemory = Callable[..., Memory]
TABLES = ("memories", "memory_terms", "memory_versions")


@pytest.fixture
def opened() -> Iterator[Callable[..., PostgresMemoryStore]]:
    stores = []

    def build(url: str, **options: Any) -> PostgresMemoryStore:
        stores.append(PostgresMemoryStore.open(url, StubIndexer(), **options))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


class TestIsolation:
    @pytest.mark.parametrize("acting", ["nobody", "an empty name", "somebody else", "the sweep"])
    def test_raw_sql_finds_nothing_of_another_organisation(
        self, store: PostgresMemoryStore, shared: postgres_side.Database, make: MakeMemory, acting: str
    ) -> None:
        store.add(make("secret tea"))
        with shared.connect() as connection:
            org = {"nobody": None, "an empty name": "", "somebody else": str(uuid.uuid4()), "the sweep": None}[acting]
            if org is not None:
                connection.execute("SELECT set_config('app.current_org_id', %s, true)", (org,))
            if acting == "the sweep":
                connection.execute("SELECT set_config('app.sweep', 'on', true)")
            for table in TABLES[:2] if acting == "the sweep" else TABLES:
                statement = sql.SQL("SELECT count(*) FROM ibex_core.{}").format(sql.Identifier(table))
                assert connection.execute(statement).fetchone() == (0,)
            assert connection.execute("DELETE FROM ibex_core.memories").rowcount == 0

    def test_a_partition_shows_nothing_to_who_asks_it_by_name(
        self, store: PostgresMemoryStore, shared: postgres_side.Database, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add(make("secret tea"))
        with shared.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
            assert connection.execute("SELECT count(*) FROM ibex_core.memories").fetchone() == (1,)
            for number in range(16):
                for table in ("memories", "memory_terms"):
                    name = sql.Identifier(f"{table}_{number:02}")
                    statement = sql.SQL("SELECT count(*) FROM ibex_core.{}").format(name)
                    assert connection.execute(statement).fetchone() == (0,)

    def test_nothing_is_written_for_another_organisation(
        self, store: PostgresMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        foreign = make("tea", Namespace(str(uuid.uuid4()), agent.agent_id))

        def write(connection: Any) -> None:
            from extproc.memory.database import act_for
            from extproc.memory.schema import memory_versions

            act_for(connection, agent.org_id)
            row = {"org_id": foreign.org_id, "agent_id": foreign.agent_id, "changes": 1, "removals": 0}
            connection.execute(memory_versions.insert(), row)

        with pytest.raises(StoreError, match="refuses"):
            store._database.run(write)

    def test_an_id_of_another_organisation_is_free(
        self, store: PostgresMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        other = Namespace(str(uuid.uuid4()), agent.agent_id)
        memory, same = make("tea", other), make("coffee")
        store.add(memory)
        store.add(replace(same, id=memory.id))
        assert (loaded(store, other), loaded(store, agent)) == ({"tea"}, {"coffee"})
        assert store.forget(agent, memory.id)
        assert loaded(store, other) == {"tea"}

    def test_what_is_forgotten_leaves_no_row_behind(
        self, store: PostgresMemoryStore, shared: postgres_side.Database, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("secret tea")
        store.add(memory)
        store.forget(agent, memory.id)
        with shared.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
            for table in TABLES[:2]:
                statement = sql.SQL("SELECT count(*) FROM ibex_core.{}").format(sql.Identifier(table))
                assert connection.execute(statement).fetchone() == (0,)


class TestCandidates:
    def test_the_nearest_vectors_are_found_whatever_their_words(
        self, store: PostgresMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add_many([make(f"about cats number{n}") for n in range(20)])
        store.add_many([make(f"about dogs number{n}") for n in range(20)])
        found = store.candidates(agent, [], StubIndexer().vector("about dogs"), 20)
        assert {row.memory.content.split()[1] for row in found} == {"dogs"}

    def test_vectors_of_another_model_are_not_compared(
        self, store: PostgresMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add(make("about dogs"))
        store._indexer = StubIndexer("stub-2")
        assert store.candidates(agent, [], StubIndexer().vector("about dogs")) == []

    def test_the_server_is_asked_in_one_round_trip_which_ends_the_transaction(
        self, store: PostgresMemoryStore, make: MakeMemory, agent: Namespace, tmp_path: Path
    ) -> None:
        store.add(make("about dogs"))
        messages = tmp_path / "messages"
        with messages.open("w") as file:
            with store._database.driver(1.0) as driver:
                driver.pgconn.trace(file.fileno())
            assert len(store.candidates(agent, ["dogs"], None)) == 1
            with store._database.driver(1.0) as same:
                same.pgconn.untrace()
        assert same is driver
        (ended,) = [line for line in messages.read_text().splitlines() if "ReadyForQuery" in line]
        assert ended.endswith("I")  # idle: not in a transaction

    def test_the_connection_of_a_search_has_transactions_again(
        self, store: PostgresMemoryStore, agent: Namespace, make: MakeMemory
    ) -> None:
        def fail_half_way(rows: Rows) -> None:
            rows.add_many([make("tea")])
            raise LookupError

        assert store.candidates(agent, ["tea"], None) == []
        with pytest.raises(LookupError):
            store.transact(agent.org_id, fail_half_way)
        assert store.page(agent) == []

    def test_each_part_uses_its_index_in_one_partition(
        self, store: PostgresMemoryStore, shared: postgres_side.Database, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add_many([make(f"fact {n}", session_id="s", turn_index=n) for n in range(3)])
        values = {
            "org": agent.org_id,
            "agent": agent.agent_id,
            "user": None,
            "terms": [1, 2],
            "counted": 9,
            "limit": 64,
        }
        vector = "[" + ",".join(["0.0625"] * 256) + "]"
        with shared.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
            for method in ("enable_seqscan", "enable_sort", "enable_bitmapscan"):
                connection.execute("SELECT set_config(%s, 'off', true)", (method,))
            plan = "\n".join(
                line
                for (line,) in connection.execute(
                    "EXPLAIN " + _candidates("public", 256, has_user=False),
                    {**values, "vector": vector, "statuses": ["active"], "model": "stub-1"},
                )
            )
        assert "Seq Scan" not in plan
        assert "_embedding_idx" in plan
        assert "_org_id_term_memory_id_idx" in plan
        assert len({word for word in plan.split() if word.startswith("memories_") and word[9:].isdigit()}) == 1

    @pytest.mark.parametrize("user_id", [None, "ana"])
    def test_the_neighbours_of_many_memories_are_found_by_the_index_of_turns(
        self,
        store: PostgresMemoryStore,
        shared: postgres_side.Database,
        make: MakeMemory,
        agent: Namespace,
        user_id: str | None,
    ) -> None:
        whose = replace(agent, user_id=user_id)
        store.add_many([make(f"fact {n}", whose, session_id=f"s{n % 20}", turn_index=n) for n in range(400)])
        store.refresh_statistics(agent.org_id)
        stretches = [Stretch(whose, f"s{n}", (n, NOON), (n, NOON)) for n in range(20)]
        with shared.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
            question = "EXPLAIN " + _AROUND[user_id is not None]
            plan = "\n".join(line for (line,) in connection.execute(question, _asked(stretches, 16)))
        assert "Seq Scan" not in plan, plan
        conditions = [line for line in plan.splitlines() if "Index Cond" in line]
        assert len(conditions) == 3, plan
        assert all("session_id" in line and "ROW" in line for line in conditions), plan

    def test_after_a_large_write_the_planner_knows_of_it(
        self, store: PostgresMemoryStore, shared: postgres_side.Database, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add_many([make(f"fact {n}") for n in range(300)])
        store.refresh_statistics(agent.org_id)
        counted = "SELECT reltuples FROM pg_class WHERE oid = (SELECT tableoid FROM ibex_core.{} LIMIT 1)"
        with shared.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
            for table in ("memories", "memory_terms"):
                (known_rows,) = connection.execute(counted.format(table)).fetchall()
                assert known_rows[0] >= 300

    def test_after_a_large_write_terms_are_found_in_their_index_alone(
        self, store: PostgresMemoryStore, shared: postgres_side.Database, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add_many([make(f"fact {n}") for n in range(300)])
        search = "EXPLAIN (ANALYZE, FORMAT JSON) SELECT memory_id FROM ibex_core.memory_terms WHERE org_id = %s"

        def are_noted() -> bool:  # once nobody has a transaction of before; a page may have others' forgotten rows
            store.refresh_statistics(agent.org_id)
            with shared.connect() as connection:
                connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
                for method in ("enable_seqscan", "enable_bitmapscan"):
                    connection.execute("SELECT set_config(%s, 'off', true)", (method,))
                ((plan,),) = connection.execute(search, (agent.org_id,)).fetchall()
            (scan,) = plan[0]["Plan"]["Plans"]
            return bool(scan["Heap Fetches"] < scan["Actual Rows"] / 2)

        wait_until(are_noted)


class TestOtherEngines:
    def test_each_sees_what_the_other_wrote_and_forgot(
        self, store: PostgresMemoryStore, other: PostgresMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        wait_until(lambda: known(store, agent) == Version())
        wait_until(lambda: known(other, agent) == Version())
        memory = make("tea")
        store.add(memory)
        wait_until(lambda: known(other, agent) == Version(1, 0))
        other.forget(agent, memory.id)
        wait_until(lambda: known(store, agent) == Version(2, 1))
        assert loaded(store, agent) == set()

    def test_a_write_is_notified_with_its_commit(
        self, store: PostgresMemoryStore, shared: postgres_side.Database, make: MakeMemory, agent: Namespace
    ) -> None:
        with shared.connect() as connection:
            connection.execute("LISTEN ibex_memories")
            connection.commit()
            store.add(make("tea"))
            heard = {note.payload for note in connection.notifies(timeout=10, stop_after=1)}
        assert heard == {f"{agent.org_id} {agent.agent_id} 1 0"}

    def test_what_was_notified_while_nobody_heard_is_not_missed(
        self, store: PostgresMemoryStore, other: PostgresMemoryStore, shared: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        wait_until(lambda: known(store, agent) == Version())
        with shared.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query IN ('LISTEN ibex_memories', 'SELECT 1') AND pid <> pg_backend_pid()"
            )
            other.add(make("tea"))
        wait_until(lambda: known(store, agent) == Version(1, 0))

    def test_writers_of_the_same_text_at_once_make_one_memory(
        self, store: PostgresMemoryStore, other: PostgresMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as threads:
            added = list(threads.map(lambda n: (store, other)[n % 2].add(make("tea")), range(12)))
        assert len({one.id for one in added}) == 1
        assert sum(one.is_new for one in added) == 1
        assert store.current_version(agent.org_id, agent.agent_id) == Version(1, 0)

    def test_a_notification_that_comes_with_an_answer_is_heard(
        self, postgres: postgres_side.Database, opened: Any, agent: Namespace, make: MakeMemory, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(listen, "_QUESTION", "SELECT pg_sleep(0.2)")
        monkeypatch.setattr(listen, "BEAT_S", 0.0)
        monkeypatch.setattr(listen, "ASK_AGAIN_S", 3600.0)
        reader, writer = opened(postgres.url), opened(postgres.url)

        def is_at(version: Version) -> bool:
            return bool(reader.version(agent.org_id, agent.agent_id) == version)

        wait_until(lambda: known(reader, agent) == Version(0, 0))
        for changes in range(1, 4):
            writer.add(make(f"tea {changes}"))
            wait_until(partial(is_at, Version(changes, 0)))


class TestAway:
    def test_what_is_loaded_is_served_writes_fail_and_it_recovers(
        self, postgres: postgres_side.Database, opened: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        store = opened(postgres.url)
        store.add(make("tea"))
        wait_until(lambda: known(store, agent) == Version(1, 0))
        assert store.away_s() == 0
        postgres.stop()
        wait_until(lambda: store.away_s() > 0)
        for _ in range(3):
            assert store.version(agent.org_id, agent.agent_id) == Version(1, 0)
            assert store.current_version(agent.org_id, agent.agent_id) == Version(1, 0)
        store.check()
        began = time.monotonic()
        for refused in (
            lambda: store.add(make("coffee")),
            lambda: loaded(store, agent),
            lambda: store.candidates(agent, ["tea"], None),
            lambda: store.current_version(agent.org_id, str(uuid.uuid4())),
        ):
            with pytest.raises(StoreAway, match="away"):
                refused()
        assert time.monotonic() - began < 5
        assert store.version(agent.org_id, str(uuid.uuid4())) is None
        postgres.start()
        wait_until(lambda: store.away_s() == 0)
        assert len(store.candidates(agent, ["tea"], None)) == 1  # its connections of before lead nowhere
        store.add(make("coffee"))
        wait_until(lambda: known(store, agent) == Version(2, 0))
        assert loaded(store, agent) == {"tea", "coffee"}

    def test_after_its_time_nothing_is_served(
        self, postgres: postgres_side.Database, opened: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        store = opened(postgres.url, serve_away_s=0.0)
        store.add(make("tea"))
        wait_until(lambda: known(store, agent) == Version(1, 0))
        postgres.stop()
        wait_until(lambda: store.away_s() > 0)
        assert store.version(agent.org_id, agent.agent_id) is None
        with pytest.raises(StoreAway):
            store.current_version(agent.org_id, agent.agent_id)
        with pytest.raises(StoreAway):
            store.check()

    def test_a_server_that_stands_still_is_away_and_keeps_nobody_waiting(
        self, postgres: postgres_side.Database, opened: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        store = opened(postgres.url)
        store.add(make("tea"))
        wait_until(lambda: known(store, agent) == Version(1, 0))
        with postgres.server.frozen():
            wait_until(lambda: store.away_s() > 0)
            assert store.version(agent.org_id, agent.agent_id) == Version(1, 0)
        wait_until(lambda: store.away_s() == 0)
        wait_until(lambda: known(store, agent) == Version(1, 0))


class TestSetUp:
    def test_without_the_extension_it_says_what_to_do_and_sessions_are_kept_all_the_same(
        self, bare: postgres_side.Database, opened: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        with pytest.raises(StoreError, match="CREATE EXTENSION vector"):
            open_store(load(StoreSettings, database_url=bare.url))
        database = Database(bare.url)
        from sqlalchemy import text

        count = database.run(
            lambda connection: connection.execute(text("SELECT count(*) FROM ibex_core.sweeps")).scalar()
        )
        assert count == 0
        database.close()
        bare.server.execute(sql.SQL("CREATE EXTENSION vector"), database=bare.name)  # type: ignore[arg-type]
        opened(bare.url).add(make("tea"))

    def test_the_extension_may_be_in_any_schema(
        self, bare: postgres_side.Database, opened: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        bare.server.execute(
            sql.SQL('CREATE SCHEMA "its own"'),  # type: ignore[arg-type]
            sql.SQL('GRANT USAGE ON SCHEMA "its own" TO {}').format(sql.Identifier(bare.role)),
            sql.SQL('CREATE EXTENSION vector SCHEMA "its own"'),  # type: ignore[arg-type]
            database=bare.name,
        )
        store = opened(bare.url)
        store.add(make("about dogs"))
        assert len(store.candidates(agent, [], StubIndexer().vector("about dogs"))) == 1
        assert rows(store, agent)["about dogs"].features.vector == StubIndexer().vector("about dogs")

    def test_a_role_that_owns_nothing_may_use_what_the_owner_made(
        self, postgres: postgres_side.Database, make: MakeMemory, agent: Namespace
    ) -> None:
        PostgresMemoryStore.open(postgres.url, StubIndexer()).close()
        with postgres_side.database(postgres.server) as other:
            with postgres.connect() as connection:
                connection.execute(f'GRANT USAGE ON SCHEMA ibex_core TO "{other.role}"')
                connection.execute(
                    f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ibex_core TO "{other.role}"'
                )
            url = postgres.url.replace(postgres.role, other.role, 1)
            try:
                store = PostgresMemoryStore.open(url, StubIndexer())
                store.add(make("tea"))
                assert loaded(store, agent) == {"tea"}
                with pytest.raises(StoreError, match="extproc migrate"):
                    store.prepare(StubIndexer("stub-2", 77))
                store.close()
            finally:
                with postgres.connect() as connection:
                    connection.execute(f'REVOKE ALL ON ALL TABLES IN SCHEMA ibex_core FROM "{other.role}"')
                    connection.execute(f'REVOKE ALL ON SCHEMA ibex_core FROM "{other.role}"')

    def test_a_server_of_any_time_zone_keeps_the_first_and_the_last_day(
        self, postgres: postgres_side.Database, opened: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        zone = sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Tokyo'").format(sql.Identifier(postgres.name))
        postgres.server.execute(zone)
        store = opened(postgres.url)
        ends = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
        for at in (ends[0], NOON, ends[1]):
            store.add(make(f"tea of {at.year}", created_at=at, valid_from=at, session_id="s"))
        store.add(make("milk", created_at=NOON, session_id="s"))  # reads what was said before and after
        read = [
            store.page(agent),
            [row.memory for row in store.candidates(agent, ["tea", "milk"], None)],
            [row.memory for row in rows(store, agent).values()],
        ]
        for memories in read:
            assert sorted(one.created_at for one in memories) == [ends[0], NOON, NOON, ends[1]]

    def test_memories_of_the_release_before_are_kept_whatever_their_metadata(
        self, postgres: postgres_side.Database, opened: Any, agent: Namespace
    ) -> None:
        engine = open_engine(postgres.url)
        with engine.connect().execution_options(writes=True) as first, first.begin():
            first.exec_driver_sql("CREATE SCHEMA ibex_core")
            settings = config()
            settings.attributes["connection"] = first
            command.upgrade(settings, "0004")
            vectors.add(first, 256)
            vectors.add(first, 3)
        engine.dispose()
        metadata = ["{}", "[]", "null", '"x"', "5", '{"slot": 5}', '{"slot": ["a"]}', '{"slot": "na\\u0000me"}']
        metadata += [json.dumps({"slot": "job " * 1000, "of": "🦊"})]
        with postgres.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
            for text in metadata:
                connection.execute(
                    "INSERT INTO ibex_core.memories (id, org_id, agent_id, content, content_hash, content_tokens,"
                    " category, confidence, usefulness, status, source, retrieval_count, created_at, updated_at,"
                    " metadata, revision) VALUES (gen_random_uuid(), %s, %s, %s, repeat('0', 32) || md5(%s), 1,"
                    " 'factual', 0.8, 0.5, 'active', 'extracted', 0, now(), now(), %s, 1)",
                    (agent.org_id, agent.agent_id, text, text, text),
                )
        store = opened(postgres.url)
        assert {one.content for one in store.page(agent)} == loaded(store, agent) == set(metadata)
        with postgres.connect() as connection:
            connection.execute("SELECT set_config('app.current_org_id', %s, true)", (agent.org_id,))
            found = connection.execute("SELECT slot FROM ibex_core.memories WHERE slot IS NOT NULL").fetchall()
            indexes = connection.execute("SELECT relname FROM pg_class WHERE relname ~ '^memories_nearest_'").fetchall()
        assert sorted(slot for (slot,) in found) == ["5", '["a"]', ("job " * 50)]
        # Those of other models are made anew by who uses them; while the table is written anew there is none.
        assert indexes == [("memories_nearest_256",)]
        migrate(postgres.url)

    def test_an_index_of_another_dimension_is_made_beside_readers(
        self, postgres: postgres_side.Database, opened: Any, make: MakeMemory, agent: Namespace
    ) -> None:
        opened(postgres.url).add(make("tea"))
        engine = open_engine(postgres.url)
        writing = engine.connect().execution_options(writes=True)
        with writing as making, making.begin(), postgres.connect() as reading:
            vectors.add(making, 5)
            reading.execute("SET LOCAL lock_timeout = '2s'")  # against the transaction, which is not over
            reading.execute("SELECT count(*) FROM ibex_core.memories")
        engine.dispose()

    def test_stores_that_open_at_once_make_one_column_and_index(self, postgres: postgres_side.Database) -> None:
        from concurrent.futures import ThreadPoolExecutor

        migrate(postgres.url)
        with ThreadPoolExecutor(4) as threads:
            for store in list(threads.map(lambda _: PostgresMemoryStore.open(postgres.url, StubIndexer()), range(4))):
                store.close()

    def test_too_many_dimensions_are_refused_with_a_number(self, store: PostgresMemoryStore) -> None:
        with pytest.raises(StoreError, match="4,000"):
            store.prepare(StubIndexer("stub-9", 5_000))
