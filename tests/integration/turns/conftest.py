"""Real servers behind the observer's outbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.turns import postgres_side


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres_side.Server]:
    with postgres_side.server() as server:
        yield server


@pytest.fixture(scope="session")
def migrated(postgres_server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    with postgres_side.migrated(postgres_server) as database:
        yield database


@pytest.fixture
def postgres(
    postgres_server: postgres_side.Server, migrated: postgres_side.Database
) -> Iterator[postgres_side.Database]:
    """A database of the test's own, with its tables; `stop()` and `start()` take the server down for a while."""
    with postgres_side.database(postgres_server, like=migrated) as database:
        yield database


@pytest.fixture
def bare(postgres_server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    """One without tables."""
    with postgres_side.database(postgres_server) as database:
        yield database
