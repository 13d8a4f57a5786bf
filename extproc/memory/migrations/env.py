"""Alembic's entry point: runs the scripts on the connection of `upgrade`, in its transaction."""

from alembic import context

from extproc.memory.schema import POSTGRESQL_SCHEMA, metadata

_connection = context.config.attributes["connection"]
_schema = POSTGRESQL_SCHEMA if _connection.dialect.name == "postgresql" else None
context.configure(connection=_connection, target_metadata=metadata, version_table_schema=_schema)
context.run_migrations()
