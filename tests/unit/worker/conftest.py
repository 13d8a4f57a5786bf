from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from extproc.worker.extract import Turn

SAID_AT = datetime(2026, 11, 18, 10, 0, tzinfo=UTC)
"""A Wednesday."""


@pytest.fixture
def turn() -> Callable[..., Turn]:
    def build(user: str, assistant: str = "", index: int = 0, at: datetime = SAID_AT) -> Turn:
        return Turn("session", index, user, assistant, at)

    return build
