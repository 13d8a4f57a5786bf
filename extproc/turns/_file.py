"""One outbox as a SQLite file: entries in their order, a position for each consumer, and what was set aside.

It belongs to one process (`_slot`), where any thread may use it; what other processes may do is in `_outside`. An entry
stays once `append` has returned, even if the power is cut; positions may fall back by a few commits then, so that a
batch comes again. Knows nothing of sinks, and no more of content than its size.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from extproc.turns._tables import (
    ROW_OVERHEAD_BYTES,
    Batch,
    Consumer,
    FileClosed,
    FileTrouble,
    Mark,
    NewRow,
    Row,
    State,
    connect,
    count_due,
    is_corrupt,
    make_tables,
    oldest_due,
    problem_of,
    read_last_seq,
    read_rows,
    result_code,
    scalar,
    transaction,
)

__all__ = ["OutboxFile"]

_log = structlog.get_logger("extproc.turns.outbox")

_MOST_VACUUMED_PAGES = 1000
"""Free pages that are given back at once: 4 MB, a few milliseconds."""

HEADROOM_BYTES = 16 * 1024**2
"""Of the disk, that new entries leave free: a delivery frees room, and needs some to be noted."""

_APPEND = "INSERT INTO entries (put_at, for_checkpoint, for_enqueue, for_trace, turn, text) VALUES (?, ?, ?, 1, ?, ?)"


@dataclass(slots=True)
class _Counts:
    """What the tables hold, kept beside them so that nobody has to count."""

    last_seq: int = 0
    waiting_bytes: int = 0
    batch: tuple[int, str] | None = None
    """End and token of the trace's batch in flight."""
    position: dict[Consumer, int] = field(default_factory=dict)
    depth: dict[Consumer, int] = field(default_factory=dict)
    oldest_at: dict[Consumer, float | None] = field(default_factory=lambda: dict.fromkeys(Consumer))

    def end(self, consumer: Consumer) -> int:
        """The last seq that a consumer may see: a task never comes before its checkpoint."""
        return self.position[Consumer.CHECKPOINT] if consumer is Consumer.ENQUEUE else self.last_seq


class OutboxFile:
    """Every method but the two properties may wait for the disk."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; a corrupt one is put away under another name. Raises FileUnusable, FileTrouble."""
        self.path = path
        self._lock = threading.Lock()
        self._durable: sqlite3.Connection | None = None
        """Each of its commits is on the disk."""
        self._quick: sqlite3.Connection | None = None
        """Its commits are on the disk with the next durable one; only a power cut can tell the difference."""
        self._counts = _Counts()
        self._is_stale = False
        """The counts may differ from the tables, since a transaction failed."""
        self._is_closed = False
        self._has_waste = True
        """Something was erased or removed: its pages are free, and the log may still hold it.

        True at first, since a process that was killed may have left it so.
        """
        self._floor = 0
        """Every seq of a new file is above it."""
        self._inode = (0, 0)
        """Device and number of the file that is open."""
        self.corrupted = 0
        """How often a corrupt file was set aside, or one that was taken away was begun again."""
        with self._lock, self._translated():
            self._open()

    # -- what is there, for any thread, without waiting

    def state(self, consumer: Consumer) -> State:
        return State(self._counts.depth[consumer], self._counts.oldest_at[consumer])

    @property
    def waiting_bytes(self) -> int:
        """Approximately, all that is in the file."""
        return self._counts.waiting_bytes

    # -- the writer's side

    def append(self, rows: Sequence[NewRow]) -> None:
        """In one transaction that is on the disk when this returns. Raises FileTrouble, and then none is stored."""
        with self._access(durable=True) as db:
            if self._free_bytes(db) < HEADROOM_BYTES:
                raise FileTrouble("the disk is nearly full", is_disk_full=True)
            with transaction(db):
                db.executemany(_APPEND, rows)
                last = read_last_seq(db)
            counts = self._counts
            if last - counts.last_seq != len(rows):
                self._load(db)  # another process brought something back
                return
            counts.last_seq = last
            counts.waiting_bytes += sum(row.size for row in rows)
            for consumer, due in (
                (Consumer.CHECKPOINT, [row.put_at for row in rows if row.for_checkpoint]),
                (Consumer.TRACE, [row.put_at for row in rows]),
            ):
                counts.depth[consumer] += len(due)
                if due and counts.oldest_at[consumer] is None:
                    counts.oldest_at[consumer] = due[0]

    def evict_traces(self, size: int) -> int:
        """Remove the oldest entries that wait for nothing but their trace, `size` bytes or a little more.

        Returns how many; 0: there are none. A batch in flight stays.
        """
        with self._access(durable=False) as db:
            counts = self._counts
            low = max(counts.position[Consumer.TRACE], counts.batch[0] if counts.batch else 0)
            high = min(counts.position[Consumer.CHECKPOINT], counts.position[Consumer.ENQUEUE])
            rows = db.execute(
                "SELECT seq, length(turn), for_trace FROM entries WHERE seq > ? AND seq <= ? ORDER BY seq", (low, high)
            )
            cut, freed, evicted = low, 0, 0
            with closing(rows):
                for seq, length, for_trace in rows:
                    if freed >= size:
                        break
                    cut, freed, evicted = seq, freed + length + ROW_OVERHEAD_BYTES, evicted + for_trace
            if cut == low:
                return 0
            with self._changing(db):
                db.execute("DELETE FROM entries WHERE seq > ? AND seq <= ?", (low, cut))
                counts.waiting_bytes -= freed
                counts.depth[Consumer.TRACE] -= evicted
                self._find_oldest(db, Consumer.TRACE)
            return evicted

    def tidy(self) -> None:
        """Give free pages back to the disk, and leave nothing in the log: it holds what was erased until then."""
        with self._access(durable=False) as db:
            if not self._has_waste:
                return
            # `execute` would stop after the first page: the pragma gives rows without columns.
            db.executescript(f"PRAGMA incremental_vacuum({_MOST_VACUUMED_PAGES})")
            is_busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            self._has_waste = bool(is_busy)

    def make_log_reusable(self) -> None:
        """On a full disk: what the log holds goes to its place, and the log's room can be written again."""
        with self._access(durable=False) as db:
            db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def notice_others(self) -> bool:
        """Whether another process has put something back since the last look."""
        with self._access(durable=False) as db:
            if read_last_seq(db) == self._counts.last_seq:
                return False
            self._load(db)
            return True

    def is_in_place(self) -> bool:
        """False: somebody removed the file or put another there. What is open then goes with the last connection."""
        with self._lock:
            if self._is_closed or self._quick is None:
                return True
            try:
                return _inode(self.path) == self._inode
            except FileNotFoundError:
                return False
            except OSError:
                return True

    def move(self, path: Path) -> None:
        """Begin again at a path where nothing is, with what is in the open file as far as that can be read.

        Raises FileTrouble; nothing has changed then.
        """
        with self._access(durable=False) as db:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
            try:
                with closing(sqlite3.connect(path)) as copy:
                    db.backup(copy)
            except sqlite3.Error as error:
                path.unlink()
                if not is_corrupt(error):
                    raise
            self.corrupted += 1
            self._floor = max(self._floor, self._counts.last_seq)
            self._disconnect()
            self.path = path
            with suppress(sqlite3.Error, OSError):  # the next access tries it again
                self._connect()

    # -- the consumers' side

    def take(self, consumer: Consumer, most_rows: int) -> Batch | None:
        """The next batch; the same one again until it is done, set aside or given up. None: nothing is due.

        The rows and the token of a trace batch are on the disk when this returns. Raises FileTrouble.
        """
        counts = self._counts
        if not self._is_stale and counts.position[consumer] >= counts.end(consumer):
            return None
        with self._access(durable=False) as db:
            counts = self._counts
            if consumer is Consumer.TRACE and counts.batch is not None:
                end, token = counts.batch
                rows, _ = read_rows(db, consumer, counts.position[consumer], end, -1)
                if rows:
                    return Batch(consumer, rows, end, token)
                self._advance(db, consumer, end, 0)  # all of it was set aside
            start, end = counts.position[consumer], counts.end(consumer)
            if start >= end:
                return None
            rows, are_all = read_rows(db, consumer, start, end, most_rows)
            if not rows:
                self._advance(db, consumer, end, 0)
                return None
            if not are_all:
                end = rows[-1].seq
            return Batch(consumer, rows, end, self._note_batch(end) if consumer is Consumer.TRACE else "")

    def done(self, batch: Batch) -> None:
        """Raises FileTrouble; the batch comes again then."""
        with self._access(durable=False) as db:
            self._advance(db, batch.consumer, batch.end, len(batch.rows))

    def written(self, batch: Batch, marks: Sequence[Mark]) -> None:
        """As `done`, of checkpoints. The texts are erased; `marks` stand in the order of the rows."""
        values = [
            (mark.turn_index, mark.traceparent, mark.session_id, mark.turn_index is not None, row.seq)
            for row, mark in zip(batch.rows, marks, strict=True)
        ]
        with self._access(durable=False) as db, self._changing(db):
            if batch.end <= self._counts.position[batch.consumer]:
                return  # of a file that was replaced meanwhile
            db.executemany(
                "UPDATE entries SET text = NULL, turn_index = ?, traceparent = ?, session_id = ?,"
                " for_enqueue = for_enqueue AND ? WHERE seq = ?",
                values,
            )
            erased = sum(len(row.text) for row in batch.rows if row.text is not None)
            self._counts.waiting_bytes -= erased
            self._has_waste = self._has_waste or erased > 0
            self._move(db, batch.consumer, batch.end, len(batch.rows))

    def give_up(self, batch: Batch) -> None:
        """It was refused whole, so its rows may travel in other batches, with other tokens."""
        if batch.consumer is not Consumer.TRACE:
            return
        with self._access(durable=False) as db, self._changing(db):
            self._counts.batch = None
            db.execute("UPDATE consumers SET batch_end = NULL, batch_token = NULL WHERE name = 'trace'")

    def set_aside(self, consumer: Consumer, row: Row, error: str) -> None:
        """The consumer does not get it again; it stays without its text until somebody brings it back."""
        with self._access(durable=False) as db, self._changing(db):
            found = db.execute(
                "INSERT INTO set_aside (consumer, seq, set_aside_at, error, turn_index, traceparent, session_id, turn)"
                " SELECT ?, seq, ?, ?, turn_index, traceparent, session_id, turn FROM entries WHERE seq = ?",
                (consumer, time.time(), error, row.seq),
            )
            if not found.rowcount:
                return  # of a file that was replaced meanwhile
            db.execute(f"UPDATE entries SET for_{consumer.value} = 0 WHERE seq = ?", (row.seq,))  # noqa: S608 - ours
            if consumer is Consumer.CHECKPOINT:
                db.execute("UPDATE entries SET text = NULL, for_enqueue = 0 WHERE seq = ?", (row.seq,))
                self._counts.waiting_bytes -= len(row.text or b"")
                self._has_waste = self._has_waste or row.text is not None
            self._counts.depth[consumer] -= 1
            self._find_oldest(db, consumer)

    def pass_all(self, consumer: Consumer) -> bool:
        """For a consumer that is not there: it is done with everything. False: it was already."""
        with self._access(durable=False) as db:
            counts = self._counts
            start, end = counts.position[consumer], counts.end(consumer)
            if start >= end:
                return False
            with self._changing(db):
                if consumer is Consumer.CHECKPOINT:
                    erased = scalar(
                        db, "SELECT total(length(text)) FROM entries WHERE seq > ? AND seq <= ?", start, end
                    )
                    # A task that was brought back has its index and goes on.
                    db.execute(
                        "UPDATE entries SET text = NULL, for_enqueue = for_enqueue AND turn_index IS NOT NULL"
                        " WHERE seq > ? AND seq <= ?",
                        (start, end),
                    )
                    counts.waiting_bytes -= int(erased)
                    self._has_waste = self._has_waste or erased > 0
                self._move(db, consumer, end, counts.depth[consumer])
            return True

    def note_problem(self, consumer: Consumer, problem: str) -> None:
        """Why a consumer waits, for who looks from outside; empty: it does not."""
        with self._access(durable=False) as db, self._changing(db):
            db.execute("UPDATE consumers SET problem = ?, since = ? WHERE name = ?", (problem, time.time(), consumer))

    # -- the end

    def close(self) -> None:
        """What is called later raises FileTrouble."""
        with self._lock:
            self._is_closed = True
            self._disconnect()

    def close_for_removal(self) -> bool:
        """Close a file that has nothing in it, under a lock that keeps others from adding something. False: it has."""
        with self._access(durable=False) as db:
            with transaction(db):
                if scalar(db, "SELECT (SELECT count(*) FROM entries) + (SELECT count(*) FROM set_aside)"):
                    return False
                self.path.unlink()
            self._is_closed = True
            self._disconnect()
            return True

    # -- inside, with the lock held

    @contextmanager
    def _access(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            if self._is_closed:
                raise FileClosed("the outbox is closed")
            if self._quick is None:
                self._open()  # a corrupt file could not be replaced
            connection = self._durable if durable else self._quick
            assert connection is not None  # noqa: S101 - both connections are there, or none
            if self._is_stale:
                self._load(connection)
            yield connection

    @contextmanager
    def _changing(self, db: sqlite3.Connection) -> Iterator[None]:
        """A transaction whose body also changes the counts: when it fails they are read again."""
        try:
            with transaction(db):
                yield
        except BaseException:
            self._is_stale = True
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            try:
                yield
            except sqlite3.Error as error:
                if is_corrupt(error):
                    self._replace(error)
                raise
        except sqlite3.Error as error:
            raise FileTrouble(problem_of(error), is_disk_full=result_code(error) == sqlite3.SQLITE_FULL) from error
        except OSError as error:
            raise FileTrouble(error.strerror or type(error).__name__) from error

    def _open(self) -> None:
        try:
            self._connect()
        except sqlite3.Error as error:
            if not is_corrupt(error):
                raise
            self._replace(error)

    def _connect(self) -> None:
        # Only a new file: closing a second descriptor of one in use would drop SQLite's locks.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
        try:
            self._quick = connect(self.path, "NORMAL")
            self._durable = connect(self.path, "FULL")
            make_tables(self._quick)
            if read_last_seq(self._quick) < self._floor:
                with transaction(self._durable):
                    self._durable.execute(
                        "INSERT INTO sqlite_sequence (name, seq) VALUES ('entries', ?)", [self._floor]
                    )
                    self._durable.execute("UPDATE consumers SET position = ?", [self._floor])
            self._load(self._quick)
            self._inode = _inode(self.path)
        except BaseException:
            self._disconnect()
            raise

    def _replace(self, error: sqlite3.Error) -> None:
        """Put a corrupt file out of the way and begin a new one, whose entries count on from the old one's."""
        self._floor = max(self._floor, self._counts.last_seq)
        self._disconnect()
        kept = f"{self.path.stem}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}.db"
        for end in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + end).rename(self.path.with_name(kept + end))
        self.corrupted += 1
        _log.error(
            "the outbox cannot be read: its turns are not delivered, a new file is begun; keep the old one for repair",
            file=self.path.name,
            kept_as=kept,
            problem=problem_of(error),
        )
        self._connect()

    def _disconnect(self) -> None:
        for connection in (self._durable, self._quick):
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()
        self._durable = self._quick = None

    def _load(self, db: sqlite3.Connection) -> None:
        """Count everything: one pass over the rows, about 0.3 s for a million."""
        counts = _Counts()
        counts.last_seq = read_last_seq(db)
        for name, position, batch_end, batch_token in db.execute(
            "SELECT name, position, batch_end, batch_token FROM consumers"
        ):
            counts.position[Consumer(name)] = position
            if batch_end is not None:
                counts.batch = (batch_end, batch_token)
        size = f"total(length(turn)) + total(length(text)) + {ROW_OVERHEAD_BYTES} * count(*)"
        counts.waiting_bytes = int(scalar(db, f"SELECT {size} FROM entries"))  # noqa: S608 - ours
        for consumer in Consumer:
            counts.depth[consumer] = count_due(db, consumer, counts.position[consumer], counts.end(consumer))
        self._counts = counts
        for consumer in Consumer:
            self._find_oldest(db, consumer)
        self._is_stale = False

    def _free_bytes(self, db: sqlite3.Connection) -> int:
        """Of the disk; when that is little, with what is free within the file."""
        free = shutil.disk_usage(self.path.parent).free
        if free < HEADROOM_BYTES:
            free += int(scalar(db, "PRAGMA freelist_count") * scalar(db, "PRAGMA page_size"))
        return free

    def _note_batch(self, end: int) -> str:
        token = uuid.uuid4().hex
        db = self._durable
        assert db is not None  # noqa: S101 - as in `_access`
        with self._changing(db):
            db.execute("UPDATE consumers SET batch_end = ?, batch_token = ? WHERE name = 'trace'", (end, token))
            self._counts.batch = (end, token)
        return token

    def _advance(self, db: sqlite3.Connection, consumer: Consumer, end: int, delivered: int) -> None:
        with self._changing(db):
            self._move(db, consumer, end, delivered)

    def _move(self, db: sqlite3.Connection, consumer: Consumer, end: int, delivered: int) -> None:
        """Within a transaction: the consumer is done up to `end`, and what all are done with goes."""
        counts = self._counts
        before = counts.position[consumer]
        if end <= before:
            return  # of a file that was replaced meanwhile
        counts.position[consumer] = end
        counts.depth[consumer] -= delivered
        db.execute(
            "UPDATE consumers SET position = ?, batch_end = NULL, batch_token = NULL WHERE name = ?", (end, consumer)
        )
        if consumer is Consumer.TRACE:
            counts.batch = None
        if consumer is Consumer.CHECKPOINT:
            counts.depth[Consumer.ENQUEUE] += count_due(db, Consumer.ENQUEUE, before, end)
            if counts.oldest_at[Consumer.ENQUEUE] is None:
                self._find_oldest(db, Consumer.ENQUEUE)
        passed = min(counts.position.values())
        if before < passed:
            size = f"total(length(turn)) + {ROW_OVERHEAD_BYTES} * count(*)"
            counts.waiting_bytes -= int(scalar(db, f"SELECT {size} FROM entries WHERE seq <= ?", passed))  # noqa: S608
            db.execute("DELETE FROM entries WHERE seq <= ?", (passed,))
            self._has_waste = True
        self._find_oldest(db, consumer)

    def _find_oldest(self, db: sqlite3.Connection, consumer: Consumer) -> None:
        counts = self._counts
        counts.oldest_at[consumer] = (
            oldest_due(db, consumer, counts.position[consumer], counts.end(consumer))
            if counts.depth[consumer] > 0
            else None
        )


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
