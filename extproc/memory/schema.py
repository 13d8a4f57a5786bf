"""The tables of the memory store. The migrations build them; a test holds both together."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    func,
    text,
)
from typing_extensions import override

if TYPE_CHECKING:
    from sqlalchemy import Dialect

__all__ = ["HEAD", "UtcDateTime", "memories", "memory_versions", "metadata"]

HEAD = "0001"
"""The newest migration: a database that says so needs no Alembic, whose import alone takes a quarter of a second."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time, kept as UTC: SQLite has no time zones."""

    impl = DateTime
    cache_ok = True

    @override
    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    @override
    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


metadata = MetaData()

memories = Table(
    "memories",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", String(36), nullable=False),
    Column("agent_id", String(36), nullable=False),
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
    Column("superseded_by", String(36)),
    Column("retrieval_count", Integer, nullable=False),
    Column("last_retrieved_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("metadata", JSON, nullable=False),
    # The version of (org, agent) that the row's last change made: a reader asks for what is newer than it has.
    Column("revision", Integer, nullable=False),
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
)

memory_versions = Table(
    "memory_versions",
    metadata,
    Column("org_id", String(36), primary_key=True),
    Column("agent_id", String(36), primary_key=True),
    # Counts every write that can change an answer; retrieval counts cannot.
    Column("changes", Integer, nullable=False),
    # Counts the writes that took rows away, which `revision` cannot show.
    Column("removals", Integer, nullable=False),
)
