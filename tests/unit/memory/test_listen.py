"""What is known of versions when the server refuses to be listened to; with a real server: tests/integration/memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from extproc.memory import listen
from extproc.memory.listen import Versions
from extproc.memory.store import StoreAway, StoreError, Version
from tests.unit.memory.test_store import wait_until

ONE = Version(1, 0)


@dataclass
class Replica:
    """Answers questions, and has no LISTEN."""

    is_there: bool = True
    renewed: list[bool] = field(default_factory=list)

    def connect(self, _answer_limit_s: float) -> Any:
        raise StoreError("cannot execute LISTEN during recovery") if self.is_there else StoreAway("no server")

    def ask(self, _org_id: str, _agent_id: str) -> Version:
        if not self.is_there:
            raise StoreAway("no server")
        return ONE

    def renew(self) -> None:
        self.renewed.append(self.is_there)


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    monkeypatch.setattr(listen, "_RETRY_S", 0.01)
    monkeypatch.setattr(listen, "_RETRY_WHEN_REFUSED_S", 0.01)
    return Replica()


@pytest.fixture
def versions(replica: Replica) -> Iterator[Versions]:
    opened = Versions(replica.connect, replica.ask, 300.0, replica.renew)
    yield opened
    opened.close()


def test_each_request_asks_where_nothing_is_heard(versions: Versions) -> None:
    assert versions.current("o", "a") == ONE
    assert versions.known("o", "a") is None


def test_a_server_that_refuses_to_be_listened_to_is_back_all_the_same(versions: Versions, replica: Replica) -> None:
    assert versions.current("o", "a") == ONE
    replica.is_there = False
    assert versions.current("o", "a") == ONE  # the last that was known
    assert versions.away_s > 0
    with pytest.raises(StoreAway):
        versions.current("o", "b")
    replica.is_there = True
    wait_until(lambda: versions.away_s == 0)
    assert replica.renewed == [True]
    assert versions.known("o", "a") is None
    assert versions.current("o", "b") == ONE


def test_versions_in_use_are_asked_for_again_a_few_at_a_time(
    versions: Versions, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert versions.current("o", "a") == ONE
    versions._due |= {("o", str(number)) for number in range(1000)}
    asked: list[str] = []

    def ask(_org_id: str, agent_id: str) -> Version:
        asked.append(agent_id)
        versions._due.add(("o", "late"))  # by a request, meanwhile
        time.sleep(0.01)
        return ONE

    monkeypatch.setattr(versions, "_ask", ask)
    versions._ask_again()
    assert 0 < len(asked) < 1000
    assert len(versions._due) >= 1000 - len(asked)
