"""On SQLite here; tests/integration/turns runs the same on PostgreSQL."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Table, select, update

from extproc.memory.database import Database, act_for
from extproc.memory.schema import checkpoints, sessions, turns
from extproc.turns.checkpoint import DatabaseCheckpoints, _storable
from extproc.turns.sinks import Refused, Unavailable, Written
from extproc.turns.turn import End, Entry, Turn, TurnText, checkpoint_id, session_id

AGENT = str(uuid.UUID(int=2))
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
RETENTION_S = 3600
TEXT = TurnText("What is my name?", "Your name is Ada.")


def entry(
    org: str, request_id: str, at_s: float = 0, *, session: str = "s1", text: TurnText | None = TEXT, **changes: Any
) -> Entry:
    """A turn that was asked at NOW + `at_s` and answered one second later."""
    user = changes.get("user_id")
    turn = Turn(
        **{
            "request_id": request_id,
            "org_id": org,
            "agent_id": AGENT,
            "external_id": session,
            "session_id": session_id(org, AGENT, user, session),
            "checkpoint_id": checkpoint_id(org, request_id),
            "end": End.COMPLETE,
            "status_code": 200,
            "model": "gpt-4o-mini",
            "provider": "openai",
            "messages_hash": "a" * 64,
            "total_ms": 1000.0,
            "requested_at": NOW + timedelta(seconds=at_s),
            "completed_at": NOW + timedelta(seconds=at_s + 1),
            **changes,
        }
    )
    return Entry(0, turn, text)


def stored(
    org: str,
    turn_index: int,
    *,
    is_new: bool = True,
    is_same: bool = True,
    session: str = "s1",
    user: str | None = None,
) -> Written:
    return Written(turn_index, is_new, session_id(org, AGENT, user, session), is_same)


def add_session(database: Database, org: str, session: str = "s1", user: str | None = None) -> str:
    """As another program would make it. Returns its id."""
    its_id = str(uuid.uuid4())
    numbers = dict.fromkeys(("turn_count", "total_input_tokens", "total_output_tokens", "total_latency_ms"), 0)
    names = {"id": its_id, "org_id": org, "agent_id": AGENT, "user_id": user, "external_id": session}
    others = {"status": "active", "model": "", "provider": "", "created_at": NOW, "updated_at": NOW}

    def write(connection: Any) -> None:
        act_for(connection, org)
        connection.execute(sessions.insert(), {**names, **numbers, **others})

    database.run(write)
    return its_id


def rows(database: Database, table: Table, org: str) -> Sequence[Any]:
    def read(connection: Any) -> Sequence[Any]:
        act_for(connection, org)
        found: Sequence[Any] = connection.execute(select(table).where(table.c.org_id == org)).all()
        return found

    return database.run(read)


def counted(database: Database, org: str) -> list[int]:
    """Sessions, checkpoints and texts."""
    return [len(rows(database, table, org)) for table in (sessions, checkpoints, turns)]


def set_status(database: Database, org: str, status: str, completed_at: datetime | None) -> None:
    def write(connection: Any) -> None:
        act_for(connection, org)
        connection.execute(
            update(sessions).where(sessions.c.org_id == org).values(status=status, completed_at=completed_at)
        )

    database.run(write)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new/memories.db"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url)
    yield made
    made.close()


@pytest.fixture
def org() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def sink(database: Database) -> DatabaseCheckpoints:
    return DatabaseCheckpoints(database, RETENTION_S)


class TestRows:
    def test_a_turn_becomes_session_checkpoint_and_text(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        facts: dict[str, Any] = {
            "completion_hash": "b" * 64,
            "input_tokens": 12,
            "output_tokens": None,
            "provider_request_id": "chatcmpl-1",
            "is_streaming": True,
            "is_complete": True,
            "memories_injected": 3,
            "context_tokens": 40,
            "context_fallback": False,
        }
        assert sink.write([entry(org, "r1", user_id="u1", **facts)]) == [stored(org, 0, user="u1")]
        (session,) = rows(database, sessions, org)
        its_id = session_id(org, AGENT, "u1", "s1")
        assert session._asdict() == {
            "id": its_id,
            "org_id": org,
            "agent_id": AGENT,
            "user_id": "u1",
            "external_id": "s1",
            "status": "active",
            "model": "gpt-4o-mini",
            "provider": "openai",
            "turn_count": 1,
            "total_input_tokens": 12,
            "total_output_tokens": 0,
            "total_latency_ms": 1000,
            "extracted_turns": 0,
            "created_at": NOW,
            "updated_at": NOW + timedelta(seconds=1),
            "completed_at": None,
        }
        (checkpoint,) = rows(database, checkpoints, org)
        assert checkpoint._asdict() == {
            "id": checkpoint_id(org, "r1"),
            "session_id": its_id,
            "org_id": org,
            "agent_id": AGENT,
            "turn_index": 0,
            "request_id": "r1",
            "messages_hash": "a" * 64,
            "model": "gpt-4o-mini",
            "provider": "openai",
            "latency_ms": 1000,
            "created_at": NOW + timedelta(seconds=1),
            **facts,
        }
        (text,) = rows(database, turns, org)
        assert text._asdict() == {
            "session_id": its_id,
            "org_id": org,
            "turn_index": 0,
            "user_text": TEXT.user_text,
            "assistant_text": TEXT.assistant_text,
            "expires_at": NOW + timedelta(seconds=1 + RETENTION_S),
        }

    def test_turns_are_numbered_in_their_session_across_batches(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1"), entry(org, "other", session="s2")])
        written = sink.write([entry(org, "r2", 1), entry(org, "other 2", session="s2"), entry(org, "r3", 2)])
        assert [one.turn_index for one in written] == [1, 1, 2]
        assert {row.request_id: row.turn_index for row in rows(database, checkpoints, org)} == {
            "r1": 0,
            "r2": 1,
            "r3": 2,
            "other": 0,
            "other 2": 1,
        }

    def test_totals_add_up_and_the_latest_turn_names_model_and_provider(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r2", 10, model="new", provider="anthropic", input_tokens=5, output_tokens=None)])
        sink.write([entry(org, "r1", 0, model="old", input_tokens=7, output_tokens=2)])
        (session,) = rows(database, sessions, org)
        assert (session.model, session.provider) == ("new", "anthropic")
        assert (session.turn_count, session.total_input_tokens, session.total_output_tokens) == (2, 12, 2)
        assert session.total_latency_ms == 2000
        assert (session.created_at, session.updated_at) == (NOW, NOW + timedelta(seconds=11))

    def test_one_batch_may_be_of_several_organisations(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        other = str(uuid.uuid4())
        written = sink.write([entry(org, "r1"), entry(other, "r1"), entry(org, "r2", 1), entry(other, "r2", 1)])
        assert [one.turn_index for one in written] == [0, 0, 1, 1]
        assert counted(database, org) == counted(database, other) == [1, 2, 2]

    def test_an_empty_batch_is_nothing(self, sink: DatabaseCheckpoints) -> None:
        assert sink.write([]) == []

    @pytest.mark.parametrize("silent", [{"text": None}, {"skip_extraction": True}])
    def test_no_text_is_kept_of_a_turn_that_has_none_or_may_not(
        self, sink: DatabaseCheckpoints, database: Database, org: str, silent: dict[str, Any]
    ) -> None:
        sink.write([entry(org, "r1", **silent)])
        assert counted(database, org) == [1, 1, 0]

    def test_text_that_no_database_can_hold_is_replaced(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        odd: dict[str, Any] = {"model": "m\0", "provider_request_id": "\udc00x"}
        sink.write([entry(org, "r1", text=TurnText("a\0b\ud800c", "\ud83d\ude00"), **odd)])
        (text,) = rows(database, turns, org)
        assert (text.user_text, text.assistant_text) == ("a\ufffdb\ufffdc", "😀")
        (checkpoint,) = rows(database, checkpoints, org)
        assert (checkpoint.model, checkpoint.provider_request_id) == ("m\ufffd", "\ufffdx")

    def test_a_count_that_cannot_be_meant_is_unknown(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1", input_tokens=10**30, output_tokens=-1, total_ms=1e300)])
        (checkpoint,) = rows(database, checkpoints, org)
        assert (checkpoint.input_tokens, checkpoint.output_tokens) == (None, None)

    def test_many_turns_of_many_sessions_fit_in_one_batch(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        written = sink.write([entry(org, f"r{n}", n, session=f"s{n % 70}") for n in range(1400)])
        assert [one.turn_index for one in written] == [n // 70 for n in range(1400)]
        assert counted(database, org) == [70, 1400, 1400]


class TestReplay:
    def test_it_adds_nothing_and_tells_the_same_index(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        batch = [entry(org, "r1", input_tokens=5), entry(org, "r2", 1, input_tokens=5)]
        sink.write(batch)
        before = [rows(database, table, org) for table in (sessions, checkpoints, turns)]
        assert sink.write(batch) == [stored(org, 0, is_new=False), stored(org, 1, is_new=False)]
        assert [rows(database, table, org) for table in (sessions, checkpoints, turns)] == before

    def test_known_and_new_turns_may_come_together(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        written = sink.write([entry(org, "r2", 1), entry(org, "r1"), entry(org, "r3", 2)])
        assert written == [stored(org, 1), stored(org, 0, is_new=False), stored(org, 2)]

    def test_one_request_twice_in_a_batch_is_one_turn(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        one = entry(org, "r1")
        assert sink.write([one, entry(org, "r1", 3)]) == [stored(org, 0), stored(org, 0, is_new=False, is_same=False)]
        assert counted(database, org) == [1, 1, 1]

    def test_a_request_id_that_was_used_in_another_session_makes_no_session(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        assert sink.write([entry(org, "r1", session="s2")]) == [stored(org, 0, is_new=False, is_same=False)]
        assert counted(database, org) == [1, 1, 1]

    @pytest.mark.parametrize("changed", [{"at_s": 7}, {"messages_hash": "c" * 64}, {"completion_hash": "c" * 64}])
    def test_another_exchange_with_its_request_id_is_not_the_same(
        self, sink: DatabaseCheckpoints, org: str, changed: dict[str, Any]
    ) -> None:
        first, other = entry(org, "r1"), entry(org, "r1", **changed)
        not_stored = stored(org, 0, is_new=False, is_same=False)
        assert sink.write([first, other]) == [stored(org, 0), not_stored]
        assert sink.write([other, first]) == [not_stored, stored(org, 0, is_new=False)]
        assert sink.write([first, first]) == [stored(org, 0, is_new=False), not_stored]

    def test_a_time_keeps_its_microseconds(self, sink: DatabaseCheckpoints, org: str) -> None:
        one = entry(org, "r1", 0.123457)
        sink.write([one])
        assert [result.is_same for result in sink.write([one])] == [True]


class TestSessionOfAnotherProgram:
    @pytest.mark.parametrize("user", [None, "u1"])
    def test_its_row_gets_the_turns(
        self, sink: DatabaseCheckpoints, database: Database, org: str, user: str | None
    ) -> None:
        its_id = add_session(database, org, user=user)
        batch = [entry(org, "r1", user_id=user, input_tokens=5), entry(org, "r2", 1, user_id=user, input_tokens=5)]
        assert sink.write(batch) == [Written(0, True, its_id, True), Written(1, True, its_id, True)]
        (session,) = rows(database, sessions, org)
        assert (session.id, session.turn_count, session.total_input_tokens) == (its_id, 2, 10)
        for table in (checkpoints, turns):
            assert [row.session_id for row in rows(database, table, org)] == [its_id, its_id]

    def test_a_replay_finds_it(self, sink: DatabaseCheckpoints, database: Database, org: str) -> None:
        its_id = add_session(database, org)
        sink.write([entry(org, "r1")])
        assert sink.write([entry(org, "r1")]) == [Written(0, False, its_id, True)]

    def test_others_in_the_batch_keep_their_own(self, sink: DatabaseCheckpoints, database: Database, org: str) -> None:
        its_id = add_session(database, org, user="u1")
        written = sink.write([entry(org, "r1"), entry(org, "r2", user_id="u1")])
        assert written == [stored(org, 0), Written(0, True, its_id, True)]


class TestStatus:
    @pytest.mark.parametrize(
        ("status", "completed_at_s", "becomes"),
        [
            ("completed", 5, "completed"),
            ("completed", 30, "completed"),
            ("completed", -5, "active"),
            ("abandoned", None, "active"),
            ("error", None, "error"),
        ],
    )
    def test_a_turn_asked_at_0_revives_its_session_unless_that_ended_later(
        self,
        sink: DatabaseCheckpoints,
        database: Database,
        org: str,
        status: str,
        completed_at_s: float | None,
        becomes: str,
    ) -> None:
        sink.write([entry(org, "r1", -60)])
        completed_at = None if completed_at_s is None else NOW + timedelta(seconds=completed_at_s)
        set_status(database, org, status, completed_at)
        sink.write([entry(org, "r2", 0)])
        (session,) = rows(database, sessions, org)
        assert (session.status, session.turn_count) == (becomes, 2)
        assert session.completed_at == (completed_at if becomes == "completed" else None)


class TestConcurrency:
    def test_writers_of_the_same_sessions_at_once_leave_no_gap(self, database: Database, url: str, org: str) -> None:
        """Each batch names the same sessions in another order, and a part of the turns of another writer."""
        batches = [
            [entry(org, f"r{writer % 3}-{n}-{round_}", n, session=f"s{(n * (1 + writer)) % 5}") for n in range(5)]
            for round_ in range(6)
            for writer in range(4)
        ]

        def write(mine: list[list[Entry]]) -> list[Written]:
            other = Database(url)
            try:
                return [one for batch in mine for one in DatabaseCheckpoints(other, RETENTION_S).write(batch)]
            finally:
                other.close()

        with ThreadPoolExecutor(4) as threads:
            written = [one for mine in threads.map(write, [batches[writer::4] for writer in range(4)]) for one in mine]
        stored = rows(database, checkpoints, org)
        assert sum(one.is_new for one in written) == len(stored) == 6 * 3 * 5
        for session in rows(database, sessions, org):
            its = sorted(row.turn_index for row in stored if row.session_id == session.id)
            assert its == list(range(session.turn_count))


class TestErrors:
    def test_a_session_of_another_organisation_is_refused_and_nothing_of_the_batch_stored(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        other = str(uuid.uuid4())
        sink.write([entry(other, "r1")])
        before = rows(database, sessions, other)
        forged = entry(org, "r2", session="s2", session_id=session_id(other, AGENT, None, "s1"))
        with pytest.raises(Refused):
            sink.write([entry(org, "r1"), forged])
        assert counted(database, org) == [0, 0, 0]
        assert rows(database, sessions, other) == before

    def test_a_broken_row_is_refused_without_its_values(
        self, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        secret = TurnText("the launch code", "is kumquat")
        clash = entry(org, "secret-r2", text=secret, checkpoint_id=checkpoint_id(org, "r1"))
        with pytest.raises(Refused) as caught:
            sink.write([clash])
        assert not any(word in str(caught.value) for word in ("launch", "kumquat", "secret", org))
        assert caught.value.__suppress_context__
        assert counted(database, org) == [1, 1, 1]


class TestSqlite:
    def test_a_missing_table_is_unavailable_and_says_what_to_do(
        self, sink: DatabaseCheckpoints, url: str, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        raw = sqlite3.connect(url.removeprefix("sqlite:///"))
        raw.execute("DROP TABLE turns")
        raw.commit()
        raw.close()
        with pytest.raises(Unavailable, match="extproc migrate") as caught:
            sink.write([entry(org, "r2", 1)])
        assert "INSERT" not in str(caught.value)

    def test_a_locked_file_is_unavailable(
        self, sink: DatabaseCheckpoints, url: str, org: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("extproc.memory.database.BUSY_TIMEOUT_MS", 20)
        sink.write([entry(org, "r1")])
        raw = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked"):
            sink.write([entry(org, "r2", 1)])
        raw.execute("ROLLBACK")
        raw.close()
        assert sink.write([entry(org, "r2", 1)]) == [stored(org, 1)]

    def test_a_full_disk_is_unavailable(self, sink: DatabaseCheckpoints, database: Database, org: str) -> None:
        sink.write([entry(org, "r1")])

        def no_more_pages(connection: Any) -> None:
            connection.exec_driver_sql("PRAGMA max_page_count = 1")  # no lower than what is used, and not a page more

        database.run(no_more_pages)
        with pytest.raises(Unavailable, match="full"):
            sink.write([entry(org, "r2", 1, text=TurnText("x" * 500_000, ""))])

    def test_a_place_that_cannot_be_used_is_unavailable(self, org: str) -> None:
        sink = DatabaseCheckpoints(Database("sqlite:////proc/none/x.db"), RETENTION_S)
        with pytest.raises(Unavailable, match="directory"):
            sink.write([entry(org, "r1")])

    def test_a_file_that_was_removed_is_made_again(
        self, sink: DatabaseCheckpoints, database: Database, url: str, org: str
    ) -> None:
        sink.write([entry(org, "r1")])
        Path(url.removeprefix("sqlite:///")).rename(Path(url.removeprefix("sqlite:///")).with_suffix(".away"))
        assert sink.write([entry(org, "r2")]) == [stored(org, 0)]


@given(st.text(st.characters(codec=None)))
def test_what_is_storable_is_utf_8_without_nul_and_otherwise_the_same(text: str) -> None:
    stored = _storable(text)
    assert "\0" not in stored
    stored.encode()
    if "\0" not in text and text.isascii():
        assert stored == text


@given(order=st.lists(st.integers(0, 7), max_size=12), cuts=st.sets(st.integers(0, 12)))
def test_any_order_and_any_batches_store_each_turn_once(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int]
) -> None:
    org = str(uuid.uuid4())
    database = Database(f"sqlite:///{tmp_path_factory.getbasetemp()}/property.db")
    sink = DatabaseCheckpoints(database, RETENTION_S)
    entries = [entry(org, f"r{n}", n, session=f"s{n % 2}", input_tokens=1) for n in order]
    ends = sorted({0, len(entries), *(cut for cut in cuts if cut < len(entries))})
    try:
        written = [one for a, b in pairwise(ends) for one in sink.write(entries[a:b])]
        assert [one.is_new for one in written] == [n not in order[:place] for place, n in enumerate(order)]
        for session in rows(database, sessions, org):
            its = {row.turn_index for row in rows(database, checkpoints, org) if row.session_id == session.id}
            assert its == set(range(session.turn_count))
            assert session.total_input_tokens == session.turn_count
    finally:
        sink.close()
