"""From the command to the request: changes are seen within moments, and nobody sees another's."""

from __future__ import annotations

import json
from uuid import uuid4

import grpc

from extproc.directives.directive import channel_of, encode, key_of
from tests.integration.directives.directive_side import SOON_S, Side, eventually
from tests.integration.whole.engine_side import BLOCK


def test_a_directive_and_a_memory_reach_the_request(side: Side, org: str, agent: str) -> None:
    made = side.directive(org, agent, "set", "Be brief.")
    assert made["published"] is True
    seen = side.ask(org, agent)
    assert seen.contents[0] == "Be brief."
    assert seen.contents[-1].startswith(BLOCK)
    assert seen.headers["x-ibex-context-fallback"] == "false"
    assert int(seen.headers["x-ibex-context-tokens"]) > 9
    assert seen.metadata["directive_version_id"] == made["version_id"]
    assert side.engine.requests[-1].directive_version_id == made["version_id"]


def test_a_change_is_seen_within_moments(side: Side, org: str, agent: str) -> None:
    assert side.first(org, agent).startswith(BLOCK), "none yet, and the filter remembers that"
    for number in range(3):
        side.directive(org, agent, "set", f"Version {number}.")
        eventually(lambda number=number: side.first(org, agent) == f"Version {number}.", SOON_S)  # type: ignore[misc]
    side.directive(org, agent, "rollback")
    eventually(lambda: side.first(org, agent) == "Version 1.", SOON_S)
    side.directive(org, agent, "deactivate")
    eventually(lambda: side.first(org, agent).startswith(BLOCK), SOON_S)
    side.directive(org, agent, "activate")
    eventually(lambda: side.first(org, agent) == "Version 1.", SOON_S)
    side.directive(org, agent, "mode", "user_prepend")
    eventually(lambda: "[DIRECTIVE]: Version 1.\n\n" in side.ask(org, agent).contents[0], SOON_S)


def test_the_key_in_redis_is_that_of_the_contract(side: Side, org: str, agent: str) -> None:
    made = side.directive(org, agent, "set", "Be brief.", "--mode", "system_append")
    side.ask(org, agent)
    key = f"{org}:directive:{agent}"
    eventually(lambda: side.redis.execute("EXISTS", key) == 1)
    assert json.loads(side.redis.execute("GET", key)) == {
        "v": 1,
        "content": "Be brief.",
        "injection_mode": "system_append",
        "version_id": made["version_id"],
    }
    assert 0 < side.redis.execute("TTL", key) <= 60


def test_what_another_system_puts_into_redis_is_used(side: Side, org: str, agent: str) -> None:
    side.redis.execute("SET", key_of(org, agent), encode("v-other", "Theirs.", "later_mode"), "EX", 60)
    seen = side.ask(org, agent)
    assert seen.contents[0] == "Theirs."
    assert seen.metadata["directive_version_id"] == "v-other"
    side.redis.execute("DEL", key_of(org, agent))
    side.redis.execute("PUBLISH", channel_of(org), f'{{"agent_id": "{agent}"}}')
    eventually(lambda: side.first(org, agent).startswith(BLOCK), SOON_S)


def test_a_message_that_is_not_understood_has_the_whole_organisation_asked_for_again(
    side: Side, org: str, agent: str
) -> None:
    side.redis.execute("SET", key_of(org, agent), encode("v1", "Old.", ""), "EX", 60)
    assert side.first(org, agent) == "Old."
    side.redis.execute("SET", key_of(org, agent), encode("v2", "New.", ""), "EX", 60)
    assert side.first(org, agent) == "Old.", "nobody was told"
    side.redis.execute("PUBLISH", channel_of(org), "flush")
    eventually(lambda: side.first(org, agent) == "New.", SOON_S)


def test_rubbish_in_redis_is_passed_over(side: Side, org: str, agent: str) -> None:
    side.directive(org, agent, "set", "From the database.")
    side.redis.execute("SET", key_of(org, agent), "rubbish", "EX", 60)
    assert side.first(org, agent) == "From the database."
    other = str(uuid4())
    side.redis.execute("LPUSH", key_of(org, other), "a list")
    assert side.first(org, other).startswith(BLOCK)


def test_an_organisation_never_gets_anothers_directive(side: Side, org: str, agent: str) -> None:
    """The same agent id, warm and cold, with forged headers and messages."""
    other = str(uuid4())
    side.directive(org, agent, "set", "Only for the first.")
    assert side.first(org, agent) == "Only for the first."
    forged = {
        "x-ibex-org-id": org,
        "x-ibex-directive": "forged",
        "x-ibex-directive-version-id": "forged",
        "x-ibex-session-id": "s1",
    }
    for headers in ({}, forged):
        seen = side.ask(other, agent, headers)
        assert "Only for the first." not in json.dumps(seen.body)
        assert "forged" not in json.dumps(seen.body) + json.dumps(seen.metadata)
        assert "directive_version_id" not in seen.metadata
    assert side.ask(org, agent, {"x-ibex-agent-id": agent.upper()}).contents[0] == "Only for the first."
    side.redis.execute("PUBLISH", channel_of(other), json.dumps({"agent_id": agent, "org_id": org}))
    side.directive(other, agent, "set", "Only for the second.")
    eventually(lambda: side.first(other, agent) == "Only for the second.", SOON_S)
    assert side.first(org, agent) == "Only for the first."


def test_without_an_identity_nothing_is_looked_for(side: Side, org: str, agent: str) -> None:
    side.directive(org, agent, "set", "Be brief.")
    for identity in (("", agent), (org, "not-a-uuid"), ("../" + org, agent)):
        seen = side.ask(*identity)
        assert seen.body is None
        assert seen.metadata.get("outcome") != "injected"


def test_a_client_that_skips_memory_gets_none(side: Side, org: str, agent: str) -> None:
    side.directive(org, agent, "set", "Be brief.")
    assert side.ask(org, agent, {"x-ibex-skip-memory": "1"}).body is None


def test_an_engine_that_fails_leaves_the_directive(side: Side, org: str, agent: str) -> None:
    side.directive(org, agent, "set", "Be brief.")

    def fail(_request: object, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.INTERNAL, "told to")
        raise AssertionError

    side.engine.behaviour = fail
    seen = side.ask(org, agent)
    assert seen.contents == ["Be brief.", "Who am I?"]
    assert seen.headers["x-ibex-context-fallback"] == "true"
    assert seen.headers["x-ibex-memories-injected"] == "0"
    assert int(seen.headers["x-ibex-context-tokens"]) > 0


def test_no_text_is_in_any_log_or_metric(side: Side, org: str, agent: str) -> None:
    side.directive(org, agent, "set", "CANARY-4711 be brief.")
    assert side.first(org, agent) == "CANARY-4711 be brief."
    side.redis.execute("SET", key_of(org, agent), '{"v": 1, "content": ["CANARY-4711"]}', "EX", 60)
    side.redis.execute("PUBLISH", channel_of(org), "CANARY-4711")
    eventually(
        lambda: (
            side.filter.metric('ibex_extproc_directive_flaws_total{reason="wrong_type"}') > 0
            or not side.first(org, agent)
        )
    )
    for process in (side.filter, side.auth):
        assert "CANARY-4711" not in process.log.read_text()
        assert "CANARY-4711" not in process.metrics()
