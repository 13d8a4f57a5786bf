"""The tables. The migrations build them; tests hold both together.

On PostgreSQL they lie in the schema `ibex_core`, which each connection puts before the names, with the types that it
has; SQLite keeps the same names and meaning.
"""

from __future__ import annotations

import struct
from array import array
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.types import UserDefinedType
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import ColumnElement, Dialect
    from sqlalchemy.types import TypeEngine

__all__ = [
    "HEAD",
    "POSTGRESQL_SCHEMA",
    "SLOT_CHARS",
    "TURN",
    "Halfvec",
    "UtcDateTime",
    "agents",
    "api_tokens",
    "checkpoints",
    "directive_versions",
    "directives",
    "failed_tasks",
    "forgotten",
    "halfvec_from_wire",
    "halfvec_text",
    "memories",
    "memory_terms",
    "memory_versions",
    "metadata",
    "organizations",
    "sessions",
    "sessions_once",
    "sweeps",
    "turns",
]

POSTGRESQL_SCHEMA = "ibex_core"
HEAD = "0005"
"""The newest migration: a database that says so needs no Alembic, whose import alone takes a quarter of a second."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time, in UTC on both sides: SQLite has no time zones, PostgreSQL answers in that of the connection."""

    impl = DateTime
    cache_ok = True

    @override
    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(DateTime(timezone=dialect.name == "postgresql"))

    @override
    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    @override
    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class Halfvec(UserDefinedType[bytes]):
    """pgvector's type of any dimension, as `Features.vector`: float16, little-endian."""

    cache_ok = True

    @override
    def get_col_spec(self, **_: object) -> str:
        return "halfvec"

    @override
    def bind_processor(self, dialect: Dialect) -> Callable[[bytes | None], str | None]:
        return lambda value: None if value is None else halfvec_text(value)

    @override
    def column_expression(self, colexpr: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.halfvec_send(colexpr, type_=self)  # numbers as text take ten times as long

    @override
    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[bytes | None], bytes | None]:
        return halfvec_from_wire


class _HalfTexts(dict[int, str]):
    """The text of each float16 by its 16 bits, as far as they occurred: 65,536 at most, 5 MB."""

    def __missing__(self, bits: int) -> str:
        # Five digits tell all of them apart (IEEE 754, 2 + 11 · log10(2)).
        text = self[bits] = f"{struct.unpack('<e', bits.to_bytes(2, 'little'))[0]:.5g}"
        return text


_half_texts = _HalfTexts()


def halfvec_text(vector: bytes) -> str:
    return "[" + ",".join(map(_half_texts.__getitem__, array("H", vector))) + "]"


def halfvec_from_wire(sent: bytes | None) -> bytes | None:
    """What `halfvec_send` gives: dimension, 0, both 16 bits, then the numbers, all big-endian."""
    if sent is None:
        return None
    numbers = array("H", bytes(sent[4:]))
    numbers.byteswap()  # this program runs on little-endian machines only, as its word table does
    return numbers.tobytes()


_ID = String(36).with_variant(Uuid(as_uuid=False), "postgresql")
"""A UUID: its text with hyphens, in lower case, to everybody but PostgreSQL itself."""

TURN = "CASE WHEN turn_index IS NULL THEN -1 ELSE turn_index END"
"""A memory's turn as indexes order it. Not COALESCE: row-level security takes that for a function that may tell, and
keeps it away from indexes."""

SLOT_CHARS = 200
"""Of a slot that `memories.slot` holds."""

metadata = MetaData()

# On PostgreSQL: partitions by a hash of the organisation, key (org_id, id), no `number`, and `slot` is stored
# (docs/decisions/0020).
memories = Table(
    "memories",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("org_id", _ID, nullable=False),
    Column("agent_id", _ID, nullable=False),
    Column("user_id", String(128)),
    Column("content", Text, nullable=False),
    Column("content_hash", String(64), nullable=False),
    Column("content_tokens", Integer, nullable=False),
    Column("category", String(16), nullable=False),
    Column("confidence", Float, nullable=False),
    Column("usefulness", Float, nullable=False),
    Column("status", String(16), nullable=False),
    Column("source", String(16), nullable=False),
    Column("session_id", String(64)),
    Column("turn_index", Integer),
    Column("valid_from", UtcDateTime),
    Column("valid_until", UtcDateTime),
    Column("superseded_by", _ID),
    Column("retrieval_count", Integer, nullable=False),
    Column("last_retrieved_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("metadata", JSON, nullable=False),
    # The version of (org, agent) that the row's last change made: a reader asks for what is newer than it has.
    Column("revision", BigInteger().with_variant(Integer, "sqlite"), nullable=False),
    # `Features`; the version is empty until they are made.
    Column("features_version", String(200), nullable=False, server_default=text("''")),
    Column("stems", Text),
    Column("words", LargeBinary),
    Column("embedding", LargeBinary().with_variant(Halfvec(), "postgresql")),
    # The version of the indexer, which names the embedder.
    Column("embedding_model", String(200)),
    Column("embedding_dimension", Integer),
    # SQLite only: what `memory_terms` calls the memory.
    Column("number", Integer),
    # The database's own, from `metadata`: the beginning of what a fact is about; null: it is none.
    Column("slot", Text, Computed(f"substr(json_extract(metadata, '$.slot'), 1, {SLOT_CHARS})", persisted=False)),
)
Index("memories_by_revision", memories.c.org_id, memories.c.agent_id, memories.c.user_id, memories.c.revision)
Index(
    "memories_once",
    memories.c.org_id,
    memories.c.agent_id,
    func.coalesce(memories.c.user_id, text("''")),
    memories.c.content_hash,
    unique=True,
    sqlite_where=text("status = 'active'"),
    postgresql_where=text("status = 'active'"),
)
Index(
    "memories_by_turn",
    memories.c.org_id,
    memories.c.agent_id,
    memories.c.user_id,
    memories.c.session_id,
    text(TURN),
    memories.c.created_at,
    memories.c.id,
)
Index("memories_by_features", memories.c.org_id, memories.c.features_version)
Index("memories_by_number", memories.c.number, unique=True)
_IS_FACT = text("slot IS NOT NULL AND status = 'active'")
Index(
    "memories_by_slot",
    *(memories.c[name] for name in ("org_id", "agent_id", "user_id", "slot")),
    sqlite_where=_IS_FACT,
    postgresql_where=_IS_FACT,
)

# SQLite only, PostgreSQL's is in `postgres`. Which memories hold a stem, as one number (`terms`). By blocks of memories
# that were written one after the other, so that a write touches few pages.
memory_terms = Table(
    "memory_terms",
    metadata,
    Column("block", Integer, primary_key=True, autoincrement=False),
    Column("term", BigInteger, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    sqlite_with_rowid=False,
)

memory_versions = Table(
    "memory_versions",
    metadata,
    Column("org_id", _ID, primary_key=True),
    Column("agent_id", _ID, primary_key=True),
    # Counts every write that can change an answer; retrieval counts cannot.
    Column("changes", BigInteger().with_variant(Integer, "sqlite"), nullable=False),
    # Counts the writes that took rows away, which `revision` cannot show.
    Column("removals", BigInteger().with_variant(Integer, "sqlite"), nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("org_id", _ID, nullable=False),
    Column("agent_id", _ID, nullable=False),
    Column("user_id", String(128)),
    Column("external_id", String(64), nullable=False),
    # active, completed (by the client), abandoned (by silence), error.
    Column("status", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("turn_count", Integer, nullable=False),
    Column("total_input_tokens", BigInteger, nullable=False),
    Column("total_output_tokens", BigInteger, nullable=False),
    Column("total_latency_ms", BigInteger, nullable=False),
    # How many turns, from the first on, extraction is done with: a count, so that turn 0 is not skipped.
    Column("extracted_turns", Integer, nullable=False, server_default=text("0")),
    Column("created_at", UtcDateTime, nullable=False),
    # The latest turn's end.
    Column("updated_at", UtcDateTime, nullable=False),
    # Only while the status is completed.
    Column("completed_at", UtcDateTime),
)
sessions_once = Index(
    "sessions_once",
    sessions.c.org_id,
    sessions.c.agent_id,
    func.coalesce(sessions.c.user_id, text("''")),
    sessions.c.external_id,
    unique=True,
)
_ACTIVE, _UNEXTRACTED = text("status = 'active'"), text("extracted_turns < turn_count")
Index("sessions_idle", sessions.c.updated_at, sqlite_where=_ACTIVE, postgresql_where=_ACTIVE)
Index(
    "sessions_unextracted",
    sessions.c.org_id,
    sessions.c.updated_at,
    sqlite_where=_UNEXTRACTED,
    postgresql_where=_UNEXTRACTED,
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("session_id", _ID, ForeignKey("sessions.id"), nullable=False),
    Column("org_id", _ID, nullable=False),
    Column("agent_id", _ID, nullable=False),
    Column("turn_index", Integer, nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("messages_hash", String(64), nullable=False),
    Column("completion_hash", String(64)),
    # Null: the provider did not say.
    Column("input_tokens", Integer),
    Column("output_tokens", Integer),
    Column("model", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("latency_ms", Integer, nullable=False),
    Column("provider_request_id", Text),
    Column("is_streaming", Boolean, nullable=False),
    Column("is_complete", Boolean, nullable=False),
    Column("memories_injected", Integer, nullable=False),
    Column("context_tokens", Integer, nullable=False),
    Column("context_fallback", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("session_id", "turn_index", name="checkpoints_by_turn"),
    UniqueConstraint("org_id", "request_id", name="checkpoints_once"),
)

turns = Table(
    "turns",
    metadata,
    Column("session_id", _ID, ForeignKey("sessions.id"), primary_key=True),
    Column("org_id", _ID, nullable=False),
    Column("turn_index", Integer, primary_key=True, autoincrement=False),
    # The only conversation text in the database.
    Column("user_text", Text, nullable=False),
    Column("assistant_text", Text, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)
Index("turns_by_expiry", turns.c.org_id, turns.c.expires_at)

failed_tasks = Table(
    "failed_tasks",
    metadata,
    Column("task_id", String(64), primary_key=True),
    Column("org_id", _ID, nullable=False),
    # What the task was given: ids, never text.
    Column("payload", JSON, nullable=False),
    Column("error", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("failed_at", UtcDateTime, nullable=False),
)

# Whose memories were all forgotten, and when: nothing is learnt any more of what they had said until then, wherever
# it waited (docs/forget.md).
forgotten = Table(
    "forgotten",
    metadata,
    Column("org_id", _ID, primary_key=True),
    Column("agent_id", _ID, primary_key=True),
    # Empty: the agent's own.
    Column("user_id", String(128), primary_key=True),
    Column("said_until", UtcDateTime, nullable=False),
)

# When the sweeper last ran, anywhere: one row a name, of no organisation.
sweeps = Table(
    "sweeps",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("swept_at", UtcDateTime, nullable=False),
)

organizations = Table(
    "organizations",
    metadata,
    # What is `org_id` everywhere else.
    Column("id", _ID, primary_key=True),
    Column("name", Text, nullable=False),
    # Requests a minute; null: the gate's default, 0: any number.
    Column("rpm_limit", Integer),
    Column("created_at", UtcDateTime, nullable=False),
)

# The key begins with the organisation: to ask for an agent of another one is the same miss as for an unknown one.
agents = Table(
    "agents",
    metadata,
    Column("org_id", _ID, ForeignKey("organizations.id"), primary_key=True),
    Column("id", _ID, primary_key=True),
    Column("name", Text, nullable=False),
    # active, paused, suspended, archived.
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("org_id", _ID, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("description", Text, nullable=False),
    # The token's beginning, which is no secret.
    Column("prefix", String(32), nullable=False, unique=True),
    # Argon2id of the whole token, with its parameters and salt. The token itself is nowhere.
    Column("hash", Text, nullable=False),
    Column("permissions", BigInteger, nullable=False),
    # Null: any agent of the organisation.
    Column("agent_id", _ID),
    Column("user_id", String(128)),
    # Null: never. From this moment on it is not valid.
    Column("expires_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
    Column("revoke_reason", Text),
    ForeignKeyConstraint(["org_id", "agent_id"], ["agents.org_id", "agents.id"]),
)
Index("api_tokens_by_org", api_tokens.c.org_id, api_tokens.c.id)

# Of agents that need not be in `agents`: an installation may have an authentication of its own.
directives = Table(
    "directives",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("org_id", _ID, nullable=False),
    Column("agent_id", _ID, nullable=False),
    # A row of `directive_versions`; null until the first.
    Column("active_version_id", _ID),
    # system_first, system_append, user_prepend.
    Column("injection_mode", String(16), nullable=False),
    Column("is_active", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    UniqueConstraint("org_id", "agent_id", name="directives_once"),
)

# UTF-8 bytes; each database counts them in its own way.
_DIRECTIVE_BYTES = {"sqlite": "length(CAST(content AS BLOB))", "postgresql": "octet_length(content)"}
directive_versions = Table(
    "directive_versions",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("directive_id", _ID, ForeignKey("directives.id"), nullable=False),
    Column("org_id", _ID, nullable=False),
    # From 1.
    Column("version", Integer, nullable=False),
    Column("content", Text, nullable=False),
    # SHA-256, hex, of its UTF-8 bytes.
    Column("content_hash", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("directive_id", "version", name="directive_versions_once"),
    *(
        CheckConstraint(f"{length} BETWEEN 1 AND 32768", name="directive_versions_size").ddl_if(dialect=dialect)
        for dialect, length in _DIRECTIVE_BYTES.items()
    ),
)
