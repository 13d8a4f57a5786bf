"""A filter, an auth service and a Valkey, shared by the tests that break nothing."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.integration.directives.directive_side import Side, running
from tests.integration.turns.conftest import migrated, postgres, postgres_server

__all__ = ["migrated", "postgres", "postgres_server"]


@pytest.fixture(scope="session")
def shared_side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    with running(tmp_path_factory.mktemp("directives")) as side:
        yield side


@pytest.fixture
def side(shared_side: Side) -> Side:
    shared_side.engine.reset()
    return shared_side


@pytest.fixture
def org() -> str:
    return str(uuid4())


@pytest.fixture
def agent() -> str:
    return str(uuid4())
