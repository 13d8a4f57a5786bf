"""Real workers on a real queue and database, and conversations for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select

from extproc.memory.database import Database, act_for
from extproc.memory.schema import memories, sessions, turns
from extproc.stack.child import die_with_parent
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.enqueue import RedisTasks
from extproc.turns.sinks import ExtractionTask
from extproc.turns.turn import End, Entry, Turn, TurnText, checkpoint_id, session_id, task_id
from extproc.worker.failed import FailedTask, FailedTasks
from tests.integration.turns import valkey_side

LIMIT_S = 90
ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
RETENTION_S = 86_400


def eventually(is_so: Callable[[], Any], explain: Callable[[], Any] = lambda: "", limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {limit_s} s: {explain()}"
        time.sleep(0.05)


def entry(user: str, external_id: str, text: str, answer: str = "I see.", org_id: str = ORG) -> Entry:
    now, request_id = datetime.now(UTC), str(uuid.uuid4())
    turn = Turn(
        request_id=request_id,
        org_id=org_id,
        agent_id=AGENT,
        user_id=user,
        external_id=external_id,
        session_id=session_id(org_id, AGENT, user, external_id),
        checkpoint_id=checkpoint_id(org_id, request_id),
        end=End.COMPLETE,
        status_code=200,
        is_complete=True,
        messages_hash="0" * 64,
        requested_at=now,
        completed_at=now,
    )
    return Entry(1, turn, TurnText(text, answer))


@dataclass
class Place:
    """A database and a queue, with the workers that a test starts on them."""

    database_url: str
    valkey: valkey_side.Server
    directory: Path
    user: str = field(default_factory=lambda: f"user-{uuid.uuid4()}")
    database: Database = field(init=False)
    queue: RedisTasks = field(init=False)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.database = Database(self.database_url)
        self.queue = RedisTasks(self.valkey.url)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "IBEX_BROKER_URL": self.valkey.url,
            "IBEX_DATABASE_URL": self.database_url,
            "IBEX_ADMIN_LISTEN": "",
        }

    def tell(self, texts: Sequence[str], external_id: str = "talk") -> ExtractionTask:
        """Turns of one session, as the observer stores them; returns the task of the last."""
        checkpoints = DatabaseCheckpoints(self.database, RETENTION_S)
        written = checkpoints.write([entry(self.user, external_id, text) for text in texts])[-1]
        return ExtractionTask(task_id(ORG, written.session_id, written.turn_index), written.session_id, ORG)

    def start(self, *module: str, **settings: str) -> subprocess.Popen[bytes]:
        """A worker, which is ready; `module`: in place of `extproc worker`."""
        log_file = self.directory / f"worker-{len(self.workers)}.log"
        with log_file.open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", *(module or ("extproc", "worker"))],
                env={**self.environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        self.workers.append(worker)
        eventually(lambda: worker.poll() is not None or b'"ready"' in log_file.read_bytes())
        assert worker.poll() is None, log_file.read_text()
        return worker

    def log(self) -> str:
        return "".join(file.read_text() for file in sorted(self.directory.glob("worker-*.log")))

    def contents(self) -> Counter[tuple[str, str]]:
        """Of all memories of the test's user, with their status."""

        def look(connection: Any) -> Counter[tuple[str, str]]:
            act_for(connection, ORG)
            c = memories.c
            query = select(c.content, c.status).where(c.org_id == ORG, c.user_id == self.user)
            return Counter(tuple(row) for row in connection.execute(query))

        return self.database.run(look, writes=False)

    def session(self, task: ExtractionTask) -> tuple[int, int, int]:
        """Turns, extracted turns, texts that are left."""

        def look(connection: Any) -> tuple[int, int, int]:
            act_for(connection, ORG)
            c = sessions.c
            row = connection.execute(select(c.turn_count, c.extracted_turns).where(c.id == task.session_id)).one()
            left = select(func.count()).select_from(turns).where(turns.c.session_id == task.session_id)
            return row.turn_count, row.extracted_turns, connection.execute(left).scalar_one()

        return self.database.run(look, writes=False)

    def is_extracted(self, task: ExtractionTask) -> bool:
        count, extracted, texts = self.session(task)
        return count == extracted and texts == 0

    def failed(self) -> list[FailedTask]:
        return FailedTasks(self.database).all()

    def taken(self) -> list[bytes]:
        """Messages that a worker has taken and not acknowledged."""
        return list(self.valkey.execute("HVALS", "unacked"))

    def waits(self) -> int:
        """Messages that are in the queue, or taken and not acknowledged."""
        return int(self.valkey.execute("LLEN", "extraction")) + int(self.valkey.execute("HLEN", "unacked"))

    def stop_workers(self) -> None:
        """As SIGKILL does, all of them."""
        for worker in self.workers:
            if worker.poll() is None:
                for child in psutil.Process(worker.pid).children(recursive=True):
                    child.kill()
                worker.kill()
                worker.wait(10)

    def stop(self) -> None:
        self.stop_workers()
        self.queue.close()
        self.database.close()


@contextmanager
def place(database_url: str, valkey: valkey_side.Server, directory: Path) -> Iterator[Place]:
    made = Place(database_url, valkey, directory)
    valkey.execute("FLUSHALL")
    try:
        yield made
    finally:
        made.stop()
