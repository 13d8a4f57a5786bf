"""Cases 6.1 to 6.5 and 7.1: whatever goes wrong, and whoever answers, it is the envelope, with nothing secret in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest

from extproc.auth.token import mint
from extproc.stack import envoy
from extproc.stack.envoy import Address
from tests.integration.http_side import JSON, LIMIT, padded
from tests.security.conftest import Evidence, Tenants, World
from tests.security.security_side import Caller, Gateway, chat_body, check_refused, head, header_lines, send_raw


@dataclass(frozen=True)
class Refusal:
    status: int
    code: str
    ask: Callable[[Caller], httpx2.Response]


def post(caller: Caller, **arguments: object) -> httpx2.Response:
    headers = {**caller.headers, **arguments.pop("headers", {})}  # type: ignore[dict-item]
    return caller.gateway.client.post("/v1/chat/completions", headers=headers, **arguments)  # type: ignore[arg-type]


def bare(caller: Caller, headers: dict[str, str]) -> httpx2.Response:
    return caller.gateway.chat(headers=headers)


REFUSALS = {
    "no json": Refusal(400, "INVALID_JSON", lambda one: post(one, content=b'{"model":"gpt-4o', headers=JSON)),
    "no model": Refusal(400, "VALIDATION_ERROR", lambda one: post(one, json={"messages": []})),
    "no agent": Refusal(400, "MISSING_AGENT_ID", lambda one: bare(one, {"authorization": f"Bearer {one.token}"})),
    "odd agent": Refusal(400, "VALIDATION_ERROR", lambda one: one.once({"x-ibex-agent-id": one.token})),
    "odd user": Refusal(400, "VALIDATION_ERROR", lambda one: one.once({"x-ibex-user-id": f"{one.token} x"})),
    "no token": Refusal(401, "MISSING_TOKEN", lambda one: bare(one, {"x-ibex-agent-id": one.agent_id})),
    "wrong token": Refusal(401, "INVALID_TOKEN", lambda one: one.once({"authorization": f"Bearer {mint()[0]}"})),
    "foreign agent": Refusal(403, "AGENT_NOT_AUTHORIZED", lambda one: one.once({"x-ibex-agent-id": str(uuid4())})),
    "no such path": Refusal(404, "NOT_FOUND", lambda one: one.gateway.client.get("/no/such/path", headers=one.headers)),
    "large body": Refusal(413, "PAYLOAD_TOO_LARGE", lambda one: post(one, content=padded(LIMIT + 1), headers=JSON)),
    "form": Refusal(
        415,
        "UNSUPPORTED_MEDIA_TYPE",
        lambda one: post(one, content=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}),
    ),
    "large headers": Refusal(431, "VALIDATION_ERROR", lambda one: one.once({"x-large": one.token * 1000})),
    "many headers": Refusal(431, "VALIDATION_ERROR", lambda one: one.once({f"x-{n}": "y" for n in range(120)})),
    "nobody's model": Refusal(501, "PROVIDER_NOT_CONFIGURED", lambda one: post(one, json=chat_body(model="nobody"))),
    "provider away": Refusal(503, "PROVIDER_UNAVAILABLE", lambda one: post(one, json=chat_body(model="claude-x"))),
    "provider silent": Refusal(504, "PROVIDER_TIMEOUT", lambda one: one.once({"x-standin-delay-ms": "20000"})),
}


@pytest.fixture(scope="module")
def odd(
    world: World, envoy_binary: Path, evidence: Evidence, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """The shipped file once more, asking the same gate and filter; one of its providers is away, and one gets 1.5 s."""
    directory = tmp_path_factory.mktemp("odd")
    evidence.directories.append(directory)
    plan = envoy.Plan(
        listen=Address("127.0.0.1", envoy.free_port()),
        admin=Address("127.0.0.1", envoy.free_port()),
        filters=[world.address_of(envoy.FILTER_CLUSTER)],
        gates=[world.address_of(envoy.GATE_CLUSTER)],
        observers=[world.address_of(envoy.OBSERVER_CLUSTER)],
        provider=envoy.Provider(world.gateway.provider.address),
    )
    config = envoy.render(envoy.load(envoy.shipped("envoy.yaml")), plan)
    envoy.set_cluster(config, "provider_anthropic", [Address("127.0.0.1", envoy.free_port())])
    (manager,) = envoy._http_managers(config)
    manager["stream_idle_timeout"] = "1.5s"
    process = envoy.start(envoy_binary, envoy.write(config, directory / "envoy.yaml"), plan.admin, state_dir=directory)
    try:
        process.wait_ready(45)
        with httpx2.Client(base_url=f"http://{plan.listen}", timeout=20, trust_env=False) as client:
            yield Gateway(plan.listen, client, world.gateway.provider)
    finally:
        process.stop()


@pytest.mark.parametrize("name", REFUSALS)
def test_6_1_to_6_5_every_refusal_is_the_envelope_without_a_secret(odd: Gateway, tenants: Tenants, name: str) -> None:
    refusal = REFUSALS[name]
    caller = Caller(odd, tenants.a.org_id, tenants.a.agent_id, tenants.a.token)
    check_refused(odd.patiently(lambda: refusal.ask(caller)), refusal.status, refusal.code)


@pytest.mark.parametrize("name", [*REFUSALS])
def test_6_3_a_request_id_of_the_clients_is_kept_when_it_is_a_uuid(odd: Gateway, tenants: Tenants, name: str) -> None:
    sent = str(uuid4())
    with httpx2.Client(base_url=f"http://{odd.address}", timeout=20, headers={"x-request-id": sent}) as client:
        gateway = Gateway(odd.address, client, odd.provider)
        caller = Caller(gateway, tenants.a.org_id, tenants.a.agent_id, tenants.a.token)
        response = gateway.patiently(lambda: REFUSALS[name].ask(caller))
    if name in {"large headers", "many headers"}:
        return  # refused before there is a request to read it from
    assert response.headers["x-request-id"] == response.json()["error"]["request_id"] == sent


@pytest.mark.parametrize(
    "sent", ["a token", "'; drop table", "0" * 36, "5974c685-c1ed-4dde-af3a-f15d792044480", "../../x"]
)
def test_6_3_any_other_is_replaced(tenants: Tenants, sent: str) -> None:
    value = tenants.a.token if sent == "a token" else sent
    response = tenants.a.chat({"x-request-id": value, "x-ibex-agent-id": "no-uuid"})
    error = check_refused(response, 400, "VALIDATION_ERROR")
    assert error["request_id"] != value


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
def test_6_6_a_providers_own_error_passes_as_it_is(tenants: Tenants, status: int) -> None:
    response = tenants.a.chat({"x-standin-status": str(status)})
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_7_1_a_body_over_the_limit_is_a_413_however_it_comes(tenants: Tenants) -> None:
    for content in (padded(LIMIT + 1), iter([padded(LIMIT), b" " * 1024])):
        body = content if isinstance(content, bytes) else b"".join(content)
        check_refused(post(tenants.b, content=body, headers=JSON), 413, "PAYLOAD_TOO_LARGE")
    chunked = post(tenants.b, content=iter([padded(LIMIT), b" " * 1024]), headers=JSON)
    check_refused(chunked, 413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "BREW"])
def test_6_7_a_method_that_nobody_has_reaches_no_provider(tenants: Tenants, method: str) -> None:
    tenants.a.gateway.provider.clear()
    lines = header_lines({**tenants.a.headers, "content-length": "0", "connection": "close"})
    answer = send_raw(tenants.a.gateway.address, head(method, "/v1/chat/completions", *lines))
    assert answer.status in {0, 400, 403, 404, 405}, answer
