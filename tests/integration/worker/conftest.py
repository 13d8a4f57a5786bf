"""Valkey, PostgreSQL and SQLite for workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql

from tests.integration.turns import postgres_side, valkey_side
from tests.integration.worker.worker_side import Place, place


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres_side.Server]:
    with postgres_side.server() as server:
        yield server


@pytest.fixture
def postgres(postgres_server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    postgres_server.start()
    with postgres_side.database(postgres_server) as database:
        # What an administrator does once: the extension is not the role's to make.
        postgres_server.execute(sql.SQL("CREATE EXTENSION vector"), database=database.name)  # type: ignore[arg-type]
        yield database


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[valkey_side.Server]:
    with valkey_side.valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def on_sqlite(valkey: valkey_side.Server, tmp_path: Path) -> Iterator[Place]:
    with place(f"sqlite:///{tmp_path / 'memories.db'}", valkey, tmp_path) as made:
        yield made


@pytest.fixture
def on_postgres(
    postgres: postgres_side.Database, valkey: valkey_side.Server, tmp_path: Path
) -> Iterator[tuple[Place, postgres_side.Database]]:
    with place(postgres.url, valkey, tmp_path) as made:
        yield made, postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest) -> Place:
    """Both databases, one after the other."""
    if request.param == "sqlite":
        on_sqlite: Place = request.getfixturevalue("on_sqlite")
        return on_sqlite
    on_postgres: tuple[Place, object] = request.getfixturevalue("on_postgres")
    return on_postgres[0]
