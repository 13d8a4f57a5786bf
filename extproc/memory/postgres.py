"""Memories on PostgreSQL with pgvector, for several engines (docs/decisions/0020).

An engine answers from what it has loaded and asks the server only whether that is current, which notifications mostly
spare it (`listen`). A namespace that is not loaded is searched here, in one round trip.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from datetime import UTC
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, text

from extproc.memory import vectors
from extproc.memory.database import Database, act_for, act_for_sweep
from extproc.memory.listen import CHANNEL, Versions, notification
from extproc.memory.rows import COLUMNS, FEATURES, Place, Rows, RowsSnapshot, read_row
from extproc.memory.schema import halfvec_from_wire, halfvec_text, memory_versions
from extproc.memory.store import Added, StoreAway, StoreError, Version
from extproc.memory.terms import terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import TypeVar

    from sqlalchemy import Connection

    from extproc.memory.features import Features, Indexer, Row
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.store import Outdated, ScoreUpdate, Snapshot

    T = TypeVar("T")

__all__ = ["PostgresMemoryStore"]

BATCH_ROWS = 256
"""Rows that a snapshot reads at once: a round trip each."""
FORGET_BATCH = 500
"""Rows that `forget_all` removes in one transaction."""
READ_LIMIT_S = 5.0
WRITE_LIMIT_S = 10.0
VERSION_LIMIT_S = 1.0
CANDIDATES_LIMIT_S = 1.0
"""A request waits for 35 ms; what comes later still warms the server's own memory."""
CONNECTIONS = 4
"""Kept open: two threads that load, one that asks for versions, one that writes counts. As many again for a while."""
MOST_COUNTED = 1_000
"""Memories with a stem beyond which it is common: how common does not matter."""
ENOUGH_HITS = 256
"""Memories with the rarest stems among which the best are chosen: more stems are not looked up."""


class PostgresMemoryStore:
    def __init__(self, database: Database, indexer: Indexer | None = None, serve_away_s: float = 300.0) -> None:
        """Of a database that has vectors; `open` is the usual way in. Closes the database with itself.

        `serve_away_s`: for how long versions are given out without the server.
        """
        self._database = database
        self._indexer = indexer
        self._vector_schema = "public"
        self._versions = Versions(self._connect, self._ask_version, serve_away_s)

    @classmethod
    def open(cls, url: str, indexer: Indexer | None = None, serve_away_s: float = 300.0) -> PostgresMemoryStore:
        """Raises StoreError, with what to do when the server has no pgvector."""
        store = cls(Database(url, CONNECTIONS), indexer, serve_away_s)
        try:
            store._prepare(vectors.SHIPPED_DIMENSIONS[0] if indexer is None else indexer.dimension)
        except BaseException:
            store.close()
            raise
        return store

    def _prepare(self, dimension: int) -> None:
        def is_ready(connection: Connection) -> bool:
            act_for(connection, "")
            self._vector_schema = vectors.extension_schema(connection) or ""
            return bool(self._vector_schema) and vectors.is_indexed(connection, dimension)

        if not self._database.run(is_ready, writes=False):
            self._database.run(lambda connection: vectors.add(connection, dimension), vectors.ADD_LIMIT_S)
            self._database.run(is_ready, writes=False)

    def close(self) -> None:
        self._versions.close()
        self._database.close()

    def check(self) -> None:
        if 0 < self._versions.away_s <= self._versions.serve_away_s:
            return  # serving what is loaded, as `away_s` says

        def look(connection: Connection) -> None:
            act_for(connection, "")
            connection.execute(select(memory_versions.c.changes).limit(1)).all()

        try:
            self._database.run(look, VERSION_LIMIT_S, writes=False)
        except StoreAway:
            self._versions.lost()
            if not 0 < self._versions.away_s <= self._versions.serve_away_s:
                raise

    def away_s(self) -> float:
        return self._versions.away_s

    def version(self, org_id: str, agent_id: str) -> Version | None:
        return self._versions.known(org_id, agent_id)

    def current_version(self, org_id: str, agent_id: str) -> Version:
        return self._versions.current(org_id, agent_id)

    @contextmanager
    def snapshot(self, partition: Namespace) -> Iterator[Snapshot]:
        self._versions.refuse_when_away()
        with (
            _readable(),
            self._database.snapshot(lambda connection: self._act_for(connection, partition.org_id)) as connection,
        ):
            version = Rows(connection, None, _Postings(connection)).version(partition.org_id, partition.agent_id)
            yield RowsSnapshot(connection, partition, version, BATCH_ROWS)

    def candidates(
        self,
        namespace: Namespace,
        stems: Sequence[str],
        vector: bytes | None,
        limit: int = 64,
        *,
        with_superseded: bool = False,
    ) -> list[Row]:
        self._versions.refuse_when_away()
        is_near = bool(vector) and self._indexer is not None
        query = _candidates(self._vector_schema, len(vector) // 2 if vector and is_near else 0)
        values = {
            "org": namespace.org_id,
            "agent": namespace.agent_id,
            "user": namespace.user_id,
            "terms": [term for partition in namespace.partitions() for term in terms(partition, stems)],
            "limit": limit,
            "statuses": ["active", "superseded"] if with_superseded else ["active"],
            "vector": halfvec_text(vector) if vector and is_near else None,
            "model": self._indexer.version if self._indexer is not None else "",
        }
        settings = {
            "app.current_org_id": namespace.org_id,
            "search_path": self._vector_schema,
            "statement_timeout": str(int(CANDIDATES_LIMIT_S * 1000)),
            "hnsw.iterative_scan": "relaxed_order",
            "hnsw.ef_search": "100",
        }
        made = ", ".join(f"set_config('{name}', %({place})s, true)" for place, name in enumerate(settings))
        with _readable(), self._database.driver(CANDIDATES_LIMIT_S) as driver, driver.pipeline():
            # One round trip: the transaction's settings, its question and its end are sent together.
            driver.execute(f"SELECT {made}", {str(place): value for place, value in enumerate(settings.values())})
            cursor = driver.execute(query, values)
            driver.commit()
            rows = cursor.fetchall()
        return [_from_driver(row) for row in rows]

    def add(self, memory: Memory) -> Added:
        (added,) = self.add_many([memory])
        if added is None:
            raise StoreError(f"another memory has the id {memory.id} already")
        return added

    def add_many(self, batch: Sequence[Memory]) -> list[Added | None]:
        return self._write(lambda rows: rows.add_many(batch))

    def page(self, namespace: Namespace, limit: int = 100, after: str = "") -> list[Memory]:
        return self._read(namespace.org_id, lambda rows: rows.page(namespace, limit, after))

    def get(self, namespace: Namespace, memory_id: str) -> Memory | None:
        return self._read(namespace.org_id, lambda rows: rows.get(namespace, memory_id))

    def pin(self, partition: Namespace, memory_id: str, *, is_pinned: bool) -> bool:
        return self._write(lambda rows: rows.pin(partition, memory_id, is_pinned=is_pinned))

    def forget(self, partition: Namespace, memory_id: str) -> bool:
        return self._write(lambda rows: rows.forget(partition, [memory_id])) == 1

    def forget_all(self, partition: Namespace) -> int:
        removed = 0
        while True:
            ids = self._read(partition.org_id, lambda rows: rows.some_ids(partition, FORGET_BATCH))
            if not ids:
                return removed
            removed += self._write(lambda rows, these=ids: rows.forget(partition, these))  # type: ignore[misc]

    def record_retrievals(self, counts: Mapping[tuple[str, str], int], at: datetime) -> None:
        by_org: dict[str, dict[str, int]] = defaultdict(dict)
        for (org_id, memory_id), count in counts.items():
            by_org[org_id][memory_id] = count
        for org_id, its in by_org.items():
            self._write(lambda rows, org_id=org_id, its=its: rows.record_retrievals(org_id, its, at), org_id)  # type: ignore[misc]

    def move_usefulness(self, org_id: str, memory_ids: Sequence[str], step: float) -> list[ScoreUpdate]:
        return self._write(lambda rows: rows.move_usefulness(org_id, memory_ids, step), org_id)

    def prepare(self, indexer: Indexer) -> None:
        self._prepare(indexer.dimension)

    def organisations(self) -> list[str]:
        def look(connection: Connection) -> list[str]:
            act_for_sweep(connection)
            return sorted(connection.execute(select(memory_versions.c.org_id).distinct()).scalars())

        return self._database.run(look, READ_LIMIT_S, writes=False)

    def outdated(self, org_id: str, version: str, limit: int) -> list[Outdated]:
        return self._read(org_id, lambda rows: rows.outdated(org_id, version, limit))

    def count_outdated(self, org_id: str, version: str) -> int:
        return self._read(org_id, lambda rows: rows.count_outdated(org_id, version))

    def write_features(self, org_id: str, features: Mapping[str, Features]) -> int:
        return self._write(lambda rows: rows.write_features(org_id, features), org_id)

    def transact(self, org_id: str, work: Callable[[Rows], T]) -> T:
        return self._write(work, org_id)

    def history(self, namespace: Namespace, memory_id: str) -> list[Memory]:
        return self._read(namespace.org_id, lambda rows: rows.history(namespace, memory_id))

    def _act_for(self, connection: Connection, org_id: str) -> None:
        act_for(connection, org_id, {"search_path": self._vector_schema})

    def _read(self, org_id: str, work: Callable[[Rows], T]) -> T:
        def read(connection: Connection) -> T:
            self._act_for(connection, org_id)
            return work(Rows(connection, None, _Postings(connection)))

        self._versions.refuse_when_away()
        with _readable():
            return self._database.run(read, READ_LIMIT_S, writes=False)

    def _write(self, work: Callable[[Rows], T], org_id: str = "") -> T:
        """`org_id`: of work that begins without `Postings.lock`."""
        made: dict[tuple[str, str], Version] = {}

        def write(connection: Connection) -> T:
            made.clear()  # an attempt that failed
            self._act_for(connection, org_id)
            return work(Rows(connection, self._indexer, _Postings(connection, made)))

        self._versions.refuse_when_away()
        result = self._database.run(write, WRITE_LIMIT_S)
        for (org, agent), version in made.items():
            self._versions.wrote(org, agent, version)
        return result

    def _ask_version(self, org_id: str, agent_id: str) -> Version:
        def ask(connection: Connection) -> Version:
            act_for(connection, org_id)
            return Rows(connection, None, _Postings(connection)).version(org_id, agent_id)

        return self._database.run(ask, VERSION_LIMIT_S, writes=False)

    def _connect(self, answer_limit_s: float) -> Any:
        return self._database.connect_alone(answer_limit_s)


class _Postings:
    def __init__(self, connection: Connection, made: dict[tuple[str, str], Version] | None = None) -> None:
        """`made` gets the versions that this transaction makes."""
        self._connection = connection
        self._made = {} if made is None else made

    def lock(self, partition: Namespace) -> None:
        agent = f"{partition.org_id} {partition.agent_id}"
        self._connection.execute(_LOCK, {"org_id": partition.org_id, "agent": agent})

    def bumped(self, partition: Namespace, version: Version) -> None:
        self._made[partition.org_id, partition.agent_id] = version
        payload = notification(partition.org_id, partition.agent_id, version)
        self._connection.execute(select(func.pg_notify(CHANNEL, payload)))

    def written(self, count: int) -> list[dict[str, object]]:
        return [{}] * count

    def put(self, places: Sequence[Place]) -> None:
        rows = [
            {"org_id": one.partition.org_id, "term": term, "memory_id": one.id}
            for one in places
            for term in terms(one.partition, one.stems.split())
        ]
        if rows:
            columns = {name: [row[name] for row in rows] for name in ("term", "memory_id")}
            self._connection.execute(_PUT, {"org_id": rows[0]["org_id"], **columns})

    def remove(self, places: Sequence[Place]) -> None:
        pairs = [(term, one.id) for one in places for term in terms(one.partition, one.stems.split())]
        if pairs:
            its = {"terms": [term for term, _ in pairs], "ids": [id_ for _, id_ in pairs]}
            self._connection.execute(_REMOVE, {"org_id": places[0].partition.org_id, **its})


# Held until the commit; numbers may meet, which makes two agents wait for each other and nothing else.
_LOCK = text(
    "SELECT set_config('app.current_org_id', :org_id, true), pg_advisory_xact_lock(hashtextextended(:agent, 466))"
)
_PUT = text(
    "INSERT INTO ibex_core.memory_terms (org_id, term, memory_id)"
    " SELECT CAST(:org_id AS uuid), * FROM unnest(CAST(:term AS bigint[]), CAST(:memory_id AS uuid[]))"
)
_REMOVE = text("""
    DELETE FROM ibex_core.memory_terms AS t
    USING unnest(CAST(:terms AS bigint[]), CAST(:ids AS uuid[])) AS gone (term, id)
    WHERE t.org_id = CAST(:org_id AS uuid) AND t.term = gone.term AND t.memory_id = gone.id
""")


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # JSON or a member of an enumeration that no version of this program wrote
        raise StoreError("the memory store holds a row that cannot be read; export, repair and import it") from error


_UUIDS = {"id", "org_id", "agent_id", "superseded_by"}
_SELECTED = ", ".join(
    f"m.{column.name}::text" if column.name in _UUIDS else f"m.{column.name}" for column in [*COLUMNS, *FEATURES[:-1]]
)


@lru_cache
def _candidates(vector_schema: str, dimension: int) -> str:
    """`dimension`: of the vector; 0: without one.

    Every condition is one that may use an index under row-level security, and the plan is made with the values, so it
    reads the organisation's partition alone.
    """
    mine = (
        "m.org_id = %(org)s::uuid AND m.agent_id = %(agent)s::uuid"
        " AND (m.user_id IS NULL OR m.user_id = %(user)s::varchar)"
    )
    kind = f"{vector_schema}.halfvec({dimension})"
    near = f"""
        SELECT m.id FROM ibex_core.memories m
        WHERE {mine} AND m.status = ANY (%(statuses)s) AND m.embedding_dimension = {dimension}
            AND m.features_version = %(model)s
        ORDER BY m.embedding::{kind} OPERATOR({vector_schema}.<#>) %(vector)s::{kind} LIMIT %(limit)s
    """  # noqa: S608 - numbers and a quoted name
    nothing = "SELECT NULL::uuid AS id WHERE false"
    return f"""
        WITH asked AS MATERIALIZED (
            SELECT a.term, (
                SELECT count(*) FROM (
                    SELECT 1 FROM ibex_core.memory_terms t
                    WHERE t.org_id = %(org)s::uuid AND t.term = a.term LIMIT {MOST_COUNTED}
                ) AS few
            ) AS seen
            FROM unnest(%(terms)s::bigint[]) AS a (term)
        ), rare AS (
            SELECT term, seen FROM (
                SELECT term, seen, sum(seen) OVER (ORDER BY seen, term) - seen AS rarer FROM asked WHERE seen > 0
            ) AS ranked
            WHERE rarer < {ENOUGH_HITS}
        ), worded AS (
            SELECT m.id FROM (
                SELECT t.memory_id, sum(1 / ln(2 + rare.seen)) AS worth
                FROM rare CROSS JOIN LATERAL (
                    SELECT t.memory_id FROM ibex_core.memory_terms t
                    WHERE t.org_id = %(org)s::uuid AND t.term = rare.term LIMIT {MOST_COUNTED}
                ) AS t
                GROUP BY t.memory_id ORDER BY worth DESC, t.memory_id DESC LIMIT 2 * %(limit)s
            ) AS hit
            JOIN ibex_core.memories m ON m.id = hit.memory_id
            WHERE {mine} AND m.status = ANY (%(statuses)s)
            ORDER BY hit.worth DESC, m.id DESC LIMIT %(limit)s
        ), near AS MATERIALIZED ({near if dimension else nothing}),
        hits AS MATERIALIZED (
            SELECT m.id, m.user_id, m.session_id, m.turn_index FROM ibex_core.memories m
            WHERE {mine} AND m.id = ANY (ARRAY(SELECT id FROM worded UNION SELECT id FROM near))
        ), around AS (
            SELECT n.id FROM hits CROSS JOIN LATERAL (
                SELECT m.id FROM ibex_core.memories m
                WHERE m.org_id = %(org)s::uuid AND m.agent_id = %(agent)s::uuid AND hits.user_id IS NULL
                    AND m.user_id IS NULL AND m.session_id = hits.session_id
                    AND coalesce(m.turn_index, -1) BETWEEN hits.turn_index - 2 AND hits.turn_index + 2
                    AND m.status = 'active'
                UNION ALL
                SELECT m.id FROM ibex_core.memories m
                WHERE m.org_id = %(org)s::uuid AND m.agent_id = %(agent)s::uuid AND m.user_id = hits.user_id
                    AND m.session_id = hits.session_id
                    AND coalesce(m.turn_index, -1) BETWEEN hits.turn_index - 2 AND hits.turn_index + 2
                    AND m.status = 'active'
            ) AS n
            WHERE hits.session_id IS NOT NULL AND hits.turn_index IS NOT NULL
        )
        SELECT {_SELECTED}, {vector_schema}.halfvec_send(m.embedding) FROM ibex_core.memories m
        WHERE {mine} AND m.id = ANY (ARRAY(SELECT id FROM hits UNION SELECT id FROM around))
    """  # noqa: S608 - as above


_TIMES = [place for place, column in enumerate(COLUMNS) if column.name.endswith(("_at", "valid_from", "valid_until"))]


def _from_driver(row: Sequence[Any]) -> Row:
    values = list(row)
    for place in _TIMES:
        if values[place] is not None:
            values[place] = values[place].astimezone(UTC)
    values[-1] = halfvec_from_wire(values[-1])
    return read_row(values)
