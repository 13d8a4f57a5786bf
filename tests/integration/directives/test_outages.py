"""Redis and the service killed, frozen and back, one after the other and together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from extproc.directives.directive import channel_of, encode, key_of
from tests.integration.directives.directive_side import SOON_S, Side, eventually, running
from tests.integration.whole.engine_side import BLOCK


@pytest.fixture(scope="module")
def broken_side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    with running(tmp_path_factory.mktemp("broken")) as side:
        yield side


@pytest.fixture
def own(broken_side: Side) -> Side:
    """Its Redis and its service are the test's to break, and to mend; each begins with both of them well."""
    broken_side.engine.reset()
    eventually(broken_side.is_heard)
    return broken_side


def test_without_redis_changes_come_from_the_service_and_afterwards_at_once_again(
    own: Side, org: str, agent: str
) -> None:
    own.directive(org, agent, "set", "One.")
    assert own.first(org, agent) == "One."
    own.redis.kill()
    eventually(lambda: not own.is_heard())
    assert own.first(org, agent) == "One."
    own.directive(org, agent, "set", "Two.")
    eventually(lambda: own.first(org, agent) == "Two.")
    own.redis.start()
    eventually(own.is_heard)
    own.directive(org, agent, "set", "Three.")
    eventually(lambda: own.first(org, agent) == "Three.", SOON_S)


def test_with_nobody_to_ask_what_is_at_hand_is_used_and_nobody_waits(own: Side, org: str, agent: str) -> None:
    own.directive(org, agent, "set", "One.")
    assert own.first(org, agent) == "One."
    own.redis.kill()
    own.auth.kill()
    time.sleep(2.5)  # what is fresh without a channel is so for 2 s
    stale = 'ibex_extproc_directive_lookups_total{result="stale"}'
    before = own.filter.metric(stale)
    for _ in range(20):
        assert own.first(org, agent) == "One."
    assert own.filter.metric(stale) >= before + 18
    # An agent that nobody has asked for gets none, and no wait once the circuits are open.
    assert own.first(org, org).startswith(BLOCK)
    waits = "ibex_extproc_directive_seconds_count"
    before = own.filter.metric(waits)
    for _ in range(20):
        assert own.first(org, org).startswith(BLOCK)
    assert own.filter.metric(waits) <= before + 3
    own.auth.start()
    eventually(lambda: own.ask(org, agent).metadata.get("directive_version_id") is not None)
    own.directive(org, agent, "set", "Two.", redis=False)
    eventually(lambda: own.first(org, agent) == "Two.")
    own.redis.start()


def test_a_frozen_redis_costs_no_directive(own: Side, org: str, agent: str) -> None:
    own.directive(org, agent, "set", "One.")
    own.redis.freeze()
    try:
        assert own.first(org, agent) == "One.", "from the service"
        eventually(lambda: not own.is_heard())
        own.directive(org, agent, "set", "Two.", redis=False)
        eventually(lambda: own.first(org, agent) == "Two.")
    finally:
        own.redis.thaw()
    eventually(own.is_heard)
    own.directive(org, agent, "set", "Three.")
    eventually(lambda: own.first(org, agent) == "Three.", SOON_S)


def test_a_redis_that_lost_its_memory_is_filled_again(own: Side, org: str, agent: str) -> None:
    own.directive(org, agent, "set", "One.")
    own.first(org, agent)
    eventually(lambda: own.redis.execute("EXISTS", key_of(org, agent)) == 1)
    own.redis.execute("FLUSHALL")
    own.redis.execute("PUBLISH", channel_of(org), "?")
    eventually(lambda: own.first(org, agent) == "One." and own.redis.execute("EXISTS", key_of(org, agent)) == 1)


def test_without_a_service_directives_are_those_in_redis(tmp_path: Path, org: str, agent: str) -> None:
    with running(tmp_path, with_service=False) as side:
        assert side.first(org, agent).startswith(BLOCK)
        side.redis.execute("SET", key_of(org, agent), encode("v1", "One.", ""), "EX", 60)
        assert side.first(org, agent) == "One.", "a key that is not there is not remembered"
        side.redis.execute("DEL", key_of(org, agent))
        side.redis.execute("PUBLISH", channel_of(org), agent)
        eventually(lambda: side.first(org, agent).startswith(BLOCK), SOON_S)


def test_without_redis_and_address_there_are_none(tmp_path: Path, org: str, agent: str) -> None:
    with running(tmp_path, with_service=False, redis_url="") as side:
        side.directive(org, agent, "set", "Be brief.")
        seen = side.ask(org, agent)
        assert seen.contents[0].startswith(BLOCK)
        assert "directive_ms" not in seen.metadata
        assert "ibex_extproc_directive" not in side.filter.metrics()


def test_an_operator_can_have_it_in_every_request(tmp_path: Path, org: str, agent: str) -> None:
    with running(tmp_path, directive_always="true") as side:
        side.directive(org, agent, "set", "Be brief.")
        seen = side.ask(org, agent, {"x-ibex-skip-memory": "1"})
        assert seen.contents == ["Be brief.", "Who am I?"]
        assert seen.metadata["outcome"] == "skipped"
        assert side.engine.requests == []
