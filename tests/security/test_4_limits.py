"""Cases 4.1 to 4.5: an organisation's minute. Without Redis (4.6): test_outages."""

from __future__ import annotations

import time

from redis import Redis

from tests.integration.conftest import StandIn
from tests.security.conftest import World
from tests.security.security_side import check_refused

LIMIT = 60
MINUTE_S = 60


def test_4_1_to_4_5_the_61st_of_60_is_a_429_and_the_other_org_goes_on(world: World, provider: StandIn) -> None:
    caller, other = world.newcomer(LIMIT), world.newcomer(LIMIT)
    wait_for_room_in_the_minute(15)
    remaining, statuses = [], []
    for _ in range(LIMIT):
        response = caller.once()
        if response.status_code == 200:
            assert response.headers["x-ratelimit-limit"] == str(LIMIT)
            assert 0 <= int(response.headers["x-ratelimit-reset"]) - time.time() <= MINUTE_S + 1
            remaining.append(int(response.headers["x-ratelimit-remaining"]))
        statuses.append(response.status_code)
    assert remaining == sorted(set(remaining), reverse=True)
    # A request that a busy gate could not answer in time may be counted, or not.
    late = statuses.count(503)
    assert statuses.count(200) == LIMIT - late
    while late and caller.once().status_code != 429:
        late -= 1
    provider.clear()
    refused = caller.once()
    check_refused(refused, 429, "RATE_LIMITED")
    assert 1 <= int(refused.headers["retry-after"]) <= MINUTE_S
    assert 0 <= int(refused.headers["x-ratelimit-reset"]) - time.time() <= MINUTE_S
    assert refused.headers["x-ratelimit-remaining"] == "0"
    assert provider.received() == []
    assert other.chat().status_code == 200


def test_4_7_neither_another_agent_nor_another_token_nor_another_user_has_a_minute_of_its_own(world: World) -> None:
    caller = world.newcomer(3)
    wait_for_room_in_the_minute(10)
    while caller.chat().status_code != 429:
        pass
    second = world.caller(caller.org_id)
    for one, headers in (
        (second, {}),
        (caller, {"x-ibex-user-id": "u9"}),
        (caller, {"x-forwarded-for": "203.0.113.9"}),
    ):
        check_refused(one.chat(headers), 429, "RATE_LIMITED")


def test_4_8_what_is_refused_before_costs_the_org_nothing(world: World) -> None:
    caller, stranger = world.newcomer(5), world.newcomer()
    wait_for_room_in_the_minute(10)
    for _ in range(8):
        stranger.chat({"x-ibex-agent-id": caller.agent_id, "x-ibex-org-id": caller.org_id})
        world.gateway.chat(headers={"authorization": "Bearer ibex_pat_wrong", "x-ibex-agent-id": caller.agent_id})
    assert caller.chat().status_code == 200
    with Redis.from_url(world.described["broker"], protocol=2) as client:
        keys = list(client.scan_iter(f"ratelimit:{caller.org_id}:rpm:[0-9]*"))
        assert sum(int(client.get(key) or 0) for key in keys) < 5


def wait_for_room_in_the_minute(need_s: float) -> None:
    left = MINUTE_S - time.time() % MINUTE_S
    if left < need_s:
        time.sleep(left + 0.5)
