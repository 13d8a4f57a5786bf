"""Memories on PostgreSQL with pgvector, for several engines (docs/decisions/0020).

An engine answers from what it has loaded and asks the server only whether that is current, which notifications mostly
spare it (`listen`). A namespace that is not loaded is searched here, in one round trip.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, String, Text, func, select, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from typing_extensions import override

from extproc.memory import vectors
from extproc.memory.database import Database, act_for, act_for_sweep, driver_errors
from extproc.memory.features import MOST_OF_TURNS
from extproc.memory.listen import CHANNEL, Versions, notification
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
from extproc.memory.schema import TURN, UtcDateTime, halfvec_from_wire, halfvec_text, memories, memory_versions
from extproc.memory.store import Added, StoreAway, StoreError, Version
from extproc.memory.terms import terms

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import TypeVar

    from sqlalchemy import Column, Connection

    from extproc.memory.features import Features, Indexer, Row
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.store import Outdated, ScoreUpdate, Snapshot

    T = TypeVar("T")

__all__ = ["PostgresMemoryStore"]

FETCHED_ROWS = 256
"""Rows that a snapshot reads at once: a round trip each."""
BATCH_ROWS = 32
"""Of them, handed on at once: with indexing about 1 ms, after which another thread may have the interpreter."""
FORGET_BATCH = 500
"""Rows that `forget_all` removes in one transaction."""
READ_LIMIT_S = 5.0
WRITE_LIMIT_S = 10.0
BULK_LIMIT_S = 60.0
"""Of imports and maintenance, which nobody waits for: a statement of theirs that takes 1 s alone was seen to take more
than 10 beside an autovacuum and a dozen busy processes, and an import must not end for that."""
VERSION_LIMIT_S = 1.0
CANDIDATES_LIMIT_S = 1.0
"""A request waits for 35 ms; what comes later still warms the server's own memory."""
CONNECTIONS = 4
"""Kept open: two threads that load, one that asks for versions, one that writes counts. As many again for a while."""
MOST_COUNTED = 1_000
"""Memories with a stem beyond which it is common: how common does not matter."""
MOST_READ = 16_000
"""To which the memories of all stems together are counted, and of each to ENOUGH_HITS in any case: for 64 stems 10 ms
of the server's CPU in place of 13. Of so many some are rare, and the others then do not matter."""
ENOUGH_HITS = 256
"""Memories with the rarest stems among which the best are chosen: more stems are not looked up."""
TURNS_AROUND = 2
_LAST_TURN = 2**31 - 1 - TURNS_AROUND
NEAREST_LOOKED_AT = 64
"""`hnsw.ef_search`: vectors at once, as many as a question wants."""
MOST_LOOKED_AT = 1_000
"""`hnsw.max_scan_tuples`: vectors of all of the organisation's agents until enough of the right one are found. An agent
among hundreds gets fewer, and is found by words alone."""


class PostgresMemoryStore:
    def __init__(self, database: Database, indexer: Indexer | None = None, serve_away_s: float = 300.0) -> None:
        """Of a database that has vectors; `open` is the usual way in. Closes the database with itself.

        `serve_away_s`: for how long versions are given out without the server.
        """
        self._database = database
        self._indexer = indexer
        self._vector_schema = "public"
        self._versions = Versions(self._connect, self._ask_version, serve_away_s, database.renew)

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
        self._versions.refuse_when_away()

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
            yield _Snapshot(connection, partition, version, self._vector_schema)

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
        dimension = len(vector) // 2 if vector and is_near else 0
        query = _candidates(self._vector_schema, dimension, has_user=namespace.user_id is not None)
        asked = [term for partition in namespace.partitions() for term in terms(partition, stems)]
        values = {
            "org": namespace.org_id,
            "agent": namespace.agent_id,
            "user": namespace.user_id,
            "terms": asked,
            "counted": max(ENOUGH_HITS, min(MOST_COUNTED, MOST_READ // max(1, len(asked)))),
            "limit": limit,
            "statuses": ["active", "superseded"] if with_superseded else ["active"],
            "vector": halfvec_text(vector) if vector and is_near else None,
            "model": self._indexer.version if self._indexer is not None else "",
        }
        settings = {
            "transaction_read_only": "on",
            "app.current_org_id": namespace.org_id,
            "search_path": self._vector_schema,
            "statement_timeout": str(int(CANDIDATES_LIMIT_S * 1000)),
            "jit": "off",  # compiling a plan takes longer than a request waits
            "hnsw.iterative_scan": "relaxed_order",
            "hnsw.ef_search": str(NEAREST_LOOKED_AT),
            "hnsw.max_scan_tuples": str(MOST_LOOKED_AT),
        }
        made = ", ".join(f"set_config('{name}', %({place})s, true)" for place, name in enumerate(settings))
        with _readable(), self._database.driver(CANDIDATES_LIMIT_S) as driver:
            # One round trip: a pipeline's end ends its transaction too. COMMIT would be answered before the pipeline's
            # own end is sent, which then waits for the server once more.
            with driver.pipeline():
                driver.execute(f"SELECT {made}", {str(place): value for place, value in enumerate(settings.values())})
                cursor = driver.execute(query, values, binary=True)
            rows = cursor.fetchall()
        return [_from_driver(row) for row in rows]

    def add(self, memory: Memory) -> Added:
        (added,) = self.add_many([memory])
        if added is None:
            raise StoreError(f"another memory has the id {memory.id} already")
        return added

    def add_many(self, batch: Sequence[Memory]) -> list[Added | None]:
        limit_s = WRITE_LIMIT_S if len(batch) == 1 else BULK_LIMIT_S
        return self._write(lambda rows: rows.add_many(batch), limit_s=limit_s)

    def page(self, namespace: Namespace, limit: int = 100, after: str = "") -> list[Memory]:
        # Of an export, which nobody waits for, where there is a page before.
        limit_s = BULK_LIMIT_S if after else READ_LIMIT_S
        return self._read(namespace.org_id, lambda rows: rows.page(namespace, limit, after), limit_s)

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
            removed += self._write(
                lambda rows, these=ids: rows.forget(partition, these),  # type: ignore[misc]
                limit_s=BULK_LIMIT_S,
            )

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

    def refresh_statistics(self, org_id: str) -> None:
        """Of the organisation's partitions. Terms are then found in their index alone, which needs the server's note of
        the pages whose rows everybody sees. To a role that does not own them it gives a warning, no error."""

        def refresh(connection: Connection, table: str) -> str | None:
            act_for(connection, org_id)
            which = f"SELECT tableoid::regclass::text FROM ibex_core.{table} WHERE org_id = CAST(:org_id AS uuid)"  # noqa: S608
            partition: str | None = connection.execute(text(f"{which} LIMIT 1"), {"org_id": org_id}).scalar()
            if partition is not None:
                connection.execute(text(f"ANALYZE {partition}"))
            return partition

        self._database.run(partial(refresh, table="memories"), BULK_LIMIT_S)
        its_terms = self._database.run(partial(refresh, table="memory_terms"), BULK_LIMIT_S)
        if its_terms is not None:
            with self._database.driver(BULK_LIMIT_S) as driver:
                driver.execute(f"VACUUM (INDEX_CLEANUP off, TRUNCATE off, SKIP_LOCKED) {its_terms}")

    def organisations(self) -> list[str]:
        def look(connection: Connection) -> list[str]:
            act_for_sweep(connection)
            return sorted(connection.execute(select(memory_versions.c.org_id).distinct()).scalars())

        return self._database.run(look, READ_LIMIT_S, writes=False)

    def outdated(self, org_id: str, version: str, limit: int, *, only_unmade: bool = False) -> list[Outdated]:
        return self._read(
            org_id, lambda rows: rows.outdated(org_id, version, limit, only_unmade=only_unmade), BULK_LIMIT_S
        )

    def count_outdated(self, org_id: str, version: str, *, only_unmade: bool = False) -> int:
        return self._read(
            org_id, lambda rows: rows.count_outdated(org_id, version, only_unmade=only_unmade), BULK_LIMIT_S
        )

    def write_features(self, org_id: str, features: Mapping[str, Features], *, is_news: bool = False) -> int:
        return self._write(lambda rows: rows.write_features(org_id, features, is_news=is_news), org_id, BULK_LIMIT_S)

    def transact(self, org_id: str, work: Callable[[Rows], T]) -> T:
        return self._write(work, org_id)

    def history(self, namespace: Namespace, memory_id: str) -> list[Memory]:
        return self._read(namespace.org_id, lambda rows: rows.history(namespace, memory_id))

    def _act_for(self, connection: Connection, org_id: str) -> None:
        act_for(connection, org_id, {"search_path": self._vector_schema})

    def _read(self, org_id: str, work: Callable[[Rows], T], limit_s: float = READ_LIMIT_S) -> T:
        def read(connection: Connection) -> T:
            self._act_for(connection, org_id)
            return work(Rows(connection, None, _Postings(connection)))

        self._versions.refuse_when_away()
        with _readable():
            return self._database.run(read, limit_s, writes=False)

    def _write(self, work: Callable[[Rows], T], org_id: str = "", limit_s: float = WRITE_LIMIT_S) -> T:
        """`org_id`: of work that begins without `Postings.lock`."""
        made: dict[tuple[str, str], Version] = {}

        def write(connection: Connection) -> T:
            made.clear()  # an attempt that failed
            self._act_for(connection, org_id)
            return work(Rows(connection, self._indexer, _Postings(connection, made)))

        self._versions.refuse_when_away()
        result = self._database.run(write, limit_s)
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


class _Snapshot(RowsSnapshot):
    """Rows are read by the driver itself, as `candidates` does."""

    def __init__(self, connection: Connection, partition: Namespace, version: Version, vector_schema: str) -> None:
        super().__init__(connection, partition, version, FETCHED_ROWS)
        self._vector_schema = vector_schema

    @override
    def active(self, *, with_superseded: bool = False) -> Iterator[list[Row]]:
        whose = self._partition
        query = f"""
            SELECT {_SELECTED}, {self._vector_schema}.halfvec_send(m.embedding) FROM ibex_core.memories m
            WHERE m.org_id = %(org)s::uuid AND m.agent_id = %(agent)s::uuid AND m.status = ANY (%(statuses)s)
                AND m.user_id {"IS NULL" if whose.user_id is None else "= %(user)s::varchar"}
        """  # noqa: S608 - names of columns
        values = {
            "org": whose.org_id,
            "agent": whose.agent_id,
            "user": whose.user_id,
            "statuses": ["active", "superseded"] if with_superseded else ["active"],
        }
        driver = self._connection.connection.driver_connection
        with driver_errors(), driver.cursor("memories") as cursor:  # type: ignore[union-attr]
            cursor.execute(query, values, binary=True)
            while fetched := cursor.fetchmany(FETCHED_ROWS):
                for first in range(0, len(fetched), BATCH_ROWS):
                    yield [_from_driver(row) for row in fetched[first : first + BATCH_ROWS]]


class _Postings:
    def __init__(self, connection: Connection, made: dict[tuple[str, str], Version] | None = None) -> None:
        """`made` gets the versions that this transaction makes."""
        self._connection = connection
        self._made = {} if made is None else made

    def lock(self, partitions: Sequence[Namespace]) -> None:
        if partitions:
            agents = [f"{one.org_id} {one.agent_id}" for one in partitions]
            self._connection.execute(_LOCK, {"org_id": partitions[0].org_id, "agents": agents})

    def around(self, stretches: Sequence[Stretch], after: int) -> list[Memory]:
        found: list[Memory] = []
        for has_user in (True, False):
            its = [one for one in stretches if (one.partition.user_id is not None) == has_user]
            if its:
                rows = self._connection.exec_driver_sql(_AROUND[has_user], _asked(its, after))
                found += [read_memory(_decoded(row)) for row in rows]
        return found

    def bumped(self, partition: Namespace, version: Version) -> None:
        self._made[partition.org_id, partition.agent_id] = version
        payload = notification(partition.org_id, partition.agent_id, version)
        self._connection.execute(select(func.pg_notify(CHANNEL, payload)))

    def insert(self, rows: Sequence[dict[str, object]]) -> None:
        names = tuple(rows[0])
        given = ", ".join(names)
        values = ", ".join(map(_unpacked, names))
        # One statement: planning it for each row costs more than all of a row's work but its vector's.
        statement = f"INSERT INTO ibex_core.memories ({given}) SELECT {values} FROM {_arrays(names)}"  # noqa: S608 - names
        self._connection.execute(text(statement), _by_column(rows))

    def update(self, org_id: str, rows: Sequence[dict[str, object]]) -> None:
        names = tuple(rows[0])
        values = ", ".join(f"{name} = {_unpacked(name)}" for name in names if name != "id")
        statement = (
            f"UPDATE ibex_core.memories AS m SET {values} FROM {_arrays(names)}"  # noqa: S608 - names of columns
            " WHERE m.org_id = CAST(:org AS uuid) AND m.id = n.id"
        )
        self._connection.execute(text(statement), {"org": org_id, **_by_column(rows)})

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


def _sent_as(name: str) -> str:
    """The type of a column's array. Texts of any length: a cast to a shorter type would cut them in silence."""
    its = memories.c[name].type
    if isinstance(its, (String, Text, JSON)) and name not in _UUIDS:
        return "text"
    return "text" if name == "embedding" else its.compile(_DIALECT)


def _arrays(names: Sequence[str]) -> str:
    """Parameters of these names, each a list, as a table `n`."""
    arrays = ", ".join(f"CAST(:{name} AS {_sent_as(name)}[])" for name in names)
    return f"unnest({arrays}) AS n ({', '.join(names)})"


def _unpacked(name: str) -> str:
    """The column of `n` as the table has it; `halfvec` is found by the search path."""
    return f"n.{name}" + {"embedding": "::halfvec", "metadata": "::json"}.get(name, "")


def _by_column(rows: Sequence[dict[str, Any]]) -> dict[str, list[object]]:
    by_name: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    for name, encode in _ENCODED.items():
        if name in by_name:
            by_name[name] = [None if value is None else encode(value) for value in by_name[name]]
    return by_name


_ENCODED: dict[str, Callable[[Any], object]] = {
    "metadata": json.dumps,
    "embedding": halfvec_text,
    # Members of enumerations, and integers among floats: an array is of one type.
    **dict.fromkeys(("category", "status", "source"), str),
    **dict.fromkeys(("confidence", "usefulness"), float),
}
_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]
# Held until the commit; numbers may meet, which makes two agents wait for each other and nothing else.
_LOCK = text(
    "SELECT set_config('app.current_org_id', :org_id, true), pg_advisory_xact_lock(hashtextextended(agent, 466))"
    " FROM unnest(CAST(:agents AS text[])) AS agent"
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


def _selected(column: Column[Any]) -> str:
    """Without the connection's time zone, in which the first and last days of the calendar may not exist."""
    if isinstance(column.type, UtcDateTime):
        return f"m.{column.name} AT TIME ZONE 'UTC'"
    return f"m.{column.name}::text" if column.name in {*_UUIDS, "metadata"} else f"m.{column.name}"


_SELECTED_MEMORY = ", ".join(map(_selected, COLUMNS))
_SELECTED = ", ".join(map(_selected, [*COLUMNS, *FEATURES[:-1]]))


def _around(*, has_user: bool) -> str:
    """One question for all stretches: a session that is asked about alone costs a round trip and a plan."""
    unseen = ", ".join(f"'{one}'" for one in UNSEEN)
    mine = (
        "m.org_id = %(org)s::uuid AND m.agent_id = s.agent_id AND m.session_id = s.session_id AND "
        + ("m.user_id = s.user_id" if has_user else "m.user_id IS NULL")
        + f" AND m.status NOT IN ({unseen})"
    )
    place, begin, end = f"({TURN}, m.created_at)", "(s.first_turn, s.first_at)", "(s.last_turn, s.last_at)"
    up, down = f"{TURN}, m.created_at, m.id", f"{TURN} DESC, m.created_at DESC, m.id DESC"
    parts = (
        (f"{place} < {begin}", down, str(MOST_OF_TURNS)),
        (f"{place} >= {begin} AND {place} <= {end}", up, str(MOST_BETWEEN)),
        (f"{place} > {end}", up, "%(after)s"),
    )
    of_session = " UNION ALL ".join(
        f"(SELECT * FROM ibex_core.memories m WHERE {mine} AND {where} ORDER BY {order} LIMIT {limit})"  # noqa: S608
        for where, order, limit in parts
    )
    return f"""
        SELECT {_SELECTED_MEMORY} FROM unnest(
            %(agents)s::uuid[], %(users)s::varchar[], %(sessions)s::varchar[],
            %(first_turns)s::integer[], %(first_ats)s::timestamptz[],
            %(last_turns)s::integer[], %(last_ats)s::timestamptz[]
        ) AS s (agent_id, user_id, session_id, first_turn, first_at, last_turn, last_at)
        CROSS JOIN LATERAL ({of_session}) AS m
    """  # noqa: S608 - names of columns


_AROUND = {has_user: _around(has_user=has_user) for has_user in (True, False)}


def _asked(stretches: Sequence[Stretch], after: int) -> dict[str, object]:
    return {
        "org": stretches[0].partition.org_id,
        "agents": [one.partition.agent_id for one in stretches],
        "users": [one.partition.user_id for one in stretches],
        "sessions": [one.session_id for one in stretches],
        "first_turns": [one.first[0] for one in stretches],
        "first_ats": [one.first[1] for one in stretches],
        "last_turns": [one.last[0] for one in stretches],
        "last_ats": [one.last[1] for one in stretches],
        "after": after,
    }


@lru_cache
def _candidates(vector_schema: str, dimension: int, *, has_user: bool) -> str:
    """`dimension`: of the vector; 0: without one.

    Every condition is one that may use an index under row-level security (one with an addition is none, so turns are
    counted before they are compared), and the plan is made with the values, so it reads the organisation's partition
    alone. Each table that is named makes planning longer.
    """
    mine = "m.org_id = %(org)s::uuid AND m.agent_id = %(agent)s::uuid AND " + (
        "(m.user_id IS NULL OR m.user_id = %(user)s::varchar)" if has_user else "m.user_id IS NULL"
    )
    found = "m.id, m.user_id, m.session_id, m.turn_index"
    kind = f"{vector_schema}.halfvec({dimension})"
    near = f"""
        SELECT {found} FROM ibex_core.memories m
        WHERE {mine} AND m.status = ANY (%(statuses)s) AND m.embedding_dimension = {dimension}
            AND m.features_version = %(model)s
        ORDER BY m.embedding::{kind} OPERATOR({vector_schema}.<#>) %(vector)s::{kind} LIMIT %(limit)s
    """  # noqa: S608 - numbers and a quoted name
    nothing = f"SELECT {found} FROM ibex_core.memories m WHERE false"  # noqa: S608 - names
    owners = ["hits.user_id IS NULL AND m.user_id IS NULL"]
    owners += ["m.user_id = hits.user_id"] if has_user else []
    beside = " UNION ALL ".join(
        f"""
        SELECT m.id FROM ibex_core.memories m
        WHERE m.org_id = %(org)s::uuid AND m.agent_id = %(agent)s::uuid AND {owner} AND m.session_id = hits.session_id
            AND {TURN} BETWEEN hits.first AND hits.last AND m.status = 'active'
        """  # noqa: S608 - as above
        for owner in owners
    )
    return f"""
        WITH asked AS MATERIALIZED (
            SELECT ARRAY(
                SELECT t.memory_id FROM ibex_core.memory_terms t
                WHERE t.org_id = %(org)s::uuid AND t.term = a.term LIMIT %(counted)s
            ) AS ids, a.term
            FROM unnest(%(terms)s::bigint[]) AS a (term)
        ), rare AS (
            SELECT ids, seen FROM (
                SELECT ids, seen, sum(seen) OVER (ORDER BY seen, term) - seen AS rarer
                FROM (SELECT ids, term, cardinality(ids) AS seen FROM asked) AS counted WHERE seen > 0
            ) AS ranked
            WHERE rarer < {ENOUGH_HITS}
        ), worded AS (
            SELECT {found} FROM (
                SELECT its.id, sum(1 / ln(2 + rare.seen)) AS worth FROM rare CROSS JOIN unnest(rare.ids) AS its (id)
                GROUP BY its.id ORDER BY worth DESC, its.id DESC LIMIT 2 * %(limit)s
            ) AS hit
            JOIN ibex_core.memories m ON m.id = hit.id
            WHERE {mine} AND m.status = ANY (%(statuses)s)
            ORDER BY hit.worth DESC, m.id DESC LIMIT %(limit)s
        ), near AS ({near if dimension else nothing}),
        hits AS MATERIALIZED (
            SELECT id, user_id, session_id, greatest(turn_index, {TURNS_AROUND}) - {TURNS_AROUND} AS first,
                least(turn_index, {_LAST_TURN}) + {TURNS_AROUND} AS last
            FROM (SELECT * FROM worded UNION SELECT * FROM near) AS found
        ), around AS (
            SELECT beside.id FROM hits CROSS JOIN LATERAL ({beside}) AS beside
            WHERE hits.session_id IS NOT NULL AND hits.first IS NOT NULL
        )
        SELECT {_SELECTED}, {vector_schema}.halfvec_send(m.embedding) FROM ibex_core.memories m
        WHERE {mine} AND m.id = ANY (ARRAY(SELECT id FROM hits UNION SELECT id FROM around))
    """  # noqa: S608 - as above


_TIMES = [place for place, column in enumerate(COLUMNS) if isinstance(column.type, UtcDateTime)]
_METADATA = COLUMNS.index(memories.c.metadata)


def _from_driver(row: Sequence[Any]) -> Row:
    values = _decoded(row)
    values[-1] = halfvec_from_wire(values[-1])
    return read_row(values)


def _decoded(row: Sequence[Any]) -> list[Any]:
    """Columns of a memory as they are selected, and whatever follows them."""
    values = list(row)
    for place in _TIMES:
        if values[place] is not None:
            values[place] = values[place].replace(tzinfo=UTC)
    values[_METADATA] = {} if values[_METADATA] == "{}" else json.loads(values[_METADATA])
    return values
