"""Cases 1.1 to 1.6: who has no good token gets nothing, wherever it stands and however it is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from extproc.auth.token import mint
from tests.integration.conftest import StandIn
from tests.security.conftest import Tenants, World
from tests.security.security_side import Secrets, chat_body, check_refused

CREDENTIALS = ("authorization", "x-api-key", "x-goog-api-key", "api-key")


def unknown(secrets: Secrets) -> str:
    """Well-formed, and nobody's."""
    return secrets.token(mint()[0])


def refused(world: World, headers: dict[str, str], code: str) -> None:
    agent = {"x-ibex-agent-id": world.described["agent_id"]}
    response = world.gateway.patiently(lambda: world.gateway.chat(headers=agent | headers))
    check_refused(response, 401, code)
    assert response.headers["www-authenticate"] == "Bearer"


def test_1_1_without_authorization_it_is_missing(world: World, provider: StandIn) -> None:
    refused(world, {}, "MISSING_TOKEN")
    assert provider.received() == []


@pytest.mark.parametrize("value", ["Bearer", "bearer", ""])
def test_1_2_an_empty_bearer_is_missing(world: World, provider: StandIn, value: str) -> None:
    refused(world, {"authorization": value}, "MISSING_TOKEN")
    assert provider.received() == []


MALFORMED: dict[str, Callable[[str], str]] = {
    "nonsense": lambda _good: "Bearer nonsense",
    "basic": lambda _good: "Basic dXNlcjpwYXNz",
    "without scheme": lambda good: good,
    "another scheme": lambda good: f"Token {good}",
    "two": lambda good: f"Bearer {good}, Bearer {good}",
    "comma list": lambda good: f"Bearer {good},{good}",
    "cut": lambda good: f"Bearer {good[:-1]}",
    "one more": lambda good: f"Bearer {good}x",
    "another case": lambda good: f"Bearer {good.swapcase()}",
    "quoted": lambda good: f'Bearer "{good}"',
    "percent-encoded": lambda good: f"Bearer {good[:4]}%5F{good[5:]}",
    "prefix alone": lambda good: f"Bearer {good[:21]}",
    "another secret": lambda good: f"Bearer {good[:22]}{'A' * 43}",
    "long": lambda good: f"Bearer {good}{'x' * 20_000}",
}


@pytest.mark.parametrize("how", MALFORMED)
def test_1_3_what_is_no_token_is_invalid_even_beside_a_good_one(
    world: World, tenants: Tenants, provider: StandIn, how: str
) -> None:
    refused(world, {"authorization": MALFORMED[how](tenants.a.token)}, "INVALID_TOKEN")
    assert provider.received() == []


@pytest.mark.parametrize("name", CREDENTIALS)
def test_1_4_an_unknown_token_is_invalid(world: World, provider: StandIn, name: str) -> None:
    token = unknown(world.secrets)
    refused(world, {name: f"Bearer {token}" if name == "authorization" else token}, "INVALID_TOKEN")
    assert provider.received() == []


def test_1_4_two_tokens_are_invalid_though_each_is_good(world: World, tenants: Tenants, provider: StandIn) -> None:
    for name in CREDENTIALS[1:]:
        refused(world, {**tenants.a.headers, name: tenants.b.token}, "INVALID_TOKEN")
    assert provider.received() == []


def test_1_5_a_revoked_token_is_invalid(world: World, provider: StandIn) -> None:
    caller = world.newcomer()
    world.commands.run("token", "revoke", caller.token_id, "--org", caller.org_id)
    check_refused(caller.chat(), 401, "INVALID_TOKEN")
    assert provider.received() == []


def test_1_6_a_token_ends_at_its_expiry_and_its_last_seconds_are_never_from_the_cache(world: World) -> None:
    """Clocks of gate and auth service may differ by up to 5 s: in that time only the auth service's counts."""
    seen = until_expired(world, 7)
    if not any(is_cached for _, _, _, is_cached in seen):  # a busy machine may take longer than it may be kept
        seen = until_expired(world, 20)
    early = [status for _, answered, status, _ in seen if answered > 0.1 and status != 503]
    late = {status for asked, _, status, _ in seen if asked <= 0}
    assert early.count(200) == len(early) > 5
    assert 200 not in late
    assert 401 in late
    assert any(is_cached for _, _, _, is_cached in seen)
    assert not any(is_cached for asked, _, _, is_cached in seen if asked < 5)


def until_expired(world: World, life_s: float) -> list[tuple[float, float, int, bool]]:
    """Of a token's requests: how long it is still good when it is asked and when it is answered, status, is cached."""
    org = world.commands.org("short")
    agent = world.commands.agent(org)
    expires_at = datetime.now(UTC) + timedelta(seconds=life_s)
    token = world.commands.token_until(org, agent, expires_at)
    left = expires_at.timestamp()
    seen: list[tuple[float, float, int, bool]] = []
    while not seen or seen[-1][0] > -1:
        asked = time.time()
        response = world.gateway.chat(headers={"authorization": f"Bearer {token}"})
        is_cached = response.headers.get("x-ibex-auth-cached") == "true"
        seen.append((left - asked, left - time.time(), response.status_code, is_cached))
        time.sleep(0.1)
    return seen


@pytest.mark.parametrize("name", ["key", "k%65y", "KEY", "api_key", "access_token", "token", "authorization", "x"])
def test_1_7_a_token_in_the_query_is_never_taken_and_goes_nowhere(
    world: World, tenants: Tenants, provider: StandIn, name: str
) -> None:
    path = f"/v1/chat/completions?a=1&{name}={tenants.a.token}&b=2"
    agent = {"x-ibex-agent-id": tenants.a.agent_id}
    response = world.gateway.client.post(path, json=chat_body(), headers=agent)
    check_refused(response, 401, "MISSING_TOKEN")
    assert provider.received() == []
    again = world.gateway.patiently(
        lambda: world.gateway.client.post(path, json=chat_body(), headers=tenants.a.headers)
    )
    assert again.status_code == 200
    assert provider.last().path == "/v1/chat/completions?a=1&b=2"


def test_1_8_no_credential_of_a_caller_reaches_the_provider(world: World, tenants: Tenants, provider: StandIn) -> None:
    others = {"cookie": f"a={tenants.a.token}", "proxy-authorization": f"Bearer {tenants.a.token}"}
    everywhere = dict.fromkeys(CREDENTIALS[1:], tenants.a.token)
    assert tenants.a.chat(everywhere | others).status_code == 200
    received = provider.last()
    assert dict(received.headers)["authorization"] == f"Bearer {world.secrets.texts['provider key']}"
    assert not received.names & {*CREDENTIALS[1:], *others}
    assert tenants.a.token not in str(received)
