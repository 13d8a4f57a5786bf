"""Memories in one SQLite file, for one machine. Its write-ahead log lets readers and one writer work side by side."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from typing_extensions import override

from extproc.memory.database import checkpoint_log, file_identity, migrate, open_engine, reason
from extproc.memory.features import MOST_OF_TURNS
from extproc.memory.model import Category, Source, Status
from extproc.memory.rows import (
    COLUMNS,
    FEATURES,
    MOST_BETWEEN,
    UNSEEN,
    Place,
    Rows,
    RowsSnapshot,
    Stretch,
    read_memory,
    read_row,
)
from extproc.memory.schema import TURN, UtcDateTime, memories, memory_versions
from extproc.memory.store import Added, StoreError, StoreRefused, Version
from extproc.memory.terms import terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import TypeVar

    from sqlalchemy import Connection, Engine

    from extproc.memory.features import Features, Indexer, Row
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.store import Outdated, ScoreUpdate, Snapshot

    T = TypeVar("T")

__all__ = ["SqliteMemoryStore"]

BATCH_ROWS = 32
"""Rows read at once: with indexing about 1 ms, after which another thread may have the interpreter."""
FORGET_BATCH = 500
"""Rows that `forget_all` removes in one transaction: short enough that other writers hardly wait."""
BLOCK_ROWS = 16_384
"""Memories in one block of `memory_terms`. A write touches the pages of one block, about 3 MB; a search looks into each
block, about 60 of them in a million memories."""
MOST_COUNTED = 1_000
"""Memories with a stem beyond which it is common: how common does not matter."""
ENOUGH_HITS = 256
"""Memories with the rarest stems among which the best are chosen: more stems are not looked up."""
TURNS_AROUND = 2


class SqliteMemoryStore:
    def __init__(self, engine: Engine, indexer: Indexer | None = None) -> None:
        """Of an engine whose tables exist; `open` is the usual way in."""
        self._engine = engine
        self._indexer = indexer
        self._watch = _Watch(engine)

    @classmethod
    def open(cls, url: str, indexer: Indexer | None = None) -> SqliteMemoryStore:
        migrate(url)
        return cls(open_engine(url), indexer)

    def close(self) -> None:
        self._watch.close()
        self._engine.dispose()

    def check(self) -> None:
        self._watch.look()
        with _reading(self._engine) as connection:
            connection.execute(select(memory_versions.c.changes).limit(1)).all()

    def version(self, org_id: str, agent_id: str) -> Version:
        return self._watch.version(org_id, agent_id)

    def current_version(self, org_id: str, agent_id: str) -> Version:
        return self._watch.version(org_id, agent_id)

    def away_s(self) -> float:
        return 0.0

    @contextmanager
    def snapshot(self, partition: Namespace) -> Iterator[Snapshot]:
        with _reading(self._engine) as connection:
            version = self._rows(connection).version(partition.org_id, partition.agent_id)
            yield _Snapshot(connection, partition, version, BATCH_ROWS)

    def candidates(
        self,
        namespace: Namespace,
        stems: Sequence[str],
        vector: bytes | None,  # noqa: ARG002 (no index of vectors)
        limit: int = 64,
        *,
        with_superseded: bool = False,
    ) -> list[Row]:
        asked = [term for partition in namespace.partitions() for term in terms(partition, stems)]
        with _reading(self._engine) as connection:
            hits = _read_numbers(connection, _best(connection, asked, limit), with_superseded=with_superseded)
            rows = {row.memory.id: row for row in hits if namespace.can_see(row.memory)}
            for row in _read_numbers(connection, _around(connection, rows.values()), with_superseded=False):
                rows.setdefault(row.memory.id, row)
        return list(rows.values())

    def add(self, memory: Memory) -> Added:
        (added,) = self.add_many([memory])
        if added is None:
            raise StoreError(f"another memory has the id {memory.id} already")
        return added

    def add_many(self, batch: Sequence[Memory]) -> list[Added | None]:
        with self._writing() as rows:
            return rows.add_many(batch)

    def page(self, namespace: Namespace, limit: int = 100, after: str = "") -> list[Memory]:
        with _reading(self._engine) as connection:
            if not after:
                return self._rows(connection).page(namespace, limit, after)
            return _page_after(connection, namespace, limit, after)

    def get(self, namespace: Namespace, memory_id: str) -> Memory | None:
        with _reading(self._engine) as connection:
            return self._rows(connection).get(namespace, memory_id)

    def pin(self, partition: Namespace, memory_id: str, *, is_pinned: bool) -> bool:
        with self._writing() as rows:
            return rows.pin(partition, memory_id, is_pinned=is_pinned)

    def forget(self, partition: Namespace, memory_id: str) -> bool:
        with self._writing() as rows:
            removed = rows.forget(partition, [memory_id])
        self._forget_log(removed)
        return removed == 1

    def forget_all(self, partition: Namespace) -> int:
        removed = 0
        while True:
            with self._writing() as rows:
                ids = rows.some_ids(partition, FORGET_BATCH)
                removed += rows.forget(partition, ids) if ids else 0
            if len(ids) < FORGET_BATCH:
                break
        self._forget_log(removed)
        return removed

    def _forget_log(self, removed: int) -> None:
        """The log still holds the text until it is written back; a busy reader only delays that."""
        if removed:
            with _reading(self._engine) as connection:
                checkpoint_log(connection)

    def record_retrievals(self, counts: Mapping[tuple[str, str], int], at: datetime) -> None:
        by_org: dict[str, dict[str, int]] = defaultdict(dict)
        for (org_id, memory_id), count in counts.items():
            by_org[org_id][memory_id] = count
        if not by_org:
            return
        with self._writing() as rows:
            for org_id, its in by_org.items():
                rows.record_retrievals(org_id, its, at)

    def move_usefulness(self, org_id: str, memory_ids: Sequence[str], step: float) -> list[ScoreUpdate]:
        with self._writing() as rows:
            return rows.move_usefulness(org_id, memory_ids, step)

    def prepare(self, indexer: Indexer) -> None:
        """A row takes any vector."""

    def refresh_statistics(self, org_id: str) -> None:
        """Its plans do not go by them."""

    def organisations(self) -> list[str]:
        with _reading(self._engine) as connection:
            return sorted(connection.execute(select(memory_versions.c.org_id).distinct()).scalars())

    def outdated(self, org_id: str, version: str, limit: int, *, only_unmade: bool = False) -> list[Outdated]:
        with _reading(self._engine) as connection:
            return self._rows(connection).outdated(org_id, version, limit, only_unmade=only_unmade)

    def count_outdated(self, org_id: str, version: str, *, only_unmade: bool = False) -> int:
        with _reading(self._engine) as connection:
            return self._rows(connection).count_outdated(org_id, version, only_unmade=only_unmade)

    def write_features(self, org_id: str, features: Mapping[str, Features], *, is_news: bool = False) -> int:
        with self._writing() as rows:
            return rows.write_features(org_id, features, is_news=is_news)

    def transact(self, org_id: str, work: Callable[[Rows], T]) -> T:  # noqa: ARG002 (each statement names it)
        try:
            with self._writing() as rows:
                return work(rows)
        except StoreError as error:
            if isinstance(error.__cause__, (DataError, IntegrityError)):
                raise StoreRefused(str(error)) from error.__cause__
            raise

    def history(self, namespace: Namespace, memory_id: str) -> list[Memory]:
        with _reading(self._engine) as connection:
            return self._rows(connection).history(namespace, memory_id)

    def _rows(self, connection: Connection) -> Rows:
        return Rows(connection, self._indexer, _Postings(connection))

    @contextmanager
    def _writing(self) -> Iterator[Rows]:
        try:
            with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
                yield self._rows(connection)
        except SQLAlchemyError as error:
            raise StoreError(f"the memory store cannot be written: {reason(error)}") from error
        except sqlite3.Error as error:
            raise StoreError(f"the memory store cannot be written: {error}") from error


class _Postings:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def lock(self, partitions: Sequence[Namespace]) -> None:
        """SQLite's writers exclude each other from the beginning of a transaction."""

    def around(self, stretches: Sequence[Stretch], after: int) -> list[Memory]:
        execute = _driver(self._connection).execute
        found: list[Memory] = []
        for whose, session_id, (first, began), (last, ended) in stretches:
            session = (whose.org_id, whose.agent_id, whose.user_id, session_id)
            begin, end = (first, _as_time(began)), (last, _as_time(ended))
            for statement, values in (
                (_BEFORE, (*session, *begin, MOST_OF_TURNS)),
                (_BETWEEN, (*session, *begin, *end, MOST_BETWEEN)),
                (_AFTER, (*session, *end, after)),
            ):
                found += [read_memory(_decoded(row)) for row in execute(statement, values)]
        return found

    def bumped(self, partition: Namespace, version: Version) -> None:
        """Others see it in the file."""

    def insert(self, rows: Sequence[dict[str, object]]) -> None:
        first = _last_number(self._connection) + 1
        names = [*rows[0], "number"]
        values = [(*_stored(row), number) for number, row in enumerate(rows, start=first)]
        marks = ", ".join("?" * len(names))
        statement = f"INSERT INTO memories ({', '.join(names)}) VALUES ({marks})"  # noqa: S608 - names of columns
        _driver(self._connection).executemany(statement, values)

    def update(self, org_id: str, rows: Sequence[dict[str, object]]) -> None:
        values = [(*_stored(row), org_id, row["id"]) for row in rows]
        made = ", ".join(f"{name} = ?" for name in rows[0])
        statement = f"UPDATE memories SET {made} WHERE org_id = ? AND id = ?"  # noqa: S608 - names of columns
        _driver(self._connection).executemany(statement, values)

    def put(self, places: Sequence[Place]) -> None:
        _driver(self._connection).executemany("INSERT OR IGNORE INTO memory_terms VALUES (?, ?, ?)", self._keys(places))

    def remove(self, places: Sequence[Place]) -> None:
        _driver(self._connection).executemany(
            "DELETE FROM memory_terms WHERE block = ? AND term = ? AND number = ?", self._keys(places)
        )

    def _keys(self, places: Sequence[Place]) -> list[tuple[int, int, int]]:
        return sorted((number // BLOCK_ROWS, term, number) for term, number in self._numbered(places))

    def _numbered(self, places: Sequence[Place]) -> list[tuple[int, int]]:
        c = memories.c
        ids = select(c.id, c.number).where(c.id.in_([one.id for one in places]))
        numbers: dict[str, int] = dict(map(tuple, self._connection.execute(ids)))
        return [
            (term, numbers[one.id]) for one in places for term in terms(one.partition, one.stems.split()) if one.stems
        ]


def _stored(row: Mapping[str, object]) -> list[object]:
    return [encode(value) if (encode := _ENCODED.get(type(value))) else value for value in row.values()]


def _as_time(value: datetime) -> str:
    return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


# As SQLAlchemy writes them, which reads them too.
_ENCODED: dict[type, Callable[[Any], object]] = {
    datetime: _as_time,
    dict: json.dumps,
    **dict.fromkeys((Category, Status, Source), str),
}


def _last_number(connection: Connection) -> int:
    last: int = connection.execute(select(func.coalesce(func.max(memories.c.number), 0))).scalar_one()
    return last


def _best(connection: Connection, asked: Sequence[int], limit: int) -> list[int]:
    """The numbers of at most `limit` memories that hold the rarest of the terms; of equal ones the newest."""
    execute = _driver(connection).execute
    blocks = range(_last_number(connection) // BLOCK_ROWS, -1, -1)
    found: list[list[int]] = []
    for term in asked:
        its: list[int] = []
        for block in blocks:
            its += [number for (number,) in execute(_HOLDING, (block, term, MOST_COUNTED - len(its)))]
            if len(its) == MOST_COUNTED:
                break
        if its:
            found.append(its)
    scores: dict[int, float] = defaultdict(float)
    for its in sorted(found, key=len):
        if len(scores) >= ENOUGH_HITS:
            break
        worth = 1 / log(2 + len(its))
        for number in its:
            scores[number] += worth
    return sorted(scores, key=lambda number: (-scores[number], -number))[:limit]


def _around(connection: Connection, rows: Iterable[Row]) -> set[int]:
    """The numbers of the active memories up to two turns around each, in its session."""
    execute = _driver(connection).execute
    numbers: set[int] = set()
    for one in (row.memory for row in rows):
        if one.session_id is not None and one.turn_index is not None:
            turns = (one.turn_index - TURNS_AROUND, one.turn_index + TURNS_AROUND)
            whose = (one.org_id, one.agent_id, one.user_id, one.session_id)
            numbers.update(number for (number,) in execute(_BESIDE, (*whose, *turns)))
    return numbers


# By the driver itself, in the transaction of the connection: there are some hundred of them in a search, and building
# one with SQLAlchemy takes ten times as long as running it.
_HOLDING = "SELECT number FROM memory_terms WHERE block = ? AND term = ? ORDER BY number DESC LIMIT ?"
_BESIDE = (
    "SELECT number FROM memories INDEXED BY memories_by_turn WHERE org_id = ? AND agent_id = ? AND user_id IS ?"  # noqa: S608
    f" AND session_id = ? AND {TURN} BETWEEN ? AND ? AND status = 'active'"
)


def _read_numbers(connection: Connection, numbers: Iterable[int], *, with_superseded: bool) -> list[Row]:
    # By number alone: with the namespace beside it SQLite would rather read all of that.
    wanted = json.dumps(list(numbers))
    statement = f"{_SELECT} WHERE number IN (SELECT value FROM json_each(?)) AND {_retrievable(with_superseded)}"  # noqa: S608
    return [_row(values) for values in _driver(connection).execute(statement, (wanted,))]


def _page_after(connection: Connection, namespace: Namespace, limit: int, after: str) -> list[Memory]:
    """By the index of ids, so that all pages together read the table once. SQLite by itself would sort all that the
    namespace holds, for each page; which is right for a first one, where most namespaces end."""
    whose = (namespace.org_id, namespace.agent_id, namespace.user_id)
    statement = (
        f"{_SELECT_MEMORY} INDEXED BY sqlite_autoindex_memories_1 WHERE id > ? AND org_id = ? AND agent_id = ?"
        " AND (user_id IS NULL OR user_id = ?) ORDER BY id LIMIT ?"
    )
    return [read_memory(_decoded(values)) for values in _driver(connection).execute(statement, (after, *whose, limit))]


class _Snapshot(RowsSnapshot):
    """Rows are read by the driver itself: SQLAlchemy takes longer over one than all else that is done with it."""

    @override
    def active(self, *, with_superseded: bool = False) -> Iterator[list[Row]]:
        whose = self._partition
        statement = f"{_SELECT} WHERE org_id = ? AND agent_id = ? AND user_id IS ? AND {_retrievable(with_superseded)}"
        cursor = _driver(self._connection).execute(statement, (whose.org_id, whose.agent_id, whose.user_id))
        while batch := cursor.fetchmany(BATCH_ROWS):
            yield [_row(values) for values in batch]


def _retrievable(with_superseded: bool) -> str:  # noqa: FBT001 (a setting of the caller's)
    return "status IN ('active', 'superseded')" if with_superseded else "status = 'active'"


def _row(values: Sequence[Any]) -> Row:
    return read_row(_decoded(values))


def _decoded(values: Sequence[Any]) -> list[Any]:
    """Columns of a memory, and whatever follows them."""
    read = list(values)
    for place in _TIMES:
        if read[place] is not None:
            read[place] = datetime.fromisoformat(read[place] + _UTC)
    read[_METADATA] = {} if read[_METADATA] == "{}" else json.loads(str(read[_METADATA]))
    return read


_SELECT_MEMORY = f"SELECT {', '.join(column.name for column in COLUMNS)} FROM memories"  # noqa: S608 - names
_SELECT = f"SELECT {', '.join(column.name for column in [*COLUMNS, *FEATURES])} FROM memories"  # noqa: S608 - names
_UNSEEN = ", ".join(f"'{one}'" for one in UNSEEN)
_SESSION = (
    f"{_SELECT_MEMORY} INDEXED BY memories_by_turn WHERE org_id = ? AND agent_id = ? AND user_id IS ?"
    f" AND session_id = ? AND status NOT IN ({_UNSEEN}) AND ({TURN}, created_at)"
)
_UP, _DOWN = f"ORDER BY {TURN}, created_at, id LIMIT ?", f"ORDER BY {TURN} DESC, created_at DESC, id DESC LIMIT ?"
_BEFORE = f"{_SESSION} < (?, ?) {_DOWN}"
_BETWEEN = f"{_SESSION} >= (?, ?) AND ({TURN}, created_at) <= (?, ?) {_UP}"
_AFTER = f"{_SESSION} > (?, ?) {_UP}"
_UTC = "+00:00"
"""Behind a stored time; quicker than to replace the zone of what was read."""
_TIMES = [place for place, column in enumerate(COLUMNS) if isinstance(column.type, UtcDateTime)]
_METADATA = COLUMNS.index(memories.c.metadata)


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


class _Watch:
    """Notices writes of any process through a connection that is kept open.

    `PRAGMA data_version` changes when another connection has committed, and costs a few microseconds; only then are the
    version rows read again.
    """

    def __init__(self, engine: Engine) -> None:
        self._lock = threading.Lock()
        self._file = Path(engine.url.database or "").absolute()
        self._connection = engine.raw_connection()
        self._identity = file_identity(self._file)
        self._looked_at = time.monotonic()
        self._seen = -1
        self._versions: dict[tuple[str, str], Version] = {}

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def look(self) -> None:
        """Raises StoreError when the path no longer names the file that is open: nobody writes to that one any more."""
        if self._identity is None or file_identity(self._file) != self._identity:
            raise StoreError(f"{self._file} was removed or replaced; restart the engine to use what is there now")
        self._looked_at = time.monotonic()

    def version(self, org_id: str, agent_id: str) -> Version:
        if time.monotonic() - self._looked_at >= _LOOK_S:
            self.look()
        key = (org_id, agent_id)
        with self._lock:
            try:
                seen = self._read("PRAGMA data_version", ())[0][0]
                if seen != self._seen:
                    self._versions.clear()
                    self._seen = seen
                version = self._versions.get(key)
                if version is None:
                    if len(self._versions) >= _KEPT_VERSIONS:
                        self._versions.clear()
                    version = self._versions[key] = Version(*(self._read(_VERSION, key) or [()])[0])
            except sqlite3.Error as error:
                raise StoreError(f"the memory store cannot be read: {error}") from error
            return version

    def _read(self, statement: str, values: tuple[str, ...]) -> list[Any]:
        cursor = self._connection.driver_connection.execute(statement, values)  # type: ignore[union-attr]
        rows: list[Any] = cursor.fetchall()
        return rows


_LOOK_S = 1.0
"""How long a removed or replaced file may go unnoticed."""
_KEPT_VERSIONS = 100_000  # (org, agent) pairs, about 300 bytes each
_VERSION = "SELECT changes, removals FROM memory_versions WHERE org_id = ? AND agent_id = ?"


@contextmanager
def _reading(engine: Engine) -> Iterator[Connection]:
    try:
        with engine.connect() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise StoreError(f"the memory store cannot be read: {reason(error)}") from error
    except sqlite3.Error as error:
        raise StoreError(f"the memory store cannot be read: {error}") from error
    except ValueError as error:  # JSON or a member of an enumeration that no version of this program wrote
        raise StoreError("the memory store holds a row that cannot be read; export, repair and import it") from error
