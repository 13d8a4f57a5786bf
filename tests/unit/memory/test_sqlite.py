from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from extproc.context.cache import load_index
from extproc.memory import sqlite
from extproc.memory.database import migrate
from extproc.memory.migrations import config
from extproc.memory.model import Memory, Namespace
from extproc.memory.schema import HEAD, metadata
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.memory.store import StoreError, Version, open_store, store_url
from extproc.settings import StoreSettings, load
from tests.unit.memory.stub_indexer import StubIndexer
from tests.unit.memory.test_store import rows

MakeMemory = Callable[..., Memory]
TABLES = "SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"


def test_an_id_of_another_organisation_is_taken_too(
    store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
) -> None:
    other = Namespace(str(uuid.uuid4()), agent.agent_id)
    memory = make("tea", other)
    store.add(memory)
    assert store.add_many([make("coffee", id=memory.id)]) == [None]
    assert store.get(other, memory.id) == memory


def test_what_is_forgotten_is_in_no_file(
    store: SqliteMemoryStore, url: str, make: MakeMemory, agent: Namespace
) -> None:
    secret = "the launch code is kumquat"
    memory = make(secret)
    store.add_many([memory, *(make(f"other {n}") for n in range(50))])
    directory = Path(url.removeprefix("sqlite:///")).parent

    def is_on_disk() -> bool:
        return any(secret.encode() in file.read_bytes() for file in directory.iterdir())

    assert is_on_disk()
    assert store.forget(agent, memory.id)
    assert not is_on_disk()


@pytest.mark.parametrize("metadata", ["[]", "null", '"text"', "5", '{"half": "\\ud800"}'])
def test_metadata_that_another_program_wrote_does_not_hide_the_others(
    store: SqliteMemoryStore, url: str, make: MakeMemory, agent: Namespace, metadata: str
) -> None:
    odd = make("tea")
    store.add_many([odd, make("milk")])
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as raw, raw:
        raw.execute("UPDATE memories SET metadata = ? WHERE id = ?", (metadata, odd.id))
    index = load_index(store, StubIndexer(), agent)
    assert {one.content for one in index.memories(range(index.slots))} == {"tea", "milk"}
    assert len(store.page(agent)) == len(store.page(agent, after=str(uuid.UUID(int=0)))) == 2


class TestFiles:
    @pytest.mark.parametrize("is_replaced", [False, True])
    def test_a_file_that_is_gone_is_an_error_until_it_is_back(
        self,
        store: SqliteMemoryStore,
        url: str,
        agent: Namespace,
        monkeypatch: pytest.MonkeyPatch,
        *,
        is_replaced: bool,
    ) -> None:
        monkeypatch.setattr(sqlite, "_LOOK_S", 0.0)
        file = Path(url.removeprefix("sqlite:///"))
        away = file.rename(file.with_suffix(".away"))
        if is_replaced:
            file.write_bytes(away.read_bytes())
        for _ in range(2):
            with pytest.raises(StoreError, match="restart the engine"):
                store.version(agent.org_id, agent.agent_id)
            with pytest.raises(StoreError, match="restart the engine"):
                store.check()
        away.replace(file)
        store.check()
        assert store.version(agent.org_id, agent.agent_id) == Version()

    def test_the_file_is_looked_at_once_a_second_at_most(
        self, store: SqliteMemoryStore, agent: Namespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: list[Path] = []
        look = os.stat

        def counted(path: Path) -> os.stat_result:
            looks.append(path)
            return look(path)

        monkeypatch.setattr(os, "stat", counted)
        for _ in range(100):
            store.version(agent.org_id, agent.agent_id)
        assert len(looks) <= 1

    def test_what_is_made_is_the_owners_alone(self, store: SqliteMemoryStore, url: str, make: MakeMemory) -> None:
        store.add(make("tea"))
        directory = Path(url.removeprefix("sqlite:///")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}

    def test_what_is_there_keeps_its_mode(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o755)
        file = tmp_path / "memories.db"
        file.touch()
        file.chmod(0o640)
        SqliteMemoryStore.open(f"sqlite:///{file}").close()
        assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, file)] == [0o755, 0o640]

    @pytest.mark.parametrize("name", ["a?b", "a%20b", "a#b c", "ä"])
    def test_any_directory_can_be_named(self, tmp_path: Path, name: str) -> None:
        url = store_url(load(StoreSettings, data=tmp_path / name, database_url=""))
        open_store(load(StoreSettings, database_url=url)).close()
        assert (tmp_path / name / "memories.db").exists()
        assert [path.name for path in tmp_path.iterdir()] == [name]


class TestMigrations:
    def test_the_newest_script_is_the_one_that_the_code_expects(self) -> None:
        assert ScriptDirectory.from_config(config()).get_current_head() == HEAD

    def test_they_build_the_tables_of_the_schema(self, url: str) -> None:
        migrate(url)
        migrated = sqlite3.connect(url.removeprefix("sqlite:///"))
        built = dict(migrated.execute(TABLES).fetchall())
        migrated.close()
        engine = create_engine("sqlite://")
        metadata.create_all(engine)
        with engine.connect() as connection:
            expected = dict(map(tuple, connection.exec_driver_sql(TABLES)))
        engine.dispose()
        del built["alembic_version"]
        assert _words(built) == _words(expected)

    def test_processes_that_start_at_once_make_one_database(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        with context.Pool(3) as pool:
            pool.map(migrate, [url] * 6)
        SqliteMemoryStore.open(url).close()

    def test_the_database_has_a_write_ahead_log(self, store: SqliteMemoryStore, url: str) -> None:
        store.check()
        raw = sqlite3.connect(url.removeprefix("sqlite:///"))
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        raw.close()


def _words(statements: dict[str, str]) -> dict[str, list[str]]:
    return {name: sorted(sql.replace('"', "").replace(",", " ").split()) for name, sql in statements.items()}


class TestErrors:
    @pytest.mark.parametrize(
        "url",
        ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x.db?uri=true", "nonsense", "sqlite:////proc/none/x.db"],
    )
    def test_a_url_that_names_no_file_is_refused(self, url: str) -> None:
        with pytest.raises(StoreError):
            SqliteMemoryStore.open(url)

    def test_a_file_that_is_no_database_is_a_store_error(self, tmp_path: Path) -> None:
        (tmp_path / "memories.db").write_bytes(b"no database at all, " * 100)
        with pytest.raises(StoreError, match="cannot be opened"):
            SqliteMemoryStore.open(f"sqlite:///{tmp_path}/memories.db")

    def test_errors_hold_no_content(
        self, store: SqliteMemoryStore, url: str, make: MakeMemory, agent: Namespace
    ) -> None:
        raw = sqlite3.connect(url.removeprefix("sqlite:///"))
        raw.execute("DROP TABLE memories")
        raw.commit()
        raw.close()
        with pytest.raises(StoreError) as caught:
            store.add(make("secret tea"))
        assert "secret" not in str(caught.value)
        with pytest.raises(StoreError):
            store.page(agent)

    def test_a_row_that_nobody_wrote_is_a_store_error(
        self, store: SqliteMemoryStore, url: str, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add(make("tea"))
        raw = sqlite3.connect(url.removeprefix("sqlite:///"))
        raw.execute("UPDATE memories SET category = 'gossip'")
        raw.commit()
        raw.close()
        with pytest.raises(StoreError, match="row"):
            rows(store, agent)

    def test_another_database_is_named_as_not_supported(self) -> None:
        with pytest.raises(StoreError, match="IBEX_DATABASE_URL"):
            open_store(load(StoreSettings, database_url="mysql://localhost/x"))
