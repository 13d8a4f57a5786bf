"""A process with an outbox and its delivery, for tests that kill it. Run: outbox_child.py MODE STATE_DIR SINK_FILE NAME

The sinks are one SQLite file that outlives every process. MODE `put` puts turns as long as it lives and prints the
number of those that are on the disk; `hold` does so with every system down; `drain` delivers what is there and ends;
`full` does as `put` says while its files may not grow, and then while they may.
"""

from __future__ import annotations

import itertools
import resource
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from extproc.turns.delivery import Delivery, Pace
from extproc.turns.outbox import Outbox
from extproc.turns.sinks import ExtractionTask, Unavailable, Written
from extproc.turns.turn import Entry
from tests.unit.turns.outbox_side import TEXT, turn

_TABLES = """
CREATE TABLE IF NOT EXISTS checkpoints (turn_index INTEGER PRIMARY KEY, request_id TEXT UNIQUE, text TEXT);
CREATE TABLE IF NOT EXISTS tasks (id TEXT PRIMARY KEY, sent INTEGER);
CREATE TABLE IF NOT EXISTS traces (request_id TEXT);
CREATE TABLE IF NOT EXISTS tokens (token TEXT PRIMARY KEY);
"""
_PACE = Pace(first_s=0.02, longest_s=0.1, gather_s=0.005, trace_gather_s=0.02)


class Systems:
    """Database, queue and trace table in one file; each call is one transaction of its own connection."""

    def __init__(self, path: Path, *, are_down: bool = False) -> None:
        self._path = path
        self.are_down = are_down
        with self._transaction() as db:
            for statement in _TABLES.strip().split(";\n"):
                db.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = OFF")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        finally:
            db.close()

    def _check(self) -> None:
        if self.are_down:
            raise Unavailable("down")

    def write(self, entries: Sequence[Entry]) -> list[Written]:
        self._check()
        results = []
        with self._transaction() as db:
            for entry in entries:
                text = entry.text.user_text if entry.text else None
                request = entry.turn.request_id
                is_new = db.execute(
                    "INSERT OR IGNORE INTO checkpoints (request_id, text) VALUES (?, ?)", (request, text)
                ).rowcount
                (index,) = db.execute("SELECT turn_index FROM checkpoints WHERE request_id = ?", (request,)).fetchone()
                results.append(Written(index, bool(is_new), entry.turn.session_id, is_same=True))
        return results

    def send(self, tasks: Sequence[ExtractionTask]) -> None:
        self._check()
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO tasks VALUES (?, 1) ON CONFLICT DO UPDATE SET sent = sent + 1",
                [(task.id,) for task in tasks],
            )

    def insert(self, entries: Sequence[Entry], token: str) -> None:
        self._check()
        with self._transaction() as db:
            if db.execute("INSERT OR IGNORE INTO tokens VALUES (?)", (token,)).rowcount:
                db.executemany("INSERT INTO traces VALUES (?)", [(entry.turn.request_id,) for entry in entries])

    def close(self) -> None:
        pass


def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    mode, state, sink, name = sys.argv[1:]
    registry = CollectorRegistry()
    outbox = Outbox(Path(state), 2**26, registry, memory_bytes=2**20, look_s=0.1)
    systems = Systems(Path(sink), are_down=mode in {"hold", "full"})
    delivery = Delivery(outbox, systems, systems, systems, _PACE)
    delivery.start()
    say("ready", outbox.files()[0].path.name)
    if mode in {"put", "hold"}:
        put_for_ever(outbox, name)
    if mode == "full":
        put_on_a_full_disk(outbox, name)
        systems.are_down = False
    deadline = time.monotonic() + 20
    while any(file.waiting_bytes for file in outbox.files()) and time.monotonic() < deadline:
        time.sleep(0.02)
    delivery.stop(5)
    outbox.close()
    committed = registry.get_sample_value("ibex_outbox_committed_turns_total")
    lost = sum(
        registry.get_sample_value("ibex_outbox_dropped_total", {"what": "turn", "why": why}) or 0
        for why in ("disk", "behind")
    )
    say("ended", int(committed or 0), int(lost))


def put_for_ever(outbox: Outbox, name: str) -> None:
    for number in itertools.count():
        outbox.put(turn(f"{name}-{number}"), TEXT)
        if number % 10 == 9:
            assert outbox.flush(20)
            say(number + 1)
            time.sleep(0.002)


def put_on_a_full_disk(outbox: Outbox, name: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    for number in range(3000):
        outbox.put(turn(f"{name}-{number}"), TEXT)
        if number % 100 == 0:
            time.sleep(0.01)
    say("full" if not outbox.flush(0.5) else "not full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outbox.flush(20)
    for number in range(3000, 3100):
        outbox.put(turn(f"{name}-{number}"), TEXT)
    assert outbox.flush(20)


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
