"""Checkpoints on a real PostgreSQL: everything that holds on SQLite, and what only this database can do."""

from __future__ import annotations

import multiprocessing
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from extproc.memory.database import Database, act_for, act_for_sweep, migrate, open_engine
from extproc.memory.schema import checkpoints, failed_tasks, metadata, sessions, turns
from extproc.memory.store import StoreError
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.sinks import Refused, Unavailable, Written
from tests.integration.turns import postgres_side
from tests.unit.turns.test_checkpoint import (
    RETENTION_S,
    TestConcurrency,
    TestErrors,
    TestReplay,
    TestRows,
    TestSessionOfAnotherProgram,
    TestStatus,
    counted,
    entry,
    org,
    rows,
    sink,
    stored,
)

__all__ = [
    "TestConcurrency",
    "TestErrors",
    "TestReplay",
    "TestRows",
    "TestSessionOfAnotherProgram",
    "TestStatus",
    "org",
    "sink",
]

TENANT_TABLES = {
    *("sessions", "checkpoints", "turns", "failed_tasks", "forgotten"),
    *("agents", "api_tokens", "directives", "directive_versions"),
}


@pytest.fixture
def url(postgres: postgres_side.Database) -> str:
    return postgres.url


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url)
    yield made
    made.close()


def acting_for(connection: psycopg.Connection, org_id: str) -> None:
    connection.execute("SELECT set_config('app.current_org_id', %s, true)", (org_id,))


class TestMigrations:
    @pytest.fixture
    def postgres(self, bare: postgres_side.Database) -> postgres_side.Database:
        return bare

    def test_they_build_the_tables_of_the_schema(self, url: str) -> None:
        migrate(url)
        engine = open_engine(url)

        def is_ours(_object: object, name: str | None, kind: str, *_: object) -> bool:
            return kind != "table" or not str(name).startswith("memor")  # they differ: tests/integration/memory

        with engine.connect() as connection:
            connection.execute(text("SET LOCAL search_path TO ibex_core"))
            options = {"include_object": is_ours, "compare_type": True, "version_table_schema": "ibex_core"}
            differences = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
        engine.dispose()
        assert [one for one in differences if "alembic_version" not in str(one)] == []

    def test_types_are_the_databases_own(self, postgres: postgres_side.Database) -> None:
        migrate(postgres.url)
        with postgres.connect() as connection:
            types: dict[str, str] = dict(
                connection.execute(
                    "SELECT table_name || '.' || column_name, data_type FROM information_schema.columns"
                    " WHERE table_schema = 'ibex_core' AND table_name NOT LIKE 'memor%'"
                ).fetchall()
            )
        assert {types[name] for name in types if name.endswith((".org_id", ".session_id", "sessions.id"))} == {"uuid"}
        assert {types[name] for name in types if name.endswith("_at")} == {"timestamp with time zone"}
        assert types["sessions.total_input_tokens"] == "bigint"
        assert types["checkpoints.is_complete"] == "boolean"
        assert types["checkpoints.turn_index"] == "integer"

    def test_processes_that_start_at_once_make_one_database(self, url: str, org: str) -> None:
        context = multiprocessing.get_context("spawn")
        with context.Pool(3) as pool:
            pool.map(migrate, [url] * 6)
        database = Database(url)
        assert counted(database, org) == [0, 0, 0]
        database.close()

    def test_a_role_without_the_right_to_make_tables_may_start_once_they_are_made(
        self, postgres: postgres_side.Database, org: str
    ) -> None:
        migrate(postgres.url)
        with postgres_side.database(postgres.server) as other:
            with postgres.connect() as connection:
                connection.execute(f'GRANT USAGE ON SCHEMA ibex_core TO "{other.role}"')
                connection.execute(
                    f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ibex_core TO "{other.role}"'
                )
            database = Database(postgres.url.replace(postgres.role, other.role, 1))
            try:
                assert DatabaseCheckpoints(database, RETENTION_S).write([entry(org, "r1")]) == [stored(org, 0)]
            finally:
                database.close()
                with postgres.connect() as connection:
                    connection.execute(f'REVOKE ALL ON ALL TABLES IN SCHEMA ibex_core FROM "{other.role}"')
                    connection.execute(f'REVOKE ALL ON SCHEMA ibex_core FROM "{other.role}"')

    def test_tables_of_a_newer_release_are_an_error(self, postgres: postgres_side.Database) -> None:
        migrate(postgres.url)
        with postgres.connect() as connection:
            connection.execute("UPDATE ibex_core.alembic_version SET version_num = '9999'")
        with pytest.raises(StoreError, match="newer release"):
            migrate(postgres.url)


class TestIsolation:
    def test_the_role_of_these_tests_is_below_row_security(self, postgres: postgres_side.Database) -> None:
        with postgres.connect() as connection:
            rights = connection.execute(
                "SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
        assert rights == (False, False)

    def test_it_is_enabled_and_forced_on_every_table_with_an_organisation(
        self, postgres: postgres_side.Database
    ) -> None:
        migrate(postgres.url)
        with postgres.connect() as connection:
            tables = connection.execute("""
                SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity
                FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
                WHERE c.relnamespace = 'ibex_core'::regnamespace AND c.relkind IN ('r', 'p') AND a.attname = 'org_id'
            """).fetchall()
        parts = {f"{table}_{number:02}" for table in ("memories", "memory_terms") for number in range(16)}
        assert {name for name, *_ in tables} == TENANT_TABLES | parts | {"memories", "memory_terms", "memory_versions"}
        assert all(is_enabled and is_forced for _, is_enabled, is_forced in tables)

    def test_another_organisation_sees_and_changes_nothing_through_the_programs_own_functions(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        other = str(uuid.uuid4())

        def everything(connection: Any) -> list[int]:
            act_for(connection, other)
            # No condition on org_id: what keeps rows away is the database.
            seen = [len(connection.execute(table.select()).all()) for table in (sessions, checkpoints, turns)]
            changed = connection.execute(sessions.update().values(status="error")).rowcount
            return [*seen, changed, connection.execute(turns.delete()).rowcount]

        assert database.run(everything) == [0, 0, 0, 0, 0]
        assert counted(database, org) == [1, 1, 1]

    def test_nothing_is_written_for_another_organisation_than_the_one_acted_for(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        row = {"task_id": "t1", "org_id": org, "payload": {}, "error": "", "attempts": 1}

        def write(connection: Any) -> None:
            act_for(connection, str(uuid.uuid4()))
            connection.execute(failed_tasks.insert(), {**row, "failed_at": entry(org, "r1").turn.completed_at})

        with pytest.raises(StoreError, match="refuses"):
            database.run(write)

    @pytest.mark.parametrize("acting", ["nobody", "an empty name", "somebody else", "the sweep"])
    def test_raw_sql_finds_the_same(
        self, sink: DatabaseCheckpoints, postgres: postgres_side.Database, org: str, acting: str
    ) -> None:
        sink.write([entry(org, "r1")])
        with postgres.connect() as connection:
            match acting:
                case "an empty name":
                    acting_for(connection, "")
                case "somebody else":
                    acting_for(connection, str(uuid.uuid4()))
                case "the sweep":
                    connection.execute("SELECT set_config('app.sweep', 'on', true)")
            for table in TENANT_TABLES - ({"sessions"} if acting == "the sweep" else set()):
                assert connection.execute(f"SELECT count(*) FROM ibex_core.{table}").fetchone() == (0,)
            assert connection.execute("UPDATE ibex_core.sessions SET status = 'error'").rowcount == 0
            assert connection.execute("DELETE FROM ibex_core.turns").rowcount == 0
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("INSERT INTO ibex_core.failed_tasks VALUES ('t', %s, '{}', '', 1, now())", (org,))
            connection.rollback()

    def test_the_sweep_sees_all_sessions_and_only_in_its_own_transaction(
        self, sink: DatabaseCheckpoints, database: Database
    ) -> None:
        sink.write([entry(str(uuid.uuid4()), "r1") for _ in range(3)])

        def count(connection: Any) -> int:
            return len(connection.execute(sessions.select()).all())

        def as_sweep(connection: Any) -> int:
            act_for_sweep(connection)
            return count(connection)

        assert database.run(as_sweep) == 3
        assert database.run(count) == 0

    def test_an_organisation_can_be_named_again_after_the_sweep(self, database: Database, org: str) -> None:
        def both(connection: Any) -> int:
            act_for_sweep(connection)
            act_for(connection, org)
            return len(connection.execute(sessions.select()).all())

        DatabaseCheckpoints(database, RETENTION_S).write([entry(org, "r1"), entry(str(uuid.uuid4()), "r1")])
        assert database.run(both) == 1


class TestAppendOnly:
    @pytest.mark.parametrize(
        "change", ["UPDATE ibex_core.checkpoints SET model = ''", "DELETE FROM ibex_core.checkpoints"]
    )
    def test_a_checkpoint_stays_as_it_is(
        self, sink: DatabaseCheckpoints, postgres: postgres_side.Database, org: str, change: str
    ) -> None:
        sink.write([entry(org, "r1")])
        with postgres.connect() as connection:
            acting_for(connection, org)
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
                connection.execute(change)
            connection.rollback()
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
                connection.execute("TRUNCATE ibex_core.checkpoints")
            connection.rollback()

    def test_retention_may_remove_one_and_never_change_it(
        self, sink: DatabaseCheckpoints, postgres: postgres_side.Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        with postgres.connect() as connection:
            acting_for(connection, org)
            connection.execute("SET LOCAL app.retention = 'on'")
            with pytest.raises(psycopg.errors.RaiseException), connection.transaction():
                connection.execute("UPDATE ibex_core.checkpoints SET model = ''")
            assert connection.execute("DELETE FROM ibex_core.checkpoints").rowcount == 1


class TestFailures:
    def test_a_server_that_is_away_is_unavailable_and_found_again(
        self, sink: DatabaseCheckpoints, database: Database, postgres: postgres_side.Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        postgres.stop()
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                sink.write([entry(org, "r2", 1)])
            assert postgres.password not in str(caught.value)
        postgres.start()
        assert sink.write([entry(org, "r1"), entry(org, "r2", 1)]) == [stored(org, 0, is_new=False), stored(org, 1)]

    def test_a_restart_between_two_batches_is_not_noticed(
        self, sink: DatabaseCheckpoints, postgres: postgres_side.Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        postgres.stop()
        postgres.start()
        assert sink.write([entry(org, "r2", 1)]) == [stored(org, 1)]

    def test_a_server_that_is_away_at_start_is_no_error_of_the_start(
        self, postgres: postgres_side.Database, org: str
    ) -> None:
        postgres.stop()
        database = Database(postgres.url)
        sink = DatabaseCheckpoints(database, RETENTION_S)
        with pytest.raises(Unavailable, match="refused"):
            sink.write([entry(org, "r1")])
        postgres.start()
        assert sink.write([entry(org, "r1")]) == [stored(org, 0)]
        sink.close()

    def test_a_replica_that_only_reads_is_unavailable_until_it_writes(
        self, sink: DatabaseCheckpoints, postgres: postgres_side.Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        with postgres.connect() as connection:
            connection.execute(f'ALTER DATABASE "{postgres.name}" SET default_transaction_read_only = on')
        postgres.stop()
        postgres.start()
        with pytest.raises(Unavailable, match="read-only"):
            sink.write([entry(org, "r2", 1)])
        with postgres.connect() as connection:
            connection.execute("SET TRANSACTION READ WRITE")
            connection.execute(f'ALTER DATABASE "{postgres.name}" RESET default_transaction_read_only')
        assert sink.write([entry(org, "r2", 1)]) == [stored(org, 1)]

    @pytest.mark.parametrize("is_connected", [True, False])
    def test_a_server_that_stands_still_is_unavailable_in_time_and_found_again(
        self, url: str, org: str, postgres: postgres_side.Database, *, is_connected: bool
    ) -> None:
        database = Database(url)
        if is_connected:
            counted(database, org)
        with frozen(postgres):
            for _ in range(2):  # the second has no connection in any case
                began = time.monotonic()
                with pytest.raises(StoreError, match=r"does not answer|timeout"):
                    database.run(lambda connection: act_for(connection, org), limit_s=0.5)
                assert time.monotonic() - began < 8
            began = time.monotonic()
            database.close()
            assert time.monotonic() - began < 4
        assert counted(database, org) == [0, 0, 0]
        database.close()

    def test_a_server_that_stops_still_in_the_middle_of_a_batch_stores_it_when_asked_again(
        self, sink: DatabaseCheckpoints, database: Database, postgres: postgres_side.Database, org: str
    ) -> None:
        counted(database, org)

        def freeze_then_ask(connection: Any) -> None:
            act_for(connection, org)
            with frozen(postgres):
                connection.execute(sessions.select()).all()

        with pytest.raises(StoreError, match="does not answer"):
            database.run(freeze_then_ask, limit_s=0.5)
        assert sink.write([entry(org, "r1")]) == [stored(org, 0)]

    def test_what_only_reads_cannot_write(self, database: Database, org: str) -> None:
        def write(connection: Any) -> None:
            act_for(connection, org)
            connection.execute(sessions.update().values(status="error"))

        with pytest.raises(StoreError, match="read-only"):
            database.run(write, writes=False)
        database.run(write)

    def test_a_lock_that_somebody_keeps_is_unavailable(
        self, database: Database, postgres: postgres_side.Database, org: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sink = DatabaseCheckpoints(database, RETENTION_S)
        sink.write([entry(org, "r1")])
        monkeypatch.setattr("extproc.memory.database._LOCK_SHARE", 0.02)
        with postgres.connect() as connection:
            acting_for(connection, org)
            connection.execute("SELECT 1 FROM ibex_core.sessions FOR UPDATE")
            with pytest.raises(Unavailable, match="lock timeout"):
                sink.write([entry(org, "r2", 1)])
        assert sink.write([entry(org, "r2", 1)]) == [stored(org, 1)]

    def test_missing_rights_are_unavailable_and_no_reason_to_lose_a_turn(
        self, sink: DatabaseCheckpoints, postgres: postgres_side.Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        with postgres.connect() as connection:
            connection.execute(f'REVOKE INSERT ON ibex_core.turns FROM "{postgres.role}"')
        with pytest.raises(Unavailable, match="permission denied"):
            sink.write([entry(org, "r2", 1)])

    def test_a_malformed_id_is_refused_without_showing_it(self, sink: DatabaseCheckpoints, org: str) -> None:
        with pytest.raises(Refused) as caught:
            sink.write([entry(org, "r1", agent_id="secret-agent")])
        assert "secret" not in str(caught.value)

    def test_the_same_request_written_by_two_at_once_is_one_turn(self, url: str, database: Database, org: str) -> None:
        """In two sessions, so that no row of a session orders them."""
        databases = [Database(url) for _ in range(4)]
        counted(database, org)
        start = threading.Barrier(4)

        def write(mine: Database) -> list[Written]:
            start.wait(10)
            name = f"s{databases.index(mine)}"
            return DatabaseCheckpoints(mine, RETENTION_S).write([entry(org, f"r{n}", session=name) for n in range(20)])

        with ThreadPoolExecutor(4) as threads:
            written = [one for mine in threads.map(write, databases) for one in mine]
        for one in databases:
            one.close()
        assert sum(one.is_new for one in written) == len(rows(database, checkpoints, org)) == 20
        assert sum(row.turn_count for row in rows(database, sessions, org)) == 20

    @pytest.mark.parametrize("turned", [False, True])
    def test_sessions_are_locked_in_one_order_whatever_that_of_the_batch(
        self,
        sink: DatabaseCheckpoints,
        database: Database,
        postgres: postgres_side.Database,
        org: str,
        *,
        turned: bool,
    ) -> None:
        first, last = names = ["s1", "s2"]
        sink.write([entry(org, f"first {name}", session=name) for name in names])
        batch = [entry(org, f"second {name}", 1, session=name) for name in names]
        lock = "SELECT 1 FROM ibex_core.sessions WHERE external_id = %s FOR UPDATE SKIP LOCKED"
        with ThreadPoolExecutor(1) as threads, postgres.connect() as other:
            acting_for(other, org)
            other.execute(lock, (first,))
            writing = threads.submit(sink.write, batch[::-1] if turned else batch)
            _wait_for_a_waiter(postgres)
            assert other.execute(lock, (last,)).rowcount == 1
            other.rollback()
            assert len(writing.result(20)) == 2

    def test_a_deadlock_is_tried_again(
        self, sink: DatabaseCheckpoints, database: Database, postgres: postgres_side.Database, org: str
    ) -> None:
        """Another program takes the same two sessions in the other order."""
        names = ["s1", "s2"]
        sink.write([entry(org, f"first {name}", session=name) for name in names])
        lock = "SELECT 1 FROM ibex_core.sessions WHERE external_id = %s FOR UPDATE"
        with ThreadPoolExecutor(1) as threads, postgres.connect() as other:
            acting_for(other, org)
            other.execute(lock, (names[1],))
            writing = threads.submit(sink.write, [entry(org, f"second {name}", 1, session=name) for name in names])
            _wait_for_a_waiter(postgres)
            try:
                other.execute(lock, (names[0],))
            except psycopg.errors.DeadlockDetected:
                other.rollback()
            else:
                other.commit()
            assert [one.is_new for one in writing.result(20)] == [True, True]
        assert counted(database, org)[1] == 4


@contextmanager
def frozen(postgres: postgres_side.Database) -> Iterator[None]:
    """The server's processes stand still: their connections stay open, and the system even accepts new ones."""
    server = postgres.server._process
    assert server is not None
    processes: list[psutil.Process] = []
    try:
        for _ in range(2):  # the first among them makes no others after that
            parent = psutil.Process(server.pid)
            parent.suspend()
            processes = [parent, *parent.children(recursive=True)]
            for process in processes[1:]:
                process.suspend()
        yield
    finally:
        for process in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                process.resume()


def _wait_for_a_waiter(postgres: postgres_side.Database) -> None:
    with psycopg.connect(postgres.server.superuser_url, autocommit=True) as watching:
        for _ in range(200):
            found = watching.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'",
                (postgres.name,),
            ).fetchone()
            if found != (0,):
                return
            threading.Event().wait(0.02)
    raise AssertionError("nobody waits for a lock")
