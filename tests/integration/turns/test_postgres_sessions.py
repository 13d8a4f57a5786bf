"""Sessions on a real PostgreSQL: everything that holds on SQLite, and what only several connections can show."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from extproc.memory.database import Database
from extproc.memory.schema import sessions
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.sessions import Sessions
from extproc.turns.sinks import Unavailable
from extproc.turns.sweeper import Sweeper
from tests.integration.turns import postgres_side
from tests.unit.turns.test_checkpoint import NOW, entry, rows
from tests.unit.turns.test_sessions import (
    Queue,
    TestAbandon,
    TestClaim,
    TestExpire,
    TestLeftBehind,
    TestSweeper,
    TestTerminate,
    its,
    org,
    queue,
    sink,
    sweeper,
)

__all__ = [
    "TestAbandon",
    "TestClaim",
    "TestExpire",
    "TestLeftBehind",
    "TestSweeper",
    "TestTerminate",
    "its",
    "org",
    "queue",
    "sink",
    "sweeper",
]


@pytest.fixture
def database(postgres: postgres_side.Database) -> Iterator[Database]:
    made = Database(postgres.url)
    yield made
    made.close()


def test_of_replicas_that_sweep_at_once_one_sends(
    postgres: postgres_side.Database, sink: DatabaseCheckpoints, queue: Queue
) -> None:
    sink.write([entry(str(uuid.uuid4()), "r1", -700) for _ in range(3)])
    databases = [Database(postgres.url) for _ in range(4)]
    replicas = [Sweeper(Sessions(one), queue, interval_s=60, idle_s=600, after_s=600) for one in databases]
    with ThreadPoolExecutor(4) as threads:
        swept = list(threads.map(lambda replica: replica.sweep(NOW), replicas))
    for one in databases:
        one.close()
    assert sum(one is not None for one in swept) == 1
    assert len(queue.tasks) == 3


def test_a_session_whose_turn_is_being_written_is_left_alone(
    postgres: postgres_side.Database, its: Sessions, sink: DatabaseCheckpoints, database: Database, org: str
) -> None:
    sink.write([entry(org, "r1", -1000), entry(org, "r2", -1000, session="s2")])
    with postgres.connect() as writer:
        writer.execute("SELECT set_config('app.current_org_id', %s, true)", (org,))
        writer.execute("SELECT 1 FROM ibex_core.sessions WHERE external_id = 's1' FOR UPDATE")
        assert its.abandon_idle(NOW, 600) == 1
    assert {row.external_id: row.status for row in rows(database, sessions, org)} == {"s1": "active", "s2": "abandoned"}


def test_a_sweep_without_a_server_is_unavailable_and_the_next_does_the_work(
    postgres: postgres_side.Database, sweeper: Sweeper, sink: DatabaseCheckpoints, queue: Queue, org: str
) -> None:
    sink.write([entry(org, "r1", -700)])
    postgres.stop()
    with pytest.raises(Unavailable):
        sweeper.sweep(NOW)
    postgres.start()
    sweeper.sweep(NOW)
    assert len(queue.tasks) == 1
