from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from extproc.memory import sqlite
from extproc.memory.database import migrate
from extproc.memory.migrations import config
from extproc.memory.model import Category, Memory, Namespace, Status
from extproc.memory.schema import HEAD, metadata
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.memory.store import Added, StoreError, Version, open_store, store_url
from extproc.settings import StoreSettings, load

MakeMemory = Callable[..., Memory]
TABLES = "SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"


def contents(memories: list[Memory]) -> set[str]:
    return {memory.content for memory in memories}


def loaded(store: SqliteMemoryStore, partition: Namespace) -> set[str]:
    with store.snapshot(partition) as snapshot:
        return {memory.content for batch in snapshot.active() for memory in batch}


class TestRows:
    def test_it_comes_back_as_it_went_in(self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace) -> None:
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
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        first = store.add(make("The user likes tea."))
        before = store.version(agent.org_id, agent.agent_id)
        assert store.add(make("The user  likes tea. ")) == Added(first.id, is_new=False)
        assert store.version(agent.org_id, agent.agent_id) == before

    def test_the_same_text_of_another_user_is_another_memory(
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        user = replace(agent, user_id="u1")
        added = store.add_many([make("tea"), make("tea", user), make("tea"), make("tea", user)])
        assert [one is not None and one.is_new for one in added] == [True, True, False, False]

    def test_a_superseded_text_can_be_learned_again(
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        store.add(replace(make("lives in Berlin"), status=Status.SUPERSEDED))
        assert store.add(make("lives in Berlin")).is_new
        assert loaded(store, agent) == {"lives in Berlin"}

    def test_an_id_that_is_taken_is_refused_whoever_has_it(
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        other = Namespace(str(uuid.uuid4()), agent.agent_id)
        memory = make("tea", other)
        store.add(memory)
        assert store.add_many([make("coffee", id=memory.id)]) == [None]
        assert store.get(other, memory.id) == memory

    def test_pages_follow_each_other(self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace) -> None:
        store.add_many([make(f"fact {n}") for n in range(5)])
        first = store.page(agent, 3)
        assert len(contents(first) | contents(store.page(agent, 3, first[-1].id))) == 5


class TestIsolation:
    def test_each_reader_gets_what_is_its_own(self, store: SqliteMemoryStore, make: MakeMemory) -> None:
        orgs, agents = [str(uuid.uuid4()) for _ in range(2)], [str(uuid.uuid4()) for _ in range(2)]
        spaces = [Namespace(org, agent, user) for org in orgs for agent in agents for user in (None, "u1", "u2")]
        memories = {space: make("secret", space) for space in spaces}
        store.add_many(list(memories.values()))
        for space in spaces:
            seen = {Namespace(one.org_id, one.agent_id, one.user_id) for one in store.page(space)}
            assert seen == set(space.partitions())
            with store.snapshot(space) as snapshot:
                assert snapshot.ids() == {memories[space].id}
                assert [one.id for one in snapshot.changed(0, 10)] == [memories[space].id]
            for other, memory in memories.items():
                assert (store.get(space, memory.id) is None) == (not space.can_see(memory))
                if other != space:
                    assert not store.forget(space, memory.id)

    def test_forgetting_a_user_leaves_everyone_else(
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        u1, u2 = replace(agent, user_id="u1"), replace(agent, user_id="u2")
        store.add_many([make("one", u1), make("two", u1), make("three", u2), make("four")])
        assert store.forget_all(u1) == 2
        assert (loaded(store, u1), loaded(store, u2), loaded(store, agent)) == (set(), {"three"}, {"four"})

    def test_feedback_of_another_org_changes_nothing(
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("tea")
        store.add(memory)
        assert store.move_usefulness(str(uuid.uuid4()), [memory.id], 0.1) == []
        store.record_retrievals({(str(uuid.uuid4()), memory.id): 5}, memory.created_at)
        assert store.get(agent, memory.id) == memory


class TestVersions:
    def test_every_write_that_can_change_an_answer_counts(
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        memory = make("tea")
        versions = [store.version(agent.org_id, agent.agent_id)]

        def after(_: object) -> None:
            versions.append(store.version(agent.org_id, agent.agent_id))

        after(store.add(memory))
        after(store.move_usefulness(agent.org_id, [memory.id], 0.1))
        after(store.move_usefulness(agent.org_id, [memory.id], 0.0))
        store.record_retrievals({(agent.org_id, memory.id): 2}, memory.created_at)
        after(None)
        after(store.forget(agent, memory.id))
        after(store.forget(agent, memory.id))
        numbers = [(0, 0), (1, 0), (2, 0), (2, 0), (2, 0), (3, 1), (3, 1)]
        assert versions == [Version(*pair) for pair in numbers]

    def test_a_write_of_another_process_is_seen(
        self, store: SqliteMemoryStore, url: str, make: MakeMemory, agent: Namespace
    ) -> None:
        assert store.version(agent.org_id, agent.agent_id) == Version()
        other = SqliteMemoryStore.open(url)
        other.add(make("tea"))
        other.close()
        assert store.version(agent.org_id, agent.agent_id) == Version(1, 0)

    def test_a_reader_gets_only_what_changed_since(
        self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace
    ) -> None:
        old = make("old")
        store.add_many([old, make("older")])
        store.add(make("new"))
        store.move_usefulness(agent.org_id, [old.id], 0.1)
        with store.snapshot(agent) as snapshot:
            assert contents(snapshot.changed(1, 10)) == {"new", "old"}
            assert len(snapshot.changed(0, 2)) == 2

    def test_a_snapshot_stands_still(self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace) -> None:
        store.add(make("before"))
        with store.snapshot(agent) as snapshot:
            store.add(make("after"))
            assert snapshot.version == Version(1, 0)
            assert [len(batch) for batch in snapshot.active()] == [1]


class TestCounts:
    def test_usefulness_stays_on_its_scale(self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace) -> None:
        memory = make("tea")
        store.add(memory)
        (update,) = store.move_usefulness(agent.org_id, [memory.id, memory.id, str(uuid.uuid4())], 0.7)
        assert (update.memory_id, update.previous, update.new) == (memory.id, 0.5, 1.0)

    def test_retrievals_add_up(self, store: SqliteMemoryStore, make: MakeMemory, agent: Namespace) -> None:
        memory = make("tea")
        store.add(memory)
        for count in (2, 3):
            store.record_retrievals({(agent.org_id, memory.id): count}, memory.created_at)
        found = store.get(agent, memory.id)
        assert found is not None
        assert (found.retrieval_count, found.last_retrieved_at) == (5, memory.created_at)


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
            loaded(store, agent)

    def test_another_database_is_named_as_not_supported(self) -> None:
        with pytest.raises(StoreError, match="IBEX_DATABASE_URL"):
            open_store(load(StoreSettings, database_url="postgresql://localhost/x"))
