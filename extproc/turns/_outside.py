"""An outbox file seen from another process than its owner's: `extproc outbox`.

SQLite keeps the two apart. A process must not use this for a file that it has open itself: closing a second connection
from outside of the first one's bookkeeping is what POSIX locks cannot stand.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from extproc.turns._tables import (
    BUSY_TIMEOUT_S,
    Consumer,
    FileTrouble,
    State,
    check_version,
    count_due,
    oldest_due,
    problem_of,
    read_last_seq,
    scalar,
    transaction,
)

__all__ = ["Contents", "SetAside", "erase_texts", "look", "retry_set_aside", "set_aside_entries"]


@dataclass(frozen=True, slots=True)
class SetAside:
    id: int
    consumer: Consumer
    set_aside_at: float
    error: str
    turn: bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds, seen from outside."""

    states: dict[Consumer, State]
    waiting_bytes: int
    set_aside: int


def look(path: Path) -> Contents:
    """While its owner runs or not. Raises FileTrouble, FileUnusable."""
    with _outside(path, "ro") as db:
        positions = {
            Consumer(name): (position, problem, since)
            for name, position, problem, since in db.execute("SELECT name, position, problem, since FROM consumers")
        }
        last = read_last_seq(db)
        states = {}
        for consumer, (position, problem, since) in positions.items():
            end = positions[Consumer.CHECKPOINT][0] if consumer is Consumer.ENQUEUE else last
            states[consumer] = State(
                count_due(db, consumer, position, end), oldest_due(db, consumer, position, end), problem, since
            )
        size = scalar(db, "SELECT total(length(turn)) + total(length(text)) FROM entries")
        return Contents(states, int(size), int(scalar(db, "SELECT count(*) FROM set_aside")))


def set_aside_entries(path: Path) -> list[SetAside]:
    """As `look`: what was set aside, the oldest first."""
    with _outside(path, "ro") as db:
        rows = db.execute("SELECT id, consumer, set_aside_at, error, turn FROM set_aside ORDER BY id")
        return [SetAside(id_, Consumer(consumer), at, error, turn) for id_, consumer, at, error, turn in rows]


def retry_set_aside(path: Path, consumer: Consumer | None, ids: Sequence[int]) -> int:
    """Bring back what was set aside, as new entries for the one consumer; returns how many. Raises as `look`.

    Safe while the owner runs: it is one transaction that waits for the owner's and that the owner waits for, it only
    appends, and the owner notices within seconds that there is more than it has written.
    """
    marks = ",".join("?" * len(ids))
    which = f" AND id IN ({marks})" if ids else ""
    where = f"WHERE (? IS NULL OR consumer = ?){which}"
    values = [consumer, consumer, *ids]
    with _outside(path, "rw") as db, transaction(db):
        columns = "put_at, for_checkpoint, for_enqueue, for_trace, turn_index, traceparent, session_id, turn"
        values_of = (
            "?, consumer = 'checkpoint', consumer = 'enqueue', consumer = 'trace',"
            " turn_index, traceparent, session_id, turn"
        )
        brought_back = f"INSERT INTO entries ({columns}) SELECT {values_of} FROM set_aside {where} ORDER BY id"  # noqa: S608
        moved = db.execute(brought_back, [time.time(), *values]).rowcount
        db.execute(f"DELETE FROM set_aside {where}", values)  # noqa: S608 - ours
    return moved


def erase_texts(path: Path, is_chosen: Callable[[bytes], bool]) -> int:
    """Erase the texts of the turns that `is_chosen` picks by their bytes; returns how many. Raises as `look`.

    Safe while the owner runs, as `retry_set_aside` is: the turns stay, and are delivered without text. One that the
    owner is delivering at this moment has left with it.
    """
    with _outside(path, "rw") as db:
        rows = db.execute("SELECT seq, turn FROM entries WHERE text IS NOT NULL")
        chosen = [(seq,) for seq, turn in rows if is_chosen(turn)]
        if not chosen:
            return 0
        with transaction(db):
            erased = db.executemany(
                "UPDATE entries SET text = NULL WHERE seq = ? AND text IS NOT NULL", chosen
            ).rowcount
            # The owner counts anew when the last number is not the one that it gave.
            db.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'entries'")
        with suppress(sqlite3.Error):  # else with the owner's next look after its log
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return erased


@contextmanager
def _outside(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    try:
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as db:
            db.execute("PRAGMA secure_delete = ON")
            check_version(db)
            yield db
    except sqlite3.Error as error:
        raise FileTrouble(problem_of(error)) from error
