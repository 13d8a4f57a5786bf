"""Alembic's entry point: runs the scripts on the connection of `upgrade`, in its transaction."""

from alembic import context

from extproc.memory.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
