from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from extproc.memory.database import Database, migrate, open_engine, shown_url
from extproc.memory.migrations import config
from extproc.memory.model import Memory, Namespace
from extproc.memory.reindex import reindex
from extproc.memory.rows import COLUMNS
from extproc.memory.schema import api_tokens, sessions
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.memory.store import StoreError, Version
from extproc.settings import StoreSettings, load
from tests.unit.memory.stub_indexer import StubIndexer

SECRET = "open-sesame"


def shown(url: str) -> str:
    return shown_url(load(StoreSettings, database_url=url))


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "as_shown"),
        [
            (f"postgresql://ada:{SECRET}@db:5432/ibex", "postgresql://ada:***@db:5432/ibex"),
            (f"postgres://ada:{SECRET}@db/ibex", "postgresql://ada:***@db/ibex"),
            (
                f"postgresql+psycopg://ada:{SECRET}@db/ibex?sslmode=require",
                "postgresql://ada:***@db/ibex?sslmode=require",
            ),
            ("sqlite:////var/lib/ibex/memories.db", "sqlite:////var/lib/ibex/memories.db"),
        ],
    )
    def test_they_are_shown_without_the_password(self, url: str, as_shown: str) -> None:
        assert shown(url) == as_shown

    @pytest.mark.parametrize(
        "url",
        [
            f"postgresql://db/ibex?password={SECRET}",
            f"postgresql://db/ibex?sslpassword={SECRET}",
            f"postgresql://ada:{SECRET}/x@db/ibex",  # a slash that is not quoted: the rest looks like a port
            f"{SECRET}",
            f"mysql://ada:{SECRET}@db/ibex",
        ],
    )
    def test_no_form_shows_a_secret(self, url: str) -> None:
        assert SECRET not in shown(url)

    @pytest.mark.parametrize("url", [f"postgresql://db:{SECRET}/x", SECRET, f"mysql://ada:{SECRET}@db/ibex"])
    def test_no_error_shows_a_secret(self, url: str) -> None:
        with pytest.raises(StoreError) as caught:
            Database(url)
        assert SECRET not in str(caught.value)

    def test_without_a_url_it_is_the_file_in_the_data_directory(self, tmp_path: Path) -> None:
        assert shown_url(load(StoreSettings, data=tmp_path, database_url="")) == f"sqlite:///{tmp_path}/memories.db"

    @pytest.mark.parametrize("url", ["nonsense", "mysql://db/x", "postgresql://db:port/x", "sqlite://"])
    def test_one_that_nobody_could_use_is_refused_at_once_and_says_what_can(self, url: str) -> None:
        with pytest.raises(StoreError, match="use sqlite:///PATH"):
            Database(url)

    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2", "postgresql+asyncpg"])
    def test_any_name_of_postgresql_means_the_driver_that_is_installed(self, scheme: str) -> None:
        engine = open_engine(f"{scheme}://ada@db/ibex")
        assert engine.dialect.driver == "psycopg"
        engine.dispose()


class TestTransactions:
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/memories.db"

    def test_nothing_is_opened_before_the_first(self, url: str, tmp_path: Path) -> None:
        database = Database(url)
        assert list(tmp_path.iterdir()) == []
        assert database.run(lambda connection: connection.execute(sessions.select()).all()) == []
        database.close()

    def test_it_can_be_used_after_it_was_closed(self, url: str) -> None:
        database = Database(url)
        for _ in range(2):
            assert database.run(lambda connection: connection.execute(text("SELECT 1")).scalar_one()) == 1
            database.close()

    def test_what_fails_leaves_nothing(self, url: str) -> None:
        database = Database(url)

        def half(connection: Any) -> None:
            connection.execute(text("INSERT INTO sweeps VALUES ('x', '2026-01-01 00:00:00.000000')"))
            raise RuntimeError

        with pytest.raises(RuntimeError):
            database.run(half)
        assert database.run(lambda connection: connection.execute(text("SELECT count(*) FROM sweeps")).scalar()) == 0
        database.close()

    def test_what_only_reads_waits_for_no_writer(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("extproc.memory.database.BUSY_TIMEOUT_MS", 20)
        database = Database(url)
        database.run(lambda connection: connection.execute(text("SELECT 1")))
        raw = sqlite3.connect(tmp_path / "memories.db", isolation_level=None)
        raw.execute("BEGIN IMMEDIATE")
        assert database.run(lambda connection: connection.execute(sessions.select()).all(), writes=False) == []
        with pytest.raises(StoreError, match="locked"):
            database.run(lambda connection: connection.execute(sessions.select()).all())
        raw.close()
        database.close()

    def test_twice_as_many_as_its_connections_run_at_once(self, url: str) -> None:
        database = Database(url, connections=3)
        together = threading.Barrier(6)
        with ThreadPoolExecutor(6) as threads:
            running = [threads.submit(database.run, lambda _: together.wait(10), writes=False) for _ in range(6)]
            assert sorted(one.result(20) for one in running) == list(range(6))
        database.close()

    def test_threads_that_come_first_at_once_open_it_once(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[str] = []

        def noted(url: str) -> None:
            opened.append(url)
            migrate(url)

        monkeypatch.setattr("extproc.memory.database.migrate", noted)
        database = Database(url)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: database.run(lambda connection: None), range(4)))
        assert opened == [url]
        database.close()

    @pytest.mark.parametrize(("limit_s", "attempts"), [(60.0, 4), (0.0, 1)])
    def test_a_connection_that_dies_is_replaced_within_the_limit(self, url: str, limit_s: float, attempts: int) -> None:
        database = Database(url)
        tried: list[object] = []

        def die(connection: object) -> None:
            tried.append(connection)
            raise DBAPIError("", {}, Exception("gone"), connection_invalidated=True)

        with pytest.raises(StoreError):
            database.run(die, limit_s)
        assert len(tried) == attempts
        database.close()

    def test_the_memory_store_may_use_the_same_file(self, url: str) -> None:
        store, database = SqliteMemoryStore.open(url), Database(url)
        database.run(lambda connection: connection.execute(text("DELETE FROM sweeps")))
        store.check()
        store.close()
        database.close()


def test_tables_of_a_newer_release_are_an_error(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/memories.db"
    migrate(url)
    raw = sqlite3.connect(tmp_path / "memories.db")
    raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.commit()
    raw.close()
    with pytest.raises(StoreError, match="newer release"):
        migrate(url)


def migrate_to(revision: str, url: str) -> sqlite3.Connection:
    """As a release of that time would have; the connection is to be closed."""
    engine = open_engine(url)
    with engine.connect() as connection, connection.begin():
        settings = config()
        settings.attributes["connection"] = connection
        command.upgrade(settings, revision)
    engine.dispose()
    return sqlite3.connect(url.removeprefix("sqlite:///"))


def test_a_database_of_the_first_migration_gets_the_others(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/memories.db"
    migrate_to("0001", url).close()
    database = Database(url)
    assert database.run(lambda connection: connection.execute(sessions.select()).all()) == []
    assert database.run(lambda connection: connection.execute(api_tokens.select()).all()) == []
    database.close()


def test_memories_from_before_features_are_all_kept_and_get_them(
    tmp_path: Path, agent: Namespace, make: Callable[..., Memory]
) -> None:
    url = f"sqlite:///{tmp_path}/memories.db"
    raw = migrate_to("0003", url)
    old = [make(f"fact {n}", session_id="s", turn_index=n, metadata={"tags": ["a"]}) for n in range(600)]
    names = [column.name for column in COLUMNS]
    raw.executemany(
        f"INSERT INTO memories ({', '.join(names)}, revision) VALUES ({', '.join('?' * len(names))}, 7)",
        [[_raw(getattr(memory, name)) for name in names] for memory in old],
    )
    raw.execute("INSERT INTO memory_versions VALUES (?, ?, 7, 3)", (agent.org_id, agent.agent_id))
    raw.commit()
    raw.close()
    store = SqliteMemoryStore.open(url, StubIndexer())
    with store.snapshot(agent) as snapshot:
        assert snapshot.version == Version(7, 3)
        assert sorted((row.memory for batch in snapshot.active() for row in batch), key=_turn) == old
    assert reindex(store, StubIndexer(), batch=250) == 600
    store.add(make("fact new"))
    assert {row.memory.content for row in store.candidates(agent, ["5"], None)} == {f"fact {n}" for n in range(3, 8)}
    assert len(store.candidates(agent, ["new"], None)) == 1
    store.close()


def _raw(value: object) -> object:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")
    return json.dumps(value) if isinstance(value, dict) else value


def _turn(memory: Memory) -> int:
    return memory.turn_index or 0
