"""Bringing a database to the newest tables. `migrate` may be called at every start, by several processes at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["config", "upgrade"]


def config() -> Config:
    """Alembic's configuration without its file."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.set_main_option("path_separator", "os")
    return made


def upgrade(connection: Connection) -> None:
    """Run what is missing inside the transaction that the connection is in; the caller commits."""
    settings = config()
    settings.attributes["connection"] = connection
    command.upgrade(settings, "head")
