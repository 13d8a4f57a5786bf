"""What is computed of a memory, in its row; and memories on PostgreSQL, each organisation's rows its own."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_PARTITIONS = 16
"""As many vector indexes an organisation's memories are spread over by chance: enough for some millions of rows."""


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        _extend_sqlite()
    else:
        _create_postgresql()


def _extend_sqlite() -> None:
    version = sa.Column("features_version", sa.String(200), nullable=False, server_default=sa.text("''"))
    op.add_column("memories", version)
    for column in (
        sa.Column("stems", sa.Text),
        sa.Column("words", sa.LargeBinary),
        sa.Column("embedding", sa.LargeBinary),
        sa.Column("embedding_model", sa.String(200)),
        sa.Column("embedding_dimension", sa.Integer),
        sa.Column("number", sa.Integer),
    ):
        op.add_column("memories", column)
    op.execute("UPDATE memories SET number = rowid")
    order = ("org_id", "agent_id", "user_id", "session_id", "coalesce(turn_index, -1)", "created_at", "id")
    op.create_index("memories_by_turn", "memories", [sa.text(column) for column in order])
    op.create_index("memories_by_features", "memories", ["org_id", "features_version"])
    op.create_index("memories_by_number", "memories", ["number"], unique=True)
    op.create_table(
        "memory_terms",
        sa.Column("block", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("term", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sqlite_with_rowid=False,
    )


def _create_postgresql() -> None:
    """Without the column `embedding`, which needs an extension that a database of sessions need not have.

    `extproc.memory.vectors` adds it.
    """
    op.execute("""
        CREATE TABLE ibex_core.memories (
            id uuid NOT NULL,
            org_id uuid NOT NULL,
            agent_id uuid NOT NULL,
            user_id varchar(128),
            content text NOT NULL,
            content_hash varchar(64) NOT NULL,
            content_tokens integer NOT NULL,
            category varchar(16) NOT NULL,
            confidence double precision NOT NULL,
            usefulness double precision NOT NULL,
            status varchar(16) NOT NULL,
            source varchar(16) NOT NULL,
            session_id varchar(64),
            turn_index integer,
            valid_from timestamptz,
            valid_until timestamptz,
            superseded_by uuid,
            retrieval_count integer NOT NULL,
            last_retrieved_at timestamptz,
            created_at timestamptz NOT NULL,
            updated_at timestamptz NOT NULL,
            metadata json NOT NULL,
            revision bigint NOT NULL,
            features_version varchar(200) NOT NULL DEFAULT '',
            stems text,
            words bytea,
            embedding_model varchar(200),
            embedding_dimension integer,
            CHECK (octet_length(content) BETWEEN 1 AND 10000),
            PRIMARY KEY (org_id, id)
        ) PARTITION BY HASH (org_id)
    """)
    # Only numbers: text operators could not use an index under row-level security, for they are not "leakproof".
    op.execute("""
        CREATE TABLE ibex_core.memory_terms (
            org_id uuid NOT NULL,
            term bigint NOT NULL,
            memory_id uuid NOT NULL
        ) PARTITION BY HASH (org_id)
    """)
    op.execute("""
        CREATE TABLE ibex_core.memory_versions (
            org_id uuid NOT NULL,
            agent_id uuid NOT NULL,
            changes bigint NOT NULL,
            removals bigint NOT NULL,
            PRIMARY KEY (org_id, agent_id)
        )
    """)
    for table in ("memories", "memory_terms"):
        for number in range(_PARTITIONS):
            partition = f"ibex_core.{table}_{number:02}"
            op.execute(
                f"CREATE TABLE {partition} PARTITION OF ibex_core.{table}"
                f" FOR VALUES WITH (MODULUS {_PARTITIONS}, REMAINDER {number})"
            )
            # Without a policy of its own: nobody reads around the policy of the whole.
            _force_row_security(partition)
    _create_postgresql_indexes()
    for table in ("memories", "memory_terms", "memory_versions"):
        _force_row_security(f"ibex_core.{table}")
        op.execute(f"""
            CREATE POLICY {table}_of_org ON ibex_core.{table}
            USING (org_id = nullif(current_setting('app.current_org_id', true), '')::uuid)
            WITH CHECK (org_id = nullif(current_setting('app.current_org_id', true), '')::uuid)
        """)
    op.execute("""
        CREATE POLICY memory_versions_for_sweep ON ibex_core.memory_versions FOR SELECT
        USING (current_setting('app.sweep', true) = 'on')
    """)


def _create_postgresql_indexes() -> None:
    owner = "org_id, agent_id, user_id"
    for name, columns in {
        "memories_by_revision": f"{owner}, revision",
        "memories_by_turn": f"{owner}, session_id, coalesce(turn_index, -1), created_at, id",
        "memories_by_features": "org_id, features_version",
    }.items():
        op.execute(f"CREATE INDEX {name} ON ibex_core.memories ({columns})")
    op.execute("""
        CREATE UNIQUE INDEX memories_once ON ibex_core.memories (org_id, agent_id, coalesce(user_id, ''), content_hash)
        WHERE status = 'active'
    """)
    op.execute("CREATE INDEX memory_terms_by_term ON ibex_core.memory_terms (org_id, term, memory_id)")


def _force_row_security(table: str) -> None:
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
