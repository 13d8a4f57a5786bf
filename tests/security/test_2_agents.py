"""Cases 2.1 to 2.9, and 5.1 and 5.2: which agent a token may act for, and what strangers learn about agents."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import cycle
from uuid import uuid4

import httpx2
import pytest

from tests.integration.conftest import StandIn
from tests.ranks import rank_test
from tests.security.conftest import Tenants, World
from tests.security.security_side import Caller, Gateway, check_refused, eventually

SAMPLES = 100
ROUNDS = 5
"""On a machine that others use, one round may say anything."""
MOST_P95_S = 0.005
"""Or as much as the two halves of one kind are apart, which nothing but the machine's other work can explain."""
LEAST_P = 0.001
PAIRS_A_TOKEN = 20
"""Below the 50 refusals after which the gate holds back one token."""
SEEN_WITHIN_S = 5.0


def test_2_1_no_agent_and_a_free_token_is_a_400(tenants: Tenants, provider: StandIn) -> None:
    gateway = tenants.a.gateway
    response = gateway.patiently(lambda: gateway.chat(headers={"authorization": f"Bearer {tenants.a.token}"}))
    check_refused(response, 400, "MISSING_AGENT_ID")
    assert provider.received() == []


def test_2_1_a_bound_token_needs_no_agent(world: World, tenants: Tenants) -> None:
    token, _ = world.commands.token(tenants.a.org_id, "--agent", tenants.a.agent_id)
    gateway = world.gateway
    response = gateway.patiently(lambda: gateway.chat(headers={"authorization": f"Bearer {token}"}))
    assert response.status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        lambda _agent: "agent-7",
        lambda agent: agent.replace("-", ""),
        lambda agent: f"{{{agent}}}",
        lambda agent: f"urn:uuid:{agent}",
        lambda agent: f"{agent},{agent}",
        lambda agent: f"{agent} ,",
        lambda agent: f"%20{agent}",
        lambda agent: f"../{agent}",
        lambda agent: agent[:-1],
        lambda agent: f"{agent}'--",
    ],
)
def test_2_2_an_agent_that_is_no_uuid_is_a_400(tenants: Tenants, provider: StandIn, change: object) -> None:
    assert callable(change)
    error = check_refused(tenants.a.chat({"x-ibex-agent-id": change(tenants.a.agent_id)}), 400, "VALIDATION_ERROR")
    assert error["field_errors"][0]["field"] == "X-IBEX-Agent-ID"
    assert provider.received() == []


def test_2_3_and_2_4_unknown_and_foreign_agents_look_the_same(tenants: Tenants, provider: StandIn) -> None:
    unknown = tenants.b.chat({"x-ibex-agent-id": str(uuid4())})
    foreign = tenants.b.chat({"x-ibex-agent-id": tenants.other_a.agent_id})
    errors = [check_refused(response, 403, "AGENT_NOT_AUTHORIZED") for response in (unknown, foreign)]
    for error in errors:
        del error["request_id"], error["timestamp"]
    assert errors[0] == errors[1]
    assert [*unknown.headers] == [*foreign.headers]
    assert len(unknown.content) == len(foreign.content)
    assert provider.received() == []


def test_2_3_and_2_4_they_take_the_same_time(world: World, tenants: Tenants) -> None:
    """Samples of both kinds in turn, so that whatever else the machine does hits both."""
    owner = world.commands.org("owner")
    foreign = [world.commands.agent(owner) for _ in range(SAMPLES)]
    said = []
    for _ in range(ROUNDS):
        unknown_s, foreign_s = sample(world, tenants.b.org_id, foreign)
        p95_s = abs(percentile(unknown_s, 0.95) - percentile(foreign_s, 0.95))
        p = rank_test(unknown_s, foreign_s)
        if p95_s < max(MOST_P95_S, noise_s(unknown_s), noise_s(foreign_s)) and p >= LEAST_P:
            return
        said.append(f"p95 {p95_s * 1000:.2f} ms apart, p {p:.2g}")
    pytest.fail(f"unknown and foreign agents can be told apart: {said}")


def sample(world: World, org_id: str, foreign: Sequence[str]) -> tuple[list[float], list[float]]:
    """Seconds of one round, each agent asked for once; whoever the gate could not answer is asked for again."""
    unknown_s: list[float] = []
    foreign_s: list[float] = []
    for start in range(0, len(foreign), PAIRS_A_TOKEN):
        caller = world.caller(org_id)
        assert caller.chat().status_code == 200, "from here on the token is in the gate's cache"
        with world.gateway.connect() as client:
            here = Caller(Gateway(world.gateway.address, client, world.gateway.provider), org_id, "", caller.token)
            for number, agent_id in enumerate(foreign[start : start + PAIRS_A_TOKEN]):
                pair = [(str(uuid4()), unknown_s), (agent_id, foreign_s)]
                for one, seconds in pair if number % 2 else reversed(pair):
                    seconds.append(timed(here, one))
    return unknown_s, foreign_s


def timed(caller: Caller, agent_id: str) -> float:
    for _ in range(20):
        began = time.perf_counter()
        response = caller.once({"x-ibex-agent-id": agent_id})
        took = time.perf_counter() - began
        if response.status_code == 403:
            return took
        assert response.status_code == 503, response.text
        time.sleep(0.2)
    raise AssertionError("the gate does not answer")


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.ceil(len(values) * share) - 1]


def noise_s(values: Sequence[float]) -> float:
    return abs(percentile(values[::2], 0.95) - percentile(values[1::2], 0.95))


def test_the_rank_test_tells_what_differs_from_what_does_not() -> None:
    noise = cycle([0.010, 0.013, 0.011, 0.019, 0.012, 0.014, 0.050])
    ones, others = ([next(noise) + number * 1e-7 for number in range(SAMPLES)] for _ in range(2))
    assert rank_test(ones, others) > 0.1
    assert rank_test(ones, [value + 0.003 for value in others]) < LEAST_P


@pytest.mark.parametrize("command", ["pause", "suspend", "archive"])
def test_2_5_and_2_6_an_agent_that_is_stopped_is_a_403_within_five_seconds(
    world: World, provider: StandIn, command: str
) -> None:
    caller = world.newcomer()
    assert caller.chat().status_code == 200
    world.commands.run("agent", command, caller.agent_id, "--org", caller.org_id)
    stopped = time.monotonic()
    eventually(lambda: caller.chat().status_code == 403, SEEN_WITHIN_S)
    assert time.monotonic() - stopped < SEEN_WITHIN_S
    provider.clear()
    check_refused(caller.chat(), 403, "AGENT_SUSPENDED")
    assert provider.received() == []
    world.commands.run("agent", "resume", caller.agent_id, "--org", caller.org_id)
    eventually(lambda: caller.chat().status_code == 200, SEEN_WITHIN_S)


def test_2_7_the_same_agent_id_in_another_org_is_another_agent(world: World, tenants: Tenants) -> None:
    """A's pause is not B's."""
    agent_id = str(uuid4())
    a, b = (world.caller(one.org_id, world.commands.agent(one.org_id, agent_id)) for one in (tenants.a, tenants.b))
    world.commands.run("agent", "pause", agent_id, "--org", a.org_id)
    check_refused(a.chat(), 403, "AGENT_SUSPENDED")
    assert b.chat().status_code == 200


def test_2_9_a_token_bound_to_one_agent_is_refused_for_another_and_nobody_is_asked(
    world: World, tenants: Tenants, provider: StandIn
) -> None:
    bound = world.caller(tenants.a.org_id, tenants.other_a.agent_id, "--agent", tenants.a.agent_id)
    check_refused(bound.chat(), 403, "AGENT_NOT_AUTHORIZED")
    before = agents_asked(world)
    for _ in range(3):
        check_refused(bound.chat(), 403, "AGENT_NOT_AUTHORIZED")
    assert agents_asked(world) == before
    assert provider.received() == []


def agents_asked(world: World) -> float:
    """ValidateAgent calls that the auth service answered."""
    lines = httpx2.get(f"{world.admin_of('auth')}/metrics", timeout=20).text.splitlines()
    found = [line for line in lines if line.startswith("ibex_auth_requests_total{") and "ValidateAgent" in line]
    assert found
    return sum(float(line.rpartition(" ")[2]) for line in found)


@pytest.mark.parametrize(
    "permissions", ["none", "memory-read", "memory-read,session-read", "session-create,session-read"]
)
def test_5_1_and_5_2_without_all_of_a_chats_permissions_it_is_a_403(
    world: World, tenants: Tenants, provider: StandIn, permissions: str
) -> None:
    caller = world.caller(tenants.a.org_id, tenants.a.agent_id, "--permissions", permissions)
    check_refused(caller.chat(), 403, "INSUFFICIENT_PERMISSIONS")
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/embeddings"), ("DELETE", "/v1/files/1")):
        check_refused(
            world.gateway.client.request(method, path, headers=caller.headers), 403, "INSUFFICIENT_PERMISSIONS"
        )
    assert provider.received() == []
