from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from extproc.memory.model import Memory, Namespace, new_memory
from extproc.memory.sqlite import SqliteMemoryStore

MakeMemory = Callable[..., Memory]
NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def agent() -> Namespace:
    return Namespace(str(uuid.UUID(int=1)), str(uuid.UUID(int=2)))


@pytest.fixture(scope="session")
def make(agent: Namespace) -> MakeMemory:
    """A memory of the agent, with a new id."""

    def build(content: str, whose: Namespace = agent, **given: object) -> Memory:
        return new_memory(whose, content, **{"id": str(uuid.uuid4()), "now": NOON, **given})  # type: ignore[arg-type]

    return build


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new/memories.db"


@pytest.fixture
def store(url: str) -> Iterator[SqliteMemoryStore]:
    opened = SqliteMemoryStore.open(url)
    yield opened
    opened.close()
