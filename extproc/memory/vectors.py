"""Vectors on PostgreSQL: the column and its indexes, which need the extension `vector`. Every function blocks.

Apart from the migrations: a database of sessions alone, or of tokens, needs no extension, and one that gets it later
must not wait for a new release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from extproc.memory.store import StoreError

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["ADD_LIMIT_S", "MOST_DIMENSIONS", "SHIPPED_DIMENSIONS", "add", "extension_schema", "is_indexed"]

SHIPPED_DIMENSIONS = (256, 384)
"""Of the word table and of `minilm`."""
ADD_LIMIT_S = 3600.0
"""Of each statement: an index of a new dimension costs one look at the table, one of vectors that are there already
(after a migration) 1 ms of CPU for each."""
MOST_DIMENSIONS = 4_000
"""Of an HNSW index over halfvec (pgvector's limit)."""
_LINKS, _LOOKED_AT = 12, 32
"""Of the index. A row's vector takes 0.9 ms of CPU with them, 2.4 ms with pgvector's 16 and 64, and is most of what a
write costs; of the 64 nearest 0.91 are found and not 0.96 (20,000 rows, 64 looked at)."""
_HELP = (
    "PostgreSQL has no pgvector here: install the package (postgresql-NN-pgvector, or an image that has it), then run "
    "as a superuser, in this database: CREATE EXTENSION vector"
)
_LOCK = 0x1BE8_0002
_NO_RIGHT = "42501"


def extension_schema(connection: Connection) -> str | None:
    """Where the extension's types and operators are, quoted; None: it is not installed in this database."""
    schema: str | None = connection.execute(
        text("SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'vector'")
    ).scalar()
    return schema


def is_indexed(connection: Connection, dimension: int) -> bool:
    """Whether vectors can be stored, and those of this dimension found."""
    # Not `to_regclass`, which may not know yet what another process has just committed.
    found = text("SELECT 1 FROM pg_class WHERE relname = :name AND relnamespace = 'ibex_core'::regnamespace")
    return connection.execute(found, {"name": f"memories_nearest_{dimension:d}"}).scalar() is not None


def add(connection: Connection, dimension: int) -> None:
    """Make what is missing of column and index, in a transaction of its own. Raises StoreError with what to do.

    Several processes may do so at once. An index is made before there are rows of its dimension, so it costs one look
    at the table; from then on both models' vectors can be there side by side.
    """
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    if is_indexed(connection, dimension):
        return
    schema = extension_schema(connection) or _installed(connection)
    try:
        if not _has_column(connection):  # `IF NOT EXISTS` keeps readers out all the same, until the index is made
            connection.execute(text(f"ALTER TABLE ibex_core.memories ADD COLUMN embedding {schema}.halfvec"))
        if not 1 <= dimension <= MOST_DIMENSIONS:
            raise StoreError(f"vectors of {dimension:,} numbers cannot be indexed; at most {MOST_DIMENSIONS:,} can")
        connection.execute(
            text(f"""
                CREATE INDEX memories_nearest_{dimension} ON ibex_core.memories
                USING hnsw ((embedding::{schema}.halfvec({dimension})) {schema}.halfvec_ip_ops)
                WITH (m = {_LINKS}, ef_construction = {_LOOKED_AT}) WHERE embedding_dimension = {dimension}
            """)
        )
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", "") != _NO_RIGHT:
            raise
        raise StoreError(
            "the database role may not add vectors to ibex_core.memories; run `extproc migrate` as the tables' owner"
        ) from None


def _has_column(connection: Connection) -> bool:
    found = text(
        "SELECT 1 FROM pg_attribute WHERE attrelid = 'ibex_core.memories'::regclass"
        " AND attname = 'embedding' AND NOT attisdropped"
    )
    return connection.execute(found).scalar() is not None


def _installed(connection: Connection) -> str:
    try:
        with connection.begin_nested():
            connection.execute(text("CREATE EXTENSION vector"))
    except SQLAlchemyError:
        raise StoreError(_HELP) from None
    schema = extension_schema(connection)
    assert schema is not None  # noqa: S101 (it was just made)
    return schema
