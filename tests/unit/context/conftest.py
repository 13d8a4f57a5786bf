from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from extproc.memory.model import Memory, Namespace, new_memory

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def agent() -> Namespace:
    return Namespace(str(uuid.UUID(int=1)), str(uuid.UUID(int=2)))


@pytest.fixture(scope="session")
def make(agent: Namespace) -> Callable[..., Memory]:
    """A memory of the agent, with a new id."""

    def build(content: str, whose: Namespace = agent, **given: object) -> Memory:
        return new_memory(whose, content, **{"id": str(uuid.uuid4()), "now": NOON, **given})  # type: ignore[arg-type]

    return build
