"""Turns a second of one worker process with `rules`, and how long an hour's worth of queue takes to empty.

    python -m bench.worker [--sessions 360] [--turns 10] [--databases sqlite,postgresql]

The real worker under Celery, a real Valkey, both databases. Every turn has a task, as the observer sends them. A second
after the worker began, and then again and again, somebody says something new behind the backlog: how long until that is
remembered. At the end each session is looked at: nothing missing, nothing twice, and the last said holds.

The processor time is the worker process's own; on a busy machine the clock says little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from psycopg import sql
from sqlalchemy import select

from extproc.memory.database import act_for
from extproc.memory.model import Status
from extproc.memory.schema import memories
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.sinks import ExtractionTask
from extproc.turns.turn import task_id
from tests.integration.turns import postgres_side, valkey_side
from tests.integration.worker.worker_side import ORG, RETENTION_S, Place, entry, place

LIMIT_S = 1_800.0
PROBE_PAUSE_S = 1.0
WRITTEN_AT_ONCE = 200
OTHERS = (
    "Can you summarise the third chapter for me?",
    "Our release is on Friday and the staging database still runs on PostgreSQL 15.",
    "Thanks, that works. My sister Ana will join us at the station at 8 pm.",
    "I prefer short answers without bullet points.",
)


def said(session: int, turn: int) -> str:
    """Every other turn moves the user on: of these only the last may hold in the end."""
    if turn % 2 == 0:
        return f"I live in Town{turn:03} now and my locker number is {session}{turn:03}."
    return f"{OTHERS[turn % len(OTHERS)]} ({turn})"


@dataclass
class Run:
    """One backlog on one database."""

    place: Place
    sessions: int
    turns: int
    tasks: list[ExtractionTask] = field(default_factory=list)
    fresh_s: list[float] = field(default_factory=list)
    """From a turn's task being sent to its memory, for turns that came behind the backlog."""

    def fill(self) -> None:
        checkpoints = DatabaseCheckpoints(self.place.database, RETENTION_S)
        # As time has it: the first turn of every session, then the second of every one.
        entries = [
            entry(f"user-{session}", "talk", said(session, turn))
            for turn in range(self.turns)
            for session in range(self.sessions)
        ]
        for start in range(0, len(entries), WRITTEN_AT_ONCE):
            for one in checkpoints.write(entries[start : start + WRITTEN_AT_ONCE]):
                self.tasks.append(ExtractionTask(task_id(ORG, one.session_id, one.turn_index), one.session_id, ORG))
        self.place.queue.send(self.tasks)

    def empty(self) -> tuple[float, float]:
        """Seconds by the clock and of the worker process until nothing waits, new turns beside it."""
        worker = self.place.start()
        began = time.perf_counter()
        (process,) = psutil.Process(worker.pid).children()
        spent = process.cpu_times()
        probe: tuple[ExtractionTask, float] | None = None
        last_probe = began
        while (waits := self.place.waits()) or probe is not None:
            now = time.perf_counter()
            if now - began > LIMIT_S:
                raise SystemExit(f"{waits} tasks still wait after {LIMIT_S} s")
            if probe is not None and self.place.is_extracted(probe[0]):
                self.fresh_s.append(now - probe[1])
                probe = None
            elif probe is None and waits and now - last_probe > PROBE_PAUSE_S:
                probe, last_probe = (self._ask(), now), now
            time.sleep(0.1)
        done = process.cpu_times()
        return time.perf_counter() - began, done.user + done.system - spent.user - spent.system

    def _ask(self) -> ExtractionTask:
        task = self.place.tell(["I am allergic to kumquats."], f"probe-{len(self.fresh_s)}")
        self.place.queue.send([task])
        return task

    def check(self) -> None:
        """Each session's turns once, and of what one user said in a row the last holds."""
        wrong = [session for session in range(self.sessions) if not self._is_right(f"user-{session}")]
        if wrong or self.place.failed():
            raise SystemExit(f"{len(wrong)} sessions are wrong, {len(self.place.failed())} tasks failed")

    def _is_right(self, user: str) -> bool:
        def look(connection: Any) -> list[tuple[str, str, int]]:
            act_for(connection, ORG)
            c = memories.c
            query = select(c.content, c.status, c.turn_index).where(c.org_id == ORG, c.user_id == user)
            return [tuple(row) for row in connection.execute(query)]

        rows = self.place.database.run(look, writes=False)
        last = max(turn for turn in range(self.turns) if turn % 2 == 0)
        homes = [text for text, status, _ in rows if text.startswith("The user lives in") and status == Status.ACTIVE]
        twice = [text for text, times in Counter(text for text, *_ in rows).items() if times > 1]
        told = {turn for _, _, turn in rows} >= {turn for turn in range(self.turns) if turn % 2 == 0}
        return homes == [f"The user lives in Town{last:03}."] and not twice and told


@contextmanager
def on_sqlite(valkey: valkey_side.Server, directory: Path) -> Iterator[Place]:
    with place(f"sqlite:///{directory / 'memories.db'}", valkey, directory) as made:
        yield made


@contextmanager
def on_postgresql(valkey: valkey_side.Server, directory: Path) -> Iterator[Place]:
    with postgres_side.server() as server, postgres_side.database(server) as database:
        server.execute(sql.SQL("CREATE EXTENSION vector"), database=database.name)  # type: ignore[arg-type]
        with place(database.url, valkey, directory) as made:
            yield made


PLACES = {"sqlite": on_sqlite, "postgresql": on_postgresql}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=360)
    parser.add_argument("--turns", type=int, default=10, help="of each session")
    parser.add_argument("--databases", default=",".join(PLACES))
    given = parser.parse_args()
    for database in given.databases.split(","):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (directory / "valkey").mkdir()
            valkey = stack.enter_context(valkey_side.valkey(directory / "valkey"))
            valkey.execute("CONFIG", "SET", "appendfsync", "everysec")  # as `extproc up` has it
            run = Run(stack.enter_context(PLACES[database](valkey, directory)), given.sessions, given.turns)
            run.fill()
            clock_s, cpu_s = run.empty()
            run.check()
            turns = given.sessions * given.turns
            fresh = ", ".join(f"{one:.1f}" for one in run.fresh_s)
            print(
                f"{database}: {turns} turns in {given.sessions} sessions, {len(run.tasks)} tasks: empty after"
                f" {clock_s:.1f} s, {turns / clock_s:.0f} turns a second by the clock, {turns / cpu_s:.0f} of CPU;"
                f" new turns meanwhile remembered after {fresh} s (median {statistics.median(run.fresh_s or [0]):.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
