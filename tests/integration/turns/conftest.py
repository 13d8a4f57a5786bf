"""Real servers behind the observer's outbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.turns import postgres_side


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres_side.Server]:
    with postgres_side.server() as server:
        yield server


@pytest.fixture
def postgres(postgres_server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    """A database of the test's own; `stop()` and `start()` take the server down for a while."""
    with postgres_side.database(postgres_server) as database:
        yield database
