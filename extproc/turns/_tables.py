"""The tables of an outbox file, and what is read from them. SQL lives here and in `_file`, nowhere else."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "BUSY_TIMEOUT_S",
    "ROW_OVERHEAD_BYTES",
    "Batch",
    "Consumer",
    "FileClosed",
    "FileTrouble",
    "FileUnusable",
    "Mark",
    "NewRow",
    "Row",
    "State",
    "check_version",
    "connect",
    "count_due",
    "is_corrupt",
    "make_tables",
    "oldest_due",
    "problem_of",
    "read_last_seq",
    "read_rows",
    "result_code",
    "scalar",
    "transaction",
]

_VERSION = 2
"""Of the tables, in `PRAGMA user_version`."""
BUSY_TIMEOUT_S = 5.0
"""How long one waits for the other process: `retry_set_aside` commits within milliseconds."""
_MOST_BATCH_BYTES = 8 * 1024**2
"""Of the rows that are read at once; texts can be megabytes. The first row is read whatever its size."""
ROW_OVERHEAD_BYTES = 64
"""What a row takes beside turn and text, about."""

_TABLES = (
    """CREATE TABLE entries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        put_at REAL NOT NULL,               -- unix seconds
        for_checkpoint INTEGER NOT NULL,    -- 1: this consumer has something to do here
        for_enqueue INTEGER NOT NULL,       -- once the checkpoint is written
        for_trace INTEGER NOT NULL,
        turn_index INTEGER,                 -- these three since the checkpoint is written
        traceparent TEXT NOT NULL DEFAULT '',
        session_id TEXT NOT NULL DEFAULT '',
        turn BLOB NOT NULL,
        text BLOB                           -- until the checkpoint is written
    )""",
    """CREATE TABLE consumers (
        name TEXT PRIMARY KEY,
        position INTEGER NOT NULL DEFAULT 0,    -- the last seq that it is done with
        problem TEXT NOT NULL DEFAULT '',       -- why it waits; empty: it does not
        since REAL NOT NULL DEFAULT 0,          -- unix seconds, of that
        batch_end INTEGER,                      -- last seq of the batch in flight, which begins after the position
        batch_token TEXT
    )""",
    """CREATE TABLE set_aside (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        consumer TEXT NOT NULL,
        seq INTEGER NOT NULL,
        set_aside_at REAL NOT NULL,             -- unix seconds
        error TEXT NOT NULL,                    -- the exception's class
        turn_index INTEGER,
        traceparent TEXT NOT NULL,
        session_id TEXT NOT NULL DEFAULT '',
        turn BLOB NOT NULL
    )""",
    "INSERT INTO consumers (name) VALUES ('checkpoint'), ('enqueue'), ('trace')",
    f"PRAGMA user_version = {_VERSION}",
)
_FROM_1 = (
    "ALTER TABLE entries ADD COLUMN session_id TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE set_aside ADD COLUMN session_id TEXT NOT NULL DEFAULT ''",
    f"PRAGMA user_version = {_VERSION}",
)
"""Of a file that version 1 left behind."""


class Consumer(StrEnum):
    """Who takes turns from the outbox. The values are in the files."""

    CHECKPOINT = "checkpoint"
    ENQUEUE = "enqueue"
    TRACE = "trace"


class FileTrouble(Exception):
    """The file cannot be read or written now (disk full, read-only, in use for too long): try again later."""

    def __init__(self, problem: str, *, is_disk_full: bool = False) -> None:
        super().__init__(problem)
        self.is_disk_full = is_disk_full


class FileClosed(FileTrouble):
    """By this process: it is stopping, or the file had nothing in it any more and is gone."""


class FileUnusable(Exception):
    """The file cannot be opened, and trying again is no use."""


class NewRow(NamedTuple):
    put_at: float
    for_checkpoint: bool
    for_enqueue: bool
    turn: bytes
    text: bytes | None

    @property
    def size(self) -> int:
        return ROW_OVERHEAD_BYTES + len(self.turn) + len(self.text or b"")


class Row(NamedTuple):
    """An entry for one consumer."""

    seq: int
    turn: bytes
    text: bytes | None
    """Only for the checkpoint."""
    turn_index: int | None
    traceparent: str
    """Of the checkpoint's span."""
    session_id: str
    """The stored session's row; empty: the turn's own."""


class Mark(NamedTuple):
    """What a written checkpoint leaves in its entry, for the task."""

    turn_index: int | None
    """None: no task is due."""
    traceparent: str
    session_id: str
    """The stored session's row."""


@dataclass(frozen=True, slots=True)
class Batch:
    consumer: Consumer
    rows: list[Row]
    """At least one."""
    end: int
    """With this batch its consumer is done with everything up to this seq."""
    token: str = ""
    """Only for the trace: the same for the same rows, whenever they come again."""


@dataclass(frozen=True, slots=True)
class State:
    """What waits for one consumer."""

    depth: int
    oldest_at: float | None
    """When the oldest was put, unix seconds; None: nothing waits."""
    problem: str = ""
    problem_since: float = 0.0


def connect(path: Path, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        # Two connections, since this is fixed when a statement is prepared, which the driver does once for all.
        for pragma in ("secure_delete = ON", f"synchronous = {synchronous}"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def make_tables(db: sqlite3.Connection) -> None:
    if scalar(db, "SELECT count(*) FROM sqlite_master"):
        if scalar(db, "PRAGMA user_version") == 1:
            _change(db, _FROM_1)
        check_version(db)
        return
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before anything is written
    db.execute("PRAGMA journal_mode = WAL")
    _change(db, _TABLES)


def _change(db: sqlite3.Connection, statements: Sequence[str]) -> None:
    with transaction(db):
        for statement in statements:
            db.execute(statement)


def check_version(db: sqlite3.Connection) -> None:
    version = scalar(db, "PRAGMA user_version")
    if version != _VERSION:
        raise FileUnusable(
            f"the outbox has version {version:.0f}, this release reads {_VERSION}: use the one that wrote it"
        )


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


def read_rows(db: sqlite3.Connection, consumer: Consumer, start: int, end: int, most: int) -> tuple[list[Row], bool]:
    """Rows for a consumer after `start` and up to `end`, and whether that is all of them; `most` -1: no limit."""
    text = "text" if consumer is Consumer.CHECKPOINT else "NULL"
    cursor = db.execute(
        f"SELECT seq, turn, {text}, turn_index, traceparent, session_id FROM entries"  # noqa: S608 - ours
        f" WHERE seq > ? AND seq <= ? AND for_{consumer.value} ORDER BY seq LIMIT ?",
        (start, end, most),
    )
    rows: list[Row] = []
    size = 0
    with closing(cursor):
        for values in cursor:
            row = Row._make(values)
            rows.append(row)
            size += len(row.turn) + len(row.text or b"")
            if size >= _MOST_BATCH_BYTES and most != -1:
                return rows, False
    return rows, most == -1 or len(rows) < most


def count_due(db: sqlite3.Connection, consumer: Consumer, start: int, end: int) -> int:
    where = f"seq > ? AND seq <= ? AND for_{consumer.value}"
    return int(scalar(db, f"SELECT count(*) FROM entries WHERE {where}", start, end))  # noqa: S608 - ours


def oldest_due(db: sqlite3.Connection, consumer: Consumer, start: int, end: int) -> float | None:
    where = f"seq > ? AND seq <= ? AND for_{consumer.value} ORDER BY seq LIMIT 1"
    row = db.execute(f"SELECT put_at FROM entries WHERE {where}", (start, end)).fetchone()  # noqa: S608 - ours
    return None if row is None else float(row[0])


def read_last_seq(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
    return 0 if row is None else int(row[0])


def scalar(db: sqlite3.Connection, query: str, *values: object) -> float:
    return float(db.execute(query, values).fetchone()[0])


def result_code(error: sqlite3.Error) -> int:
    """The primary result code; the driver's own errors have none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def is_corrupt(error: sqlite3.Error) -> bool:
    return result_code(error) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def problem_of(error: sqlite3.Error) -> str:
    """SQLite's words hold no values."""
    return f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
