"""Real servers behind the auth service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.turns import postgres_side, valkey_side
from tests.integration.turns.conftest import migrated, postgres, postgres_server

__all__ = ["migrated", "postgres", "postgres_server", "postgres_side"]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[valkey_side.Server]:
    with valkey_side.valkey(tmp_path / "valkey") as server:
        yield server
