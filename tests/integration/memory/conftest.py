"""Memories on a real PostgreSQL with pgvector, as a role without privileges."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest
from psycopg import sql

from extproc.memory.model import Memory, Namespace, new_memory
from extproc.memory.postgres import PostgresMemoryStore
from tests.integration.turns import postgres_side
from tests.unit.memory.conftest import NOON
from tests.unit.memory.stub_indexer import StubIndexer

MakeMemory = Callable[..., Memory]


@pytest.fixture(scope="session")
def server() -> Iterator[postgres_side.Server]:
    with postgres_side.server() as started:
        yield started


@pytest.fixture
def bare(server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    """A database without the extension; the server runs when the test begins, whatever the last one did."""
    server.start()
    with postgres_side.database(server) as database:
        yield database


@pytest.fixture
def postgres(bare: postgres_side.Database) -> postgres_side.Database:
    bare.server.execute(sql.SQL("CREATE EXTENSION vector"), database=bare.name)  # type: ignore[arg-type]
    return bare


@pytest.fixture(scope="session")
def shared(server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    """One for tests that look at an organisation of their own only."""
    with postgres_side.database(server) as database:
        server.execute(sql.SQL("CREATE EXTENSION vector"), database=database.name)  # type: ignore[arg-type]
        yield database


@pytest.fixture
def url(shared: postgres_side.Database) -> str:
    shared.start()
    return shared.url


@pytest.fixture
def agent() -> Namespace:
    return Namespace(str(uuid.uuid4()), str(uuid.uuid4()))


@pytest.fixture
def make(agent: Namespace) -> MakeMemory:
    """A memory of the agent, with a new id."""

    def build(content: str, whose: Namespace = agent, **given: object) -> Memory:
        return new_memory(whose, content, **{"id": str(uuid.uuid4()), "now": NOON, **given})  # type: ignore[arg-type]

    return build


@pytest.fixture
def store(url: str) -> Iterator[PostgresMemoryStore]:
    opened = PostgresMemoryStore.open(url, StubIndexer())
    yield opened
    opened.close()


@pytest.fixture
def other(url: str) -> Iterator[PostgresMemoryStore]:
    opened = PostgresMemoryStore.open(url, StubIndexer())
    yield opened
    opened.close()
