"""On SQLite here; tests/integration/turns runs the same on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import insert, update
from starlette.applications import Starlette
from starlette.testclient import TestClient

from extproc.memory.database import BUSY_TIMEOUT_MS, Database, act_for
from extproc.memory.schema import failed_tasks, sessions, turns
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.sessions import LeftBehind, Sessions, TerminatedSession
from extproc.turns.sessions_api import session_routes
from extproc.turns.sinks import ExtractionTask, Unavailable
from extproc.turns.sweeper import Sweeper
from extproc.turns.turn import TurnText, session_id, task_id
from tests.unit.turns.test_checkpoint import AGENT, NOW, RETENTION_S, add_session, entry, rows

HOUR = timedelta(hours=1)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/memories.db")
    yield made
    made.close()


@pytest.fixture
def org() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def sink(database: Database) -> DatabaseCheckpoints:
    return DatabaseCheckpoints(database, RETENTION_S)


@pytest.fixture
def its(database: Database) -> Sessions:
    return Sessions(database)


def extracted(database: Database, org: str, turns_done: int) -> None:
    def write(connection: Any) -> None:
        act_for(connection, org)
        connection.execute(update(sessions).where(sessions.c.org_id == org).values(extracted_turns=turns_done))

    database.run(write)


def set_aside(database: Database, org: str, task: str, reason: str) -> None:
    def write(connection: Any) -> None:
        act_for(connection, org)
        row = {"payload": {"reason": reason}, "error": "why", "attempts": 1, "failed_at": NOW}
        connection.execute(insert(failed_tasks).values(task_id=task, org_id=org, **row))

    database.run(write)


def found(one: LeftBehind) -> tuple[str, str, int]:
    return one.org_id, one.session_id, one.turn_index


class TestTerminate:
    def test_it_is_completed_once(self, its: Sessions, sink: DatabaseCheckpoints, org: str) -> None:
        sink.write([entry(org, "r1", user_id="u1"), entry(org, "r2", 1, user_id="u1")])
        ended = its.terminate(org, AGENT, "u1", "s1", NOW + HOUR)
        assert ended == TerminatedSession(session_id(org, AGENT, "u1", "s1"), "s1", "completed", 2, NOW + HOUR)
        assert its.terminate(org, AGENT, "u1", "s1", NOW + 2 * HOUR) == ended

    def test_a_session_that_went_on_ends_again(self, its: Sessions, sink: DatabaseCheckpoints, org: str) -> None:
        sink.write([entry(org, "r1")])
        its.terminate(org, AGENT, None, "s1", NOW + HOUR)
        sink.write([entry(org, "r2", 2 * 3600)])
        ended = its.terminate(org, AGENT, None, "s1", NOW + 3 * HOUR)
        assert ended is not None
        assert (ended.turn_count, ended.completed_at) == (2, NOW + 3 * HOUR)

    def test_only_its_owner_finds_it(
        self, its: Sessions, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1", user_id="u1")])
        other = str(uuid.uuid4())
        for owner in [(other, AGENT, "u1"), (org, other, "u1"), (org, AGENT, "u2"), (org, AGENT, None)]:
            assert its.terminate(*owner, "s1", NOW) is None
        assert [row.status for row in rows(database, sessions, org)] == ["active"]

    @pytest.mark.parametrize("user", [None, "u1"])
    def test_one_that_another_program_made_is_found(
        self, its: Sessions, sink: DatabaseCheckpoints, database: Database, org: str, user: str | None
    ) -> None:
        its_id = add_session(database, org, user=user)
        sink.write([entry(org, "r1", user_id=user)])
        ended = its.terminate(org, AGENT, user, "s1", NOW + HOUR)
        assert ended == TerminatedSession(its_id, "s1", "completed", 1, NOW + HOUR)


class TestAbandon:
    def test_a_session_without_a_turn_for_long_is_abandoned_until_the_next(
        self, its: Sessions, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1", -1000, session="idle"), entry(org, "r2", -10, session="busy")])
        assert its.abandon_idle(NOW, 600) == 1
        assert its.abandon_idle(NOW, 600) == 0
        states = {row.external_id: (row.status, row.completed_at) for row in rows(database, sessions, org)}
        assert states == {"idle": ("abandoned", None), "busy": ("active", None)}
        sink.write([entry(org, "r3", -900, session="idle")])
        assert {row.status for row in rows(database, sessions, org)} == {"active"}

    def test_those_of_every_organisation_are_found(self, its: Sessions, sink: DatabaseCheckpoints) -> None:
        sink.write([entry(str(uuid.uuid4()), "r1", -1000) for _ in range(5)])
        assert its.abandon_idle(NOW, 600) == 5

    def test_what_the_client_ended_stays_completed(self, its: Sessions, sink: DatabaseCheckpoints, org: str) -> None:
        sink.write([entry(org, "r1", -1000)])
        its.terminate(org, AGENT, None, "s1", NOW)
        assert its.abandon_idle(NOW, 600) == 0


class TestExpire:
    def test_a_text_is_removed_when_its_time_is_over_and_nothing_else(
        self, its: Sessions, sink: DatabaseCheckpoints, database: Database
    ) -> None:
        orgs = [str(uuid.uuid4()) for _ in range(3)]
        for org in orgs:
            sink.write([entry(org, "old", -RETENTION_S - 1), entry(org, "new", -RETENTION_S)])
        assert its.expire_texts(NOW) == 3
        assert its.expire_texts(NOW) == 0
        for org in orgs:
            assert [row.turn_index for row in rows(database, turns, org)] == [1]
            assert [row.turn_count for row in rows(database, sessions, org)] == [2]

    def test_an_empty_database_has_none(self, its: Sessions) -> None:
        assert its.expire_texts(NOW) == 0


class TestSqliteLog:
    @pytest.fixture
    def log(self, tmp_path: Path) -> Path:
        return tmp_path / "memories.db-wal"

    def test_a_removed_text_is_in_the_log_no_longer_than_its_readers(
        self, its: Sessions, sink: DatabaseCheckpoints, org: str, tmp_path: Path, log: Path
    ) -> None:
        sink.write([entry(org, "old", -RETENTION_S - 1, text=TurnText("kumquat", ""))])
        reader = sqlite3.connect(tmp_path / "memories.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM turns").fetchall()
        began = time.monotonic()
        assert its.expire_texts(NOW) == 1
        assert its.expire_texts(NOW) == 0
        assert time.monotonic() - began < BUSY_TIMEOUT_MS / 1000  # nobody waited for the reader
        assert b"kumquat" in log.read_bytes()
        reader.close()
        assert its.expire_texts(NOW) == 0
        assert b"kumquat" not in log.read_bytes()

    def test_a_text_that_an_earlier_process_removed_goes_too(
        self, its: Sessions, sink: DatabaseCheckpoints, database: Database, org: str, log: Path
    ) -> None:
        sink.write([entry(org, "old", text=TurnText("kumquat", ""))])
        database.run(lambda connection: connection.execute(turns.delete()))
        assert b"kumquat" in log.read_bytes()
        its.expire_texts(NOW)
        assert b"kumquat" not in log.read_bytes()

    def test_who_is_left_behind_is_found_while_somebody_writes(
        self, its: Sessions, sink: DatabaseCheckpoints, org: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("extproc.memory.database.BUSY_TIMEOUT_MS", 20)
        sink.write([entry(org, "r1", -700)])
        writer = sqlite3.connect(tmp_path / "memories.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        assert len(its.left_behind(NOW, 600, 10)) == 1
        writer.close()


class TestLeftBehind:
    def test_a_session_is_found_with_its_last_turn_once_it_has_waited(
        self, its: Sessions, sink: DatabaseCheckpoints, org: str
    ) -> None:
        sink.write([entry(org, "r1", -700), entry(org, "r2", -610), entry(org, "fresh", -500, session="s2")])
        assert list(map(found, its.left_behind(NOW, 600, 10))) == [(org, session_id(org, AGENT, None, "s1"), 1)]

    def test_what_is_extracted_is_not_found(
        self, its: Sessions, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, "r1", -700), entry(org, "r2", -700, session="s2", text=None)])
        sink.write([entry(org, "r3", -700, session="s2")])
        extracted(database, org, 1)
        assert list(map(found, its.left_behind(NOW, 600, 10))) == [(org, session_id(org, AGENT, None, "s2"), 1)]
        extracted(database, org, 2)
        assert its.left_behind(NOW, 600, 10) == []

    def test_without_a_text_there_is_nothing_to_extract(
        self, its: Sessions, sink: DatabaseCheckpoints, org: str
    ) -> None:
        sink.write([entry(org, "r1", -700, text=None), entry(org, "r2", -700, session="s2", skip_extraction=True)])
        assert its.left_behind(NOW, 600, 10) == []

    def test_an_ended_session_can_still_be_learnt_from(
        self, its: Sessions, sink: DatabaseCheckpoints, org: str
    ) -> None:
        sink.write([entry(org, "r1", -700), entry(org, "r2", -700, session="s2")])
        its.terminate(org, AGENT, None, "s1", NOW)
        its.abandon_idle(NOW, 600)
        assert len(its.left_behind(NOW, 600, 10)) == 2

    def test_the_longest_waiting_come_first_whoever_they_belong_to(
        self, its: Sessions, sink: DatabaseCheckpoints
    ) -> None:
        orgs = [str(uuid.uuid4()) for _ in range(4)]
        sink.write([entry(org, "r1", -1000 + 10 * n) for n, org in enumerate(orgs)])
        sink.write([entry(orgs[0], "r2", -900, session="s2")])
        assert [one.org_id for one in its.left_behind(NOW, 600, 4)] == orgs

    def test_that_of_a_deadly_task_is_left_alone_until_it_goes_on_or_is_replayed(
        self, its: Sessions, sink: DatabaseCheckpoints, database: Database, org: str
    ) -> None:
        sink.write([entry(org, f"r{n}", -900 + n, session=f"s{n}") for n in range(3)])
        ids = [session_id(org, AGENT, None, f"s{n}") for n in range(3)]
        set_aside(database, org, task_id(org, ids[0], 0), "deadly")
        set_aside(database, org, task_id(org, ids[1], 0), "refused")
        assert [one.session_id for one in its.left_behind(NOW, 600, 1)] == [ids[1]]
        assert [one.session_id for one in its.left_behind(NOW, 600, 10)] == ids[1:]
        sink.write([entry(org, "r3", -700, session="s0")])
        assert {one.session_id for one in its.left_behind(NOW, 600, 10)} == set(ids)


class TestClaim:
    def test_one_of_all_sweeps_in_a_while(self, its: Sessions, database: Database) -> None:
        other = Sessions(database)
        assert its.claim_sweep(NOW, 30)
        assert not other.claim_sweep(NOW + timedelta(seconds=29), 30)
        assert other.claim_sweep(NOW + timedelta(seconds=30), 30)
        assert not its.claim_sweep(NOW + timedelta(seconds=30), 30)

    def test_a_clock_that_is_far_ahead_stops_nobody(self, its: Sessions) -> None:
        assert its.claim_sweep(NOW + HOUR, 30)
        assert its.claim_sweep(NOW, 30)


class Queue:
    """Takes tasks, or is away."""

    def __init__(self) -> None:
        self.tasks: list[ExtractionTask] = []
        self.is_away = False

    def send(self, tasks: Sequence[ExtractionTask]) -> None:
        if self.is_away:
            raise Unavailable("no broker")
        self.tasks += tasks

    def close(self) -> None: ...


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def sweeper(its: Sessions, queue: Queue) -> Sweeper:
    return Sweeper(its, queue, interval_s=0.02, idle_s=600, after_s=600)


class TestSweeper:
    def test_a_session_left_behind_is_sent_once_a_pause_and_turn(
        self, sweeper: Sweeper, sink: DatabaseCheckpoints, queue: Queue, org: str
    ) -> None:
        its_id = session_id(org, AGENT, None, "s1")
        sink.write([entry(org, "r1", -700)])
        sent = []
        for seconds in (0, 10, 599, 601):
            sweeper.sweep(NOW + timedelta(seconds=seconds))
            sent.append(len(queue.tasks))
        assert sent == [1, 1, 1, 2]
        assert queue.tasks == [ExtractionTask(task_id(org, its_id, 0), its_id, org)] * 2
        sink.write([entry(org, "r2", 0)])
        sweeper.sweep(NOW + timedelta(seconds=602))
        assert queue.tasks[2].id == task_id(org, its_id, 1)

    def test_those_sent_a_moment_ago_do_not_stand_in_the_way(
        self, sweeper: Sweeper, sink: DatabaseCheckpoints, queue: Queue, org: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("extproc.turns.sweeper._MOST_SENT", 2)
        sink.write([entry(org, f"r{n}", -700 - n, session=f"s{n}") for n in range(5)])
        for seconds in range(3):
            sweeper.sweep(NOW + timedelta(seconds=seconds))
        assert len({task.session_id for task in queue.tasks}) == len(queue.tasks) == 5

    def test_what_no_queue_took_is_sent_by_the_next_sweep(
        self, sweeper: Sweeper, sink: DatabaseCheckpoints, queue: Queue, org: str
    ) -> None:
        sink.write([entry(org, "r1", -700)])
        queue.is_away = True
        with pytest.raises(Unavailable):
            sweeper.sweep(NOW)
        queue.is_away = False
        sweeper.sweep(NOW + timedelta(seconds=1))
        assert len(queue.tasks) == 1

    def test_a_sweep_of_another_replica_counts(
        self, sweeper: Sweeper, its: Sessions, sink: DatabaseCheckpoints, queue: Queue, org: str
    ) -> None:
        sink.write([entry(org, "r1", -700)])
        its.claim_sweep(NOW, 0.01)
        assert sweeper.sweep(NOW) is None
        assert queue.tasks == []

    async def test_no_failure_ends_it(self, sweeper: Sweeper, its: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
        swept: list[datetime] = []

        def broken(now: datetime, _pause_s: float) -> bool:
            swept.append(now)
            raise [Unavailable("away"), RuntimeError("bug")][len(swept) % 2]

        monkeypatch.setattr(its, "claim_sweep", broken)
        failed_before = REGISTRY.get_sample_value("ibex_sweeps_failed_total") or 0
        sweeper.start()
        for _ in range(4500):
            if len(swept) >= 4:
                break
            await asyncio.sleep(0.01)
        await sweeper.stop()
        assert len(swept) >= 4
        assert (REGISTRY.get_sample_value("ibex_sweeps_failed_total") or 0) >= failed_before + 3


@pytest.fixture
def client(its: Sessions) -> Iterator[TestClient]:
    with TestClient(Starlette(routes=list(session_routes(its)))) as made:
        yield made


class TestApi:
    @pytest.mark.parametrize("in_body", [True, False])
    def test_a_session_is_terminated_by_query_or_body(
        self, client: TestClient, sink: DatabaseCheckpoints, org: str, *, in_body: bool
    ) -> None:
        sink.write([entry(org, "r1", user_id="u1")])
        fields = {"org_id": org.upper(), "agent_id": AGENT, "user_id": "u1"}
        request_id = str(uuid.uuid4())
        response = client.post(
            "/v1/sessions/s1/terminate",
            headers={"x-request-id": request_id},
            **({"json": fields} if in_body else {"params": fields}),  # type: ignore[arg-type]
        )
        assert response.status_code == 200
        assert response.headers["x-request-id"] == request_id
        shown = response.json()
        assert datetime.fromisoformat(shown.pop("completed_at")).tzinfo is not None
        assert shown == {
            "session_id": session_id(org, AGENT, "u1", "s1"),
            "external_id": "s1",
            "status": "completed",
            "turn_count": 1,
        }

    def test_any_visible_characters_name_a_session(
        self, client: TestClient, sink: DatabaseCheckpoints, org: str
    ) -> None:
        sink.write([entry(org, "r1", session="a/b?c#d")])
        path = "/v1/sessions/a%2Fb%3Fc%23d/terminate"
        assert client.post(path, params={"org_id": org, "agent_id": AGENT}).json()["external_id"] == "a/b?c#d"

    @pytest.mark.parametrize(
        ("session", "fields", "status", "code", "field"),
        [
            ("s1", {"org_id": "{org}"}, 400, "MISSING_AGENT_ID", None),
            ("s1", {"agent_id": AGENT}, 400, "VALIDATION_ERROR", "org_id"),
            ("s1", {"org_id": 7, "agent_id": AGENT}, 400, "VALIDATION_ERROR", "org_id"),
            ("s1", {"org_id": "{org}", "agent_id": "Ada"}, 400, "VALIDATION_ERROR", "agent_id"),
            ("s1", {"org_id": "{org}", "agent_id": AGENT, "user_id": ""}, 400, "VALIDATION_ERROR", "user_id"),
            ("s1", {"org_id": "{org}", "agent_id": AGENT, "user_id": "a\nb"}, 400, "VALIDATION_ERROR", "user_id"),
            ("x" * 65, {"org_id": "{org}", "agent_id": AGENT}, 400, "VALIDATION_ERROR", "external_id"),
            ("%C3%A4", {"org_id": "{org}", "agent_id": AGENT}, 400, "VALIDATION_ERROR", "external_id"),
            ("s1", {"org_id": "{org}", "agent_id": AGENT}, 404, "NOT_FOUND", None),
        ],
    )
    def test_what_is_wrong_is_said_in_the_envelope(
        self,
        client: TestClient,
        org: str,
        session: str,
        fields: dict[str, Any],
        status: int,
        code: str,
        field: str | None,
    ) -> None:
        named = {name: org if value == "{org}" else value for name, value in fields.items()}
        response = client.post(f"/v1/sessions/{session}/terminate", json=named)
        assert response.status_code == status
        error = response.json()["error"]
        assert (error["code"], error["request_id"]) == (code, response.headers["x-request-id"])
        assert [one["field"] for one in error.get("field_errors", [])] == ([field] if field else [])
        assert datetime.fromisoformat(error["timestamp"]).tzinfo is not None

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (b"{", 400, "INVALID_JSON"),
            (b"[" * 60_000, 400, "INVALID_JSON"),
            (b"\xff", 400, "INVALID_JSON"),
            (b"[]", 400, "VALIDATION_ERROR"),
            (b" " * 65_537, 413, "PAYLOAD_TOO_LARGE"),
        ],
    )
    def test_a_body_that_cannot_be_read_is_refused(
        self, client: TestClient, body: bytes, status: int, code: str
    ) -> None:
        response = client.post("/v1/sessions/s1/terminate", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    def test_another_method_is_not_allowed(self, client: TestClient, method: str) -> None:
        response = client.request(method, "/v1/sessions/s1/terminate")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert response.json()["error"]["code"] == "METHOD_NOT_ALLOWED"

    @pytest.mark.parametrize("problem", [Unavailable("away"), None])
    def test_a_database_that_is_away_or_silent_is_a_degraded_service(
        self, client: TestClient, its: Sessions, org: str, monkeypatch: pytest.MonkeyPatch, problem: Exception | None
    ) -> None:
        monkeypatch.setattr("extproc.turns.sessions_api._LIMIT_S", 0.05)

        def terminate(*_: Any) -> None:
            if problem:
                raise problem
            time.sleep(0.5)

        monkeypatch.setattr(Sessions, "terminate", terminate)
        response = client.post("/v1/sessions/s1/terminate", params={"org_id": org, "agent_id": AGENT})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "SERVICE_DEGRADED")
        assert "try again" in response.json()["error"]["message"]

    def test_a_bug_shows_nothing_of_itself(self, client: TestClient, org: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def terminate(*_: Any) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(Sessions, "terminate", terminate)
        response = client.post("/v1/sessions/s1/terminate", params={"org_id": org, "agent_id": AGENT})
        assert response.status_code == 500
        assert "secret" not in json.dumps(response.json())

    async def test_a_half_sent_request_is_answered_when_the_listener_stops_and_is_no_bug(self, its: Sessions) -> None:
        """uvicorn cancels what is under way when it stops, and logs whatever comes out of it as an error."""
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/sessions/s1/terminate",
            "headers": [],
            "query_string": b"",
        }
        app = Starlette(routes=session_routes(its))
        under_way = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.05)
        under_way.cancel()
        await asyncio.wait_for(under_way, 5)
        assert [message.get("status") for message in sent] == [503, None]
        assert json.loads(sent[1]["body"])["error"]["code"] == "SERVICE_DEGRADED"
