"""Memories in one SQLite file, for one machine. Its write-ahead log lets readers and one writer work side by side."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, bindparam, delete, or_, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from extproc.memory.database import checkpoint_log, file_identity, migrate, open_engine, reason
from extproc.memory.model import Category, Memory, Namespace, Source, Status
from extproc.memory.schema import memories, memory_versions
from extproc.memory.store import Added, ScoreUpdate, StoreError, Version

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection, Engine
    from sqlalchemy.engine import Row

    from extproc.memory.store import Snapshot

__all__ = ["SqliteMemoryStore"]

BATCH_ROWS = 32
"""Rows read at once: with indexing about 1 ms, after which another thread may have the interpreter."""

_COLUMNS = [column for column in memories.c if column.name != "revision"]
"""In the order of Memory's fields."""


class SqliteMemoryStore:
    def __init__(self, engine: Engine) -> None:
        """Of an engine whose tables exist; `open` is the usual way in."""
        self._engine = engine
        self._watch = _Watch(engine)

    @classmethod
    def open(cls, url: str) -> SqliteMemoryStore:
        migrate(url)
        return cls(open_engine(url))

    def close(self) -> None:
        self._watch.close()
        self._engine.dispose()

    def check(self) -> None:
        self._watch.look()
        with _reading(self._engine) as connection:
            connection.execute(select(memory_versions.c.changes).limit(1)).all()

    def version(self, org_id: str, agent_id: str) -> Version:
        return self._watch.version(org_id, agent_id)

    @contextmanager
    def snapshot(self, partition: Namespace) -> Iterator[Snapshot]:
        with _reading(self._engine) as connection:
            yield _Snapshot(connection, partition)

    def add(self, memory: Memory) -> Added:
        (added,) = self.add_many([memory])
        if added is None:
            raise StoreError(f"another memory has the id {memory.id} already")
        return added

    def add_many(self, batch: Sequence[Memory]) -> list[Added | None]:
        places: dict[Namespace, list[int]] = {}
        for place, memory in enumerate(batch):
            places.setdefault(Namespace(memory.org_id, memory.agent_id, memory.user_id), []).append(place)
        added: list[Added | None] = [None] * len(batch)
        with _writing(self._engine) as connection:
            for partition, its in places.items():
                results = _add_partition(connection, partition, [batch[place] for place in its])
                for place, result in zip(its, results, strict=True):
                    added[place] = result
        return added

    def page(self, namespace: Namespace, limit: int = 100, after: str = "") -> list[Memory]:
        query = select(*_COLUMNS).where(_visible(namespace), memories.c.id > after).order_by(memories.c.id).limit(limit)
        with _reading(self._engine) as connection:
            return [_memory(row) for row in connection.execute(query)]

    def get(self, namespace: Namespace, memory_id: str) -> Memory | None:
        query = select(*_COLUMNS).where(_visible(namespace), memories.c.id == memory_id)
        with _reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _memory(row)

    def forget(self, partition: Namespace, memory_id: str) -> bool:
        return self._delete(partition, memories.c.id == memory_id) == 1

    def forget_all(self, partition: Namespace) -> int:
        return self._delete(partition)

    def _delete(self, partition: Namespace, *which: ColumnElement[bool]) -> int:
        with _writing(self._engine) as connection:
            removed = connection.execute(delete(memories).where(_owned(partition), *which)).rowcount
            if removed:
                _bump(connection, partition.org_id, partition.agent_id, removals=1)
        if removed:
            # The log still holds the text until it is written back; a busy reader only delays that.
            with _reading(self._engine) as connection:
                checkpoint_log(connection)
        return removed

    def record_retrievals(self, counts: Mapping[tuple[str, str], int], at: datetime) -> None:
        if not counts:
            return
        c = memories.c
        counted = (
            update(memories)
            .where(c.org_id == bindparam("org"), c.id == bindparam("memory"))
            .values(retrieval_count=c.retrieval_count + bindparam("count"), last_retrieved_at=bindparam("at"))
        )
        with _writing(self._engine) as connection:
            values = [{"org": org, "memory": id_, "count": count, "at": at} for (org, id_), count in counts.items()]
            connection.execute(counted, values)

    def move_usefulness(self, org_id: str, memory_ids: Sequence[str], step: float) -> list[ScoreUpdate]:
        c = memories.c
        updates = []
        with _writing(self._engine) as connection:
            revisions: dict[str, int] = {}
            for memory_id in dict.fromkeys(memory_ids):
                mine = and_(c.org_id == org_id, c.id == memory_id)
                row = connection.execute(select(c.agent_id, c.usefulness).where(mine)).one_or_none()
                if row is None:
                    continue
                new = min(1.0, max(0.0, row.usefulness + step))
                if new != row.usefulness:
                    if row.agent_id not in revisions:
                        revisions[row.agent_id] = _bump(connection, org_id, row.agent_id)
                    changed = {"usefulness": new, "revision": revisions[row.agent_id], "updated_at": datetime.now(UTC)}
                    connection.execute(update(memories).where(mine).values(changed))
                updates.append(ScoreUpdate(memory_id, row.usefulness, new))
        return updates


def _add_partition(connection: Connection, partition: Namespace, new: Sequence[Memory]) -> list[Added | None]:
    """Within a transaction that no other writer shares, so what is looked up stays true."""
    c = memories.c
    hashes = [memory.content_hash for memory in new]
    same = select(c.content_hash, c.id).where(_owned(partition), c.status == Status.ACTIVE, c.content_hash.in_(hashes))
    by_hash: dict[str, str] = {row.content_hash: row.id for row in connection.execute(same)}
    taken = set(connection.execute(select(c.id).where(c.id.in_([memory.id for memory in new]))).scalars())
    rows: list[dict[str, object]] = []
    added: list[Added | None] = []
    for memory in new:
        is_active = memory.status is Status.ACTIVE
        if is_active and (known := by_hash.get(memory.content_hash)) is not None:
            added.append(Added(known, is_new=False))
        elif memory.id in taken:
            added.append(None)
        else:
            taken.add(memory.id)
            if is_active:
                by_hash[memory.content_hash] = memory.id
            rows.append({column.name: getattr(memory, column.name) for column in _COLUMNS})
            added.append(Added(memory.id, is_new=True))
    if rows:
        revision = _bump(connection, partition.org_id, partition.agent_id)
        connection.execute(insert(memories), [{**row, "revision": revision} for row in rows])
    return added


class _Snapshot:
    def __init__(self, connection: Connection, partition: Namespace) -> None:
        self._connection = connection
        self._partition = partition
        self.version = _read_version(connection, partition.org_id, partition.agent_id)

    def active(self) -> Iterator[list[Memory]]:
        query = select(*_COLUMNS).where(_owned(self._partition), memories.c.status == Status.ACTIVE)
        with self._connection.execution_options(yield_per=BATCH_ROWS).execute(query) as rows:
            for batch in rows.partitions():
                yield [_memory(row) for row in batch]

    def changed(self, since: int, limit: int) -> list[Memory]:
        query = select(*_COLUMNS).where(_owned(self._partition), memories.c.revision > since).limit(limit)
        return [_memory(row) for row in self._connection.execute(query)]

    def ids(self) -> set[str]:
        return set(self._connection.execute(select(memories.c.id).where(_owned(self._partition))).scalars())


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
    except ValueError as error:  # JSON or a member of an enumeration that no version of this program wrote
        raise StoreError("the memory store holds a row that cannot be read; export, repair and import it") from error


@contextmanager
def _writing(engine: Engine) -> Iterator[Connection]:
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection
    except SQLAlchemyError as error:
        raise StoreError(f"the memory store cannot be written: {reason(error)}") from error


def _bump(connection: Connection, org_id: str, agent_id: str, removals: int = 0) -> int:
    """Count a write, in its own transaction. Returns the new version, for the rows that it touches."""
    first = insert(memory_versions).values(org_id=org_id, agent_id=agent_id, changes=1, removals=removals)
    c = memory_versions.c
    counted = first.on_conflict_do_update(
        index_elements=[c.org_id, c.agent_id], set_={"changes": c.changes + 1, "removals": c.removals + removals}
    ).returning(c.changes)
    changes: int = connection.execute(counted).scalar_one()
    return changes


def _read_version(connection: Connection, org_id: str, agent_id: str) -> Version:
    c = memory_versions.c
    row = connection.execute(
        select(c.changes, c.removals).where(c.org_id == org_id, c.agent_id == agent_id)
    ).one_or_none()
    return Version() if row is None else Version(*row)


def _owned(partition: Namespace) -> ColumnElement[bool]:
    c = memories.c
    user = c.user_id.is_(None) if partition.user_id is None else c.user_id == partition.user_id
    return and_(c.org_id == partition.org_id, c.agent_id == partition.agent_id, user)


def _visible(namespace: Namespace) -> ColumnElement[bool]:
    return or_(*map(_owned, namespace.partitions()))


def _memory(row: Row[Any]) -> Memory:
    values = list(row)
    values[7] = Category(values[7])
    values[10] = Status(values[10])
    values[11] = Source(values[11])
    return Memory(*values)
