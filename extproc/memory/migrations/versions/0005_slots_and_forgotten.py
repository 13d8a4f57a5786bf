"""What facts are about, where an index finds it; and until when what somebody said is to be forgotten."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_ID = sa.String(36).with_variant(sa.Uuid(as_uuid=False), "postgresql")
_TIME = sa.DateTime().with_variant(sa.DateTime(timezone=True), "postgresql")
_SLOT_CHARS = 200
"""Of a slot, so that an imported one of any length fits into an index."""
_ORG = "nullif(current_setting('app.current_org_id', true), '')::uuid"


def upgrade() -> None:
    is_postgresql = op.get_context().dialect.name == "postgresql"
    schema = "ibex_core" if is_postgresql else None
    if is_postgresql:
        _drop_vector_indexes()
        # Stored: row-level security keeps what takes JSON apart away from an index, and a comparison of texts not.
        # A NUL anywhere in it is an error to `->>`: such a row has no slot.
        made = f"CASE WHEN position('\\u0000' IN metadata::text) = 0 THEN left(metadata ->> 'slot', {_SLOT_CHARS}) END"
        op.execute(f"ALTER TABLE ibex_core.memories ADD COLUMN slot text GENERATED ALWAYS AS ({made}) STORED")
    else:
        # SQLite adds only computed columns that are not stored; their index is.
        made = f"substr(json_extract(metadata, '$.slot'), 1, {_SLOT_CHARS})"
        op.execute(f"ALTER TABLE memories ADD COLUMN slot TEXT GENERATED ALWAYS AS ({made}) VIRTUAL")
    is_fact = sa.text("slot IS NOT NULL AND status = 'active'")
    op.create_index(
        "memories_by_slot",
        "memories",
        ["org_id", "agent_id", "user_id", "slot"],
        schema=schema,
        sqlite_where=is_fact,
        postgresql_where=is_fact,
    )
    op.create_table(
        "forgotten",
        sa.Column("org_id", _ID, primary_key=True),
        sa.Column("agent_id", _ID, primary_key=True),
        sa.Column("user_id", sa.String(128), primary_key=True),
        sa.Column("said_until", _TIME, nullable=False),
        schema=schema,
    )
    if is_postgresql:
        op.execute("ALTER TABLE ibex_core.forgotten ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE ibex_core.forgotten FORCE ROW LEVEL SECURITY")
        made = f"USING (org_id = {_ORG}) WITH CHECK (org_id = {_ORG})"
        op.execute(f"CREATE POLICY forgotten_of_org ON ibex_core.forgotten {made}")


def _drop_vector_indexes() -> None:
    """A stored column writes the table anew, and nobody reads it meanwhile; of that time they would be most.

    `extproc.memory.vectors` makes them again, in a transaction that readers do not wait for.
    """
    found = sa.text(
        "SELECT relname FROM pg_class WHERE relnamespace = 'ibex_core'::regnamespace AND relkind = 'I'"
        " AND starts_with(relname, 'memories_nearest_')"
    )
    for name in op.get_bind().execute(found).scalars().all():
        op.execute(f"DROP INDEX ibex_core.{name}")
