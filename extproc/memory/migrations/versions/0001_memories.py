"""Memories, and a version counter for each agent."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    # PostgreSQL gets its memories, with partitions and vectors, in a migration of their own.
    if op.get_context().dialect.name != "sqlite":
        return
    op.create_table(
        "memories",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("agent_id", sa.String(36), nullable=False),
        sa.Column("user_id", sa.String(128)),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("content_hash", sa.String(64), nullable=False),
        sa.Column("content_tokens", sa.Integer, nullable=False),
        sa.Column("category", sa.String(16), nullable=False),
        sa.Column("confidence", sa.Float, nullable=False),
        sa.Column("usefulness", sa.Float, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("session_id", sa.String(64)),
        sa.Column("turn_index", sa.Integer),
        sa.Column("valid_from", sa.DateTime),
        sa.Column("valid_until", sa.DateTime),
        sa.Column("superseded_by", sa.String(36)),
        sa.Column("retrieval_count", sa.Integer, nullable=False),
        sa.Column("last_retrieved_at", sa.DateTime),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("updated_at", sa.DateTime, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    op.create_index("memories_by_revision", "memories", ["org_id", "agent_id", "user_id", "revision"])
    op.create_index(
        "memories_once",
        "memories",
        ["org_id", "agent_id", sa.text("coalesce(user_id, '')"), "content_hash"],
        unique=True,
        sqlite_where=sa.text("status = 'active'"),
    )
    op.create_table(
        "memory_versions",
        sa.Column("org_id", sa.String(36), primary_key=True),
        sa.Column("agent_id", sa.String(36), primary_key=True),
        sa.Column("changes", sa.Integer, nullable=False),
        sa.Column("removals", sa.Integer, nullable=False),
    )
