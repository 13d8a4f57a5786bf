"""Sessions, their checkpoints and texts, and tasks that failed; on PostgreSQL each row is its organisation's alone."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.String(36).with_variant(sa.Uuid(as_uuid=False), "postgresql")
_TIME = sa.DateTime().with_variant(sa.DateTime(timezone=True), "postgresql")
_TENANT_TABLES = ("sessions", "checkpoints", "turns", "failed_tasks")


def upgrade() -> None:
    is_postgresql = op.get_context().dialect.name == "postgresql"
    schema = "ibex_core" if is_postgresql else None
    _create_sessions(schema)
    _create_checkpoints(schema)
    _create_turns(schema)
    op.create_table(
        "failed_tasks",
        sa.Column("task_id", sa.String(64), primary_key=True),
        sa.Column("org_id", _ID, nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("failed_at", _TIME, nullable=False),
        schema=schema,
    )
    op.create_table(
        "sweeps",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("swept_at", _TIME, nullable=False),
        schema=schema,
    )
    if is_postgresql:
        _isolate_organisations()
        _keep_checkpoints()


def _create_sessions(schema: str | None) -> None:
    op.create_table(
        "sessions",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("org_id", _ID, nullable=False),
        sa.Column("agent_id", _ID, nullable=False),
        sa.Column("user_id", sa.String(128)),
        sa.Column("external_id", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("turn_count", sa.Integer, nullable=False),
        sa.Column("total_input_tokens", sa.BigInteger, nullable=False),
        sa.Column("total_output_tokens", sa.BigInteger, nullable=False),
        sa.Column("total_latency_ms", sa.BigInteger, nullable=False),
        sa.Column("extracted_turns", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.Column("completed_at", _TIME),
        schema=schema,
    )
    op.create_index(
        "sessions_once",
        "sessions",
        ["org_id", "agent_id", sa.text("coalesce(user_id, '')"), "external_id"],
        unique=True,
        schema=schema,
    )
    _create_partial_index("sessions_idle", ["updated_at"], "status = 'active'", schema)
    _create_partial_index("sessions_unextracted", ["org_id", "updated_at"], "extracted_turns < turn_count", schema)


def _create_partial_index(name: str, columns: list[str], where: str, schema: str | None) -> None:
    condition = sa.text(where)
    op.create_index(name, "sessions", columns, schema=schema, sqlite_where=condition, postgresql_where=condition)


def _create_checkpoints(schema: str | None) -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("session_id", _ID, sa.ForeignKey(_qualified(schema, "sessions.id")), nullable=False),
        sa.Column("org_id", _ID, nullable=False),
        sa.Column("agent_id", _ID, nullable=False),
        sa.Column("turn_index", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("messages_hash", sa.String(64), nullable=False),
        sa.Column("completion_hash", sa.String(64)),
        sa.Column("input_tokens", sa.Integer),
        sa.Column("output_tokens", sa.Integer),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("latency_ms", sa.Integer, nullable=False),
        sa.Column("provider_request_id", sa.Text),
        sa.Column("is_streaming", sa.Boolean, nullable=False),
        sa.Column("is_complete", sa.Boolean, nullable=False),
        sa.Column("memories_injected", sa.Integer, nullable=False),
        sa.Column("context_tokens", sa.Integer, nullable=False),
        sa.Column("context_fallback", sa.Boolean, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.UniqueConstraint("session_id", "turn_index", name="checkpoints_by_turn"),
        sa.UniqueConstraint("org_id", "request_id", name="checkpoints_once"),
        schema=schema,
    )


def _create_turns(schema: str | None) -> None:
    op.create_table(
        "turns",
        sa.Column("session_id", _ID, sa.ForeignKey(_qualified(schema, "sessions.id")), primary_key=True),
        sa.Column("org_id", _ID, nullable=False),
        sa.Column("turn_index", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("user_text", sa.Text, nullable=False),
        sa.Column("assistant_text", sa.Text, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        schema=schema,
    )
    op.create_index("turns_by_expiry", "turns", ["org_id", "expires_at"], schema=schema)


def _qualified(schema: str | None, name: str) -> str:
    return f"{schema}.{name}" if schema else name


def _isolate_organisations() -> None:
    """Even for the tables' owner (docs/decisions/0011)."""
    for table in _TENANT_TABLES:
        op.execute(f"ALTER TABLE ibex_core.{table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE ibex_core.{table} FORCE ROW LEVEL SECURITY")
        # A setting that was made in an earlier transaction of the connection is empty now, not absent.
        op.execute(f"""
            CREATE POLICY {table}_of_org ON ibex_core.{table}
            USING (org_id = nullif(current_setting('app.current_org_id', true), '')::uuid)
            WITH CHECK (org_id = nullif(current_setting('app.current_org_id', true), '')::uuid)
        """)
    op.execute("""
        CREATE POLICY sessions_for_sweep ON ibex_core.sessions FOR SELECT
        USING (current_setting('app.sweep', true) = 'on')
    """)


def _keep_checkpoints() -> None:
    """A checkpoint never changes, and goes only by who says in the same transaction that retention asks for it."""
    op.execute("""
        CREATE FUNCTION ibex_core.keep_checkpoints() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP <> 'UPDATE' AND current_setting('app.retention', true) = 'on' THEN
                RETURN OLD;
            END IF;
            RAISE EXCEPTION 'checkpoints are append-only'
                USING HINT = 'To remove rows: SET LOCAL app.retention = ''on'' in the same transaction.';
        END $$
    """)
    op.execute("""
        CREATE TRIGGER checkpoints_kept BEFORE UPDATE OR DELETE ON ibex_core.checkpoints
        FOR EACH ROW EXECUTE FUNCTION ibex_core.keep_checkpoints()
    """)
    op.execute("""
        CREATE TRIGGER checkpoints_not_emptied BEFORE TRUNCATE ON ibex_core.checkpoints
        FOR EACH STATEMENT EXECUTE FUNCTION ibex_core.keep_checkpoints()
    """)
