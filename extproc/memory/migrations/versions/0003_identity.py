"""Organisations, agents, tokens and directives; on PostgreSQL two windows beside the rows of one organisation."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ID = sa.String(36).with_variant(sa.Uuid(as_uuid=False), "postgresql")
_TIME = sa.DateTime().with_variant(sa.DateTime(timezone=True), "postgresql")
_ORG = "nullif(current_setting('app.current_org_id', true), '')::uuid"
_OWNER_COLUMNS = {
    "organizations": "id",
    "agents": "org_id",
    "api_tokens": "org_id",
    "directives": "org_id",
    "directive_versions": "org_id",
}
"""The column that names the organisation."""


def upgrade() -> None:
    is_postgresql = op.get_context().dialect.name == "postgresql"
    schema = "ibex_core" if is_postgresql else None
    _create_organizations(schema)
    _create_api_tokens(schema)
    _create_directives(schema, "octet_length(content)" if is_postgresql else "length(CAST(content AS BLOB))")
    if is_postgresql:
        _isolate_organisations()
        _open_windows()
        _keep_directive_versions()


def _create_organizations(schema: str | None) -> None:
    op.create_table(
        "organizations",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("rpm_limit", sa.Integer),
        sa.Column("created_at", _TIME, nullable=False),
        schema=schema,
    )
    op.create_table(
        "agents",
        sa.Column("org_id", _ID, sa.ForeignKey(_qualified(schema, "organizations.id")), primary_key=True),
        sa.Column("id", _ID, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        schema=schema,
    )


def _create_api_tokens(schema: str | None) -> None:
    op.create_table(
        "api_tokens",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("org_id", _ID, sa.ForeignKey(_qualified(schema, "organizations.id")), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("prefix", sa.String(32), nullable=False, unique=True),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("permissions", sa.BigInteger, nullable=False),
        sa.Column("agent_id", _ID),
        sa.Column("user_id", sa.String(128)),
        sa.Column("expires_at", _TIME),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("revoked_at", _TIME),
        sa.Column("revoke_reason", sa.Text),
        sa.ForeignKeyConstraint(
            ["org_id", "agent_id"], [_qualified(schema, "agents.org_id"), _qualified(schema, "agents.id")]
        ),
        schema=schema,
    )
    op.create_index("api_tokens_by_org", "api_tokens", ["org_id", "id"], schema=schema)


def _create_directives(schema: str | None, content_bytes: str) -> None:
    op.create_table(
        "directives",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("org_id", _ID, nullable=False),
        sa.Column("agent_id", _ID, nullable=False),
        sa.Column("active_version_id", _ID),
        sa.Column("injection_mode", sa.String(16), nullable=False),
        sa.Column("is_active", sa.Boolean, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.UniqueConstraint("org_id", "agent_id", name="directives_once"),
        schema=schema,
    )
    op.create_table(
        "directive_versions",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("directive_id", _ID, sa.ForeignKey(_qualified(schema, "directives.id")), nullable=False),
        sa.Column("org_id", _ID, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("content_hash", sa.String(64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.UniqueConstraint("directive_id", "version", name="directive_versions_once"),
        sa.CheckConstraint(f"{content_bytes} BETWEEN 1 AND 32768", name="directive_versions_size"),
        schema=schema,
    )


def _qualified(schema: str | None, name: str) -> str:
    return f"{schema}.{name}" if schema else name


def _isolate_organisations() -> None:
    """Even for the tables' owner (docs/decisions/0011)."""
    for table, column in _OWNER_COLUMNS.items():
        op.execute(f"ALTER TABLE ibex_core.{table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE ibex_core.{table} FORCE ROW LEVEL SECURITY")
        op.execute(f"""
            CREATE POLICY {table}_of_org ON ibex_core.{table} USING ({column} = {_ORG}) WITH CHECK ({column} = {_ORG})
        """)


def _open_windows() -> None:
    """For reading only: the one token with a prefix, and the list of organisations (docs/decisions/0014)."""
    op.execute("""
        CREATE POLICY api_tokens_by_prefix ON ibex_core.api_tokens FOR SELECT
        USING (prefix = nullif(current_setting('app.current_token_prefix', true), ''))
    """)
    op.execute("""
        CREATE POLICY organizations_for_listing ON ibex_core.organizations FOR SELECT
        USING (current_setting('app.list_organizations', true) = 'on')
    """)


def _keep_directive_versions() -> None:
    """As with checkpoints: a version never changes, and goes only by who says that retention asks for it."""
    op.execute("""
        CREATE FUNCTION ibex_core.keep_directive_versions() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP <> 'UPDATE' AND current_setting('app.retention', true) = 'on' THEN
                RETURN OLD;
            END IF;
            RAISE EXCEPTION 'directive versions are append-only'
                USING HINT = 'To remove rows: SET LOCAL app.retention = ''on'' in the same transaction.';
        END $$
    """)
    op.execute("""
        CREATE TRIGGER directive_versions_kept BEFORE UPDATE OR DELETE ON ibex_core.directive_versions
        FOR EACH ROW EXECUTE FUNCTION ibex_core.keep_directive_versions()
    """)
    op.execute("""
        CREATE TRIGGER directive_versions_not_emptied BEFORE TRUNCATE ON ibex_core.directive_versions
        FOR EACH STATEMENT EXECUTE FUNCTION ibex_core.keep_directive_versions()
    """)
