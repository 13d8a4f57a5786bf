"""Who a request claims to be, in every spelling: what is not the token's own is refused, or changes nothing.

A and B have an agent of the same id; so what B claims about the organisation is all that keeps A's memories from B.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import pytest

from tests.integration.conftest import StandIn
from tests.integration.http_side import raw
from tests.security.conftest import Tenants, World
from tests.security.security_side import PATH, QUESTION, Caller, RawAnswer, chat_bytes, head, send_raw

OWN, FOREIGN = "canary-memory-b", "canary-memory-a"
SKIPPED_RETRIES = 9

SPELLINGS = [
    "x-ibex-org-id: {org}",
    "X-IBEX-ORG-ID: {org}",
    "X-Ibex-Org-Id: {org}",
    "x-ibex-org-id:{org}",
    "x-ibex-org-id:\t {org} \t",
    "x-ibex-org-id: {org},{own}",
    "x-ibex-org-id: {own}\r\nx-ibex-org-id: {org}",
    "x_ibex_org_id: {org}",
    "X_IBEX_ORG_ID: {org}",
    "x-ibex_org-id: {org}",
    "x.ibex.org.id: {org}",
    "x-ibex-org: {org}",
    "x-ibex-tenant-id: {org}",
    "x-ibex-principal-context: {org}",
    "x-ibex-context-org-id: {org}",
    "x-ibex-agent-org-id: {org}",
    "x-ibex-session-org-id: {org}",
    "x-ibex-user-org-id: {org}",
    "x-org-id: {org}",
    "x-tenant-id: {org}",
    "x-forwarded-user: {org}",
    "x-forwarded-client-cert: By=spiffe://a;URI=spiffe://{org}",
    "x-jwt-payload: eyJvcmdfaWQiOiJ7b3JnfSJ9",
    "x-envoy-internal: true",
    "x-envoy-original-path: /v1/models",
    "x-envoy-dynamic-metadata: envoy.filters.http.ext_authz={org}",
    "x-envoy-peer-metadata: {org}",
    "x-envoy-decorator-operation: {org}",
    "x-envoy-upstream-rq-timeout-ms: 1",
    "x-envoy-retry-on: 5xx",
    "x-envoy-max-retries: 9",
    "x-envoy-attempt-count: 9",
    "x-envoy-expected-rq-timeout-ms: 1",
    "x-envoy-upstream-alt-stat-name: canary",
    "x-ext-proc-org-id: {org}",
    "x-ibex-auth-cached: true",
    "x-ibex-memories-injected: 9",
    "x-ibex-agent-id: {other_agent}",
    "X-IBEX-AGENT-ID: {other_agent}",
    "x_ibex_agent_id: {other_agent}",
    "x-ibex-user-id: u1, u2",
    "connection: x-ibex-agent-id, authorization",
    "connection: close, x-ibex-org-id\r\nx-ibex-org-id: {org}",
    "te: trailers\r\ntrailer: x-ibex-org-id",
    "forwarded: for=1.2.3.4;by={org}",
    "x-http-method-override: DELETE",
    "x-original-url: /v1/models",
    "x-rewrite-url: /v1/models",
    "host: {org}",
    "x-request-id: {org}",
    "traceparent: 00-{org}-x-01",
    "baggage: org_id={org}",
    "authorization: Bearer {foreign_token}",
    "Authorization : Bearer {foreign_token}",
    "authorization\x0b: Bearer {foreign_token}",
    "x-api-key: {foreign_token}",
    " x-ibex-org-id: {org}",
    "x-ibex-org-id : {org}",
    "x-ibex-org-id\x00: {org}",
    "x-a: b\n x-ibex-org-id: {org}",
    "x-a: b\rx-ibex-org-id: {org}",
    "x-a: b\x00\r\nx-b: c",
    ": {org}",
    ":authority: {org}",
    ":path: /v1/models",
    ":x-ibex-org-id: {org}",
]


def fill(template: str, tenants: Tenants) -> str:
    return template.format(
        org=tenants.a.org_id,
        own=tenants.b.org_id,
        other_agent=tenants.other_a.agent_id,
        foreign_token=tenants.a.token,
    )


def check_nothing_foreign(provider: StandIn, tenants: Tenants, status: int) -> None:
    """Refused, or B's own request with B's own memory; a fallback, on a busy machine, has none at all."""
    received = provider.received()
    assert status in {0, 200} or 400 <= status < 500 or status == 503, status
    if status != 200:
        assert received == []
        return
    assert received
    for one in received:
        assert FOREIGN not in one.body.decode()
        assert one.path == PATH
        names = {name.replace("_", "-") for name in one.names}
        assert not [name for name in names if name.startswith(("x-ibex-org", "x-ibex-agent-id", "x-ibex-user-id"))]
        assert not [name for name in names if name.startswith(("x-envoy-", ":"))]
        assert tenants.a.token not in str(one)
        assert tenants.b.token not in str(one)


@pytest.mark.parametrize("template", SPELLINGS)
def test_over_http1_no_header_makes_b_into_a(tenants: Tenants, provider: StandIn, template: str) -> None:
    for first in (True, False):
        status = send_until_answered(tenants, provider, fill(template, tenants), first=first)
        check_nothing_foreign(provider, tenants, status)


def send_until_answered(tenants: Tenants, provider: StandIn, line: str, *, first: bool) -> int:
    """With the forged line before or behind the genuine ones. Again while the gate has no time."""
    body = chat_bytes()
    own = [f"{name}: {value}" for name, value in tenants.b.headers.items()]
    rest = ["content-type: application/json", f"content-length: {len(body)}"]
    lines = [line, *own] if first else [*own, line]
    answer = RawAnswer(0, b"")
    for _ in range(SKIPPED_RETRIES):
        provider.clear()
        sent = head("POST", PATH, *lines, *rest, "connection: close") + body
        answer = send_raw(tenants.b.gateway.address, sent)
        if b"SERVICE_DEGRADED" not in answer.text:
            break
    return answer.status


def test_the_genuine_lines_alone_do_bring_bs_memory(tenants: Tenants, provider: StandIn) -> None:
    """Else the test above would show nothing."""
    for _ in range(SKIPPED_RETRIES):
        assert send_until_answered(tenants, provider, "x-fine: 1", first=True) == 200
        if OWN in provider.last().body.decode():
            return
    raise AssertionError("no memory")


@pytest.mark.parametrize("value", ["Bearer ", "Bearer \t ", "bearer    "])
def test_1_2_an_empty_bearer_to_the_byte_is_missing(tenants: Tenants, value: str) -> None:
    sent = head("POST", PATH, f"authorization: {value}", "content-length: 0", "connection: close")
    status, _, body = raw(tenants.b.gateway.address, sent)
    assert (status, json.loads(body)["error"]["code"]) == (401, "MISSING_TOKEN")


@dataclass
class Http2Answer:
    status: int = 0
    """0: the stream was reset, or the connection closed."""
    body: bytes = b""


PSEUDO = [(":method", "POST"), (":scheme", "http"), (":authority", "gateway"), (":path", PATH)]
Fields = Sequence[tuple[str, str]]


def send_http2(caller: Caller, fields: Fields, body: bytes, trailers: Fields = ()) -> Http2Answer:
    """One request whose fields are sent as they are given, valid or not."""
    config = h2.config.H2Configuration(
        validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
    )
    answer = Http2Answer()
    with socket.create_connection(caller.gateway.address, timeout=10) as connection:
        side = h2.connection.H2Connection(config)
        side.initiate_connection()
        # As latin-1, byte for byte.
        side.send_headers(1, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields])
        side.send_data(1, body, end_stream=not trailers)
        if trailers:
            side.send_headers(1, [(name.encode(), value.encode()) for name, value in trailers], end_stream=True)
        try:
            connection.sendall(side.data_to_send())
            while received := connection.recv(65536):
                for event in side.receive_data(received):
                    if isinstance(event, h2.events.ResponseReceived):
                        answer.status = int(dict(event.headers or [])[b":status"])
                    elif isinstance(event, h2.events.DataReceived):
                        answer.body += event.data or b""
                    elif isinstance(
                        event, h2.events.StreamEnded | h2.events.StreamReset | h2.events.ConnectionTerminated
                    ):
                        return answer
                connection.sendall(side.data_to_send())
        except (OSError, h2.exceptions.ProtocolError):
            pass
    return answer


HTTP2 = {
    "fine": [("x-fine", "1")],
    "org": [("x-ibex-org-id", "{org}")],
    "upper case": [("X-IBEX-Org-Id", "{org}")],
    "upper case agent": [("X-Ibex-Agent-Id", "{other_agent}")],
    "twice": [("x-ibex-org-id", "{own}"), ("x-ibex-org-id", "{org}")],
    "agent twice": [("x-ibex-agent-id", "{other_agent}")],
    "authorization twice": [("authorization", "Bearer {foreign_token}")],
    "underscores": [("x_ibex_org_id", "{org}")],
    "unknown pseudo-header": [(":x-ibex-org-id", "{org}")],
    "pseudo-header behind": [(":authority", "{org}")],
    "path behind": [(":path", "/v1/models")],
    "protocol": [(":protocol", "websocket")],
    "status": [(":status", "200")],
    "line feed in a value": [("x-a", "b\r\nx-ibex-org-id: {org}")],
    "line feed in a name": [("x-a: b\r\nx-ibex-org-id", "{org}")],
    "nul": [("x-a", "b\x00c")],
    "space in a name": [("x-ibex-org-id ", "{org}")],
    "space before a name": [(" x-ibex-org-id", "{org}")],
    "empty name": [("", "{org}")],
    "connection": [("connection", "x-ibex-agent-id")],
    "transfer-encoding": [("transfer-encoding", "chunked")],
    "upgrade": [("upgrade", "h2c"), ("http2-settings", "AAAA")],
    "te": [("te", "chunked")],
    "host": [("host", "{org}")],
    "cookie crumbs": [("cookie", "a={foreign_token}"), ("cookie", "b=1")],
    "length too small": [("content-length", "1")],
    "length too large": [("content-length", "100000")],
    "length twice": [("content-length", "10"), ("content-length", "20")],
    "length negative": [("content-length", "-1")],
}


@pytest.mark.parametrize("name", HTTP2)
def test_over_http2_no_field_makes_b_into_a(tenants: Tenants, provider: StandIn, name: str) -> None:
    forged = [(key, fill(value, tenants)) for key, value in HTTP2[name]]
    own = [*tenants.b.headers.items(), ("content-type", "application/json")]
    answer = Http2Answer()
    for _ in range(SKIPPED_RETRIES):
        provider.clear()
        answer = send_http2(tenants.b, [*PSEUDO, *own, *forged], chat_bytes())
        if b"SERVICE_DEGRADED" not in answer.body:
            break
    check_nothing_foreign(provider, tenants, answer.status)
    if name == "fine":
        assert answer.status == 200


PSEUDO_TWICE = {
    "path": [(":path", "/v1/models")],
    "authority": [(":authority", "other")],
    "method": [(":method", "GET")],
    "scheme": [(":scheme", "https")],
}


@pytest.mark.parametrize("name", PSEUDO_TWICE)
def test_over_http2_a_second_pseudo_header_is_refused(tenants: Tenants, provider: StandIn, name: str) -> None:
    own = [*tenants.b.headers.items(), ("content-type", "application/json")]
    answer = send_http2(tenants.b, [*PSEUDO, *PSEUDO_TWICE[name], *own], chat_bytes())
    assert answer.status in {0, 400}
    assert provider.received() == []


@pytest.mark.parametrize(
    "path", ["*", "", "v1/models", "/v1/models#/x", "http://other/v1/models", "/v1/\x00", "/v1/a b"]
)
def test_over_http2_an_odd_path_goes_nowhere_odd(tenants: Tenants, provider: StandIn, path: str) -> None:
    fields = [pair for pair in PSEUDO if pair[0] != ":path"] + [(":path", path), *tenants.b.headers.items()]
    answer = send_http2(tenants.b, fields, b"")
    assert answer.status in {0, 400, 404} or all(
        one.path.startswith("/v1/models") and one.body == b"" for one in provider.received()
    )


def test_trailers_make_nobody_into_a_and_stay_here(tenants: Tenants, provider: StandIn) -> None:
    forged = [
        ("x-ibex-org-id", tenants.a.org_id),
        ("authorization", f"Bearer {tenants.a.token}"),
        ("x-ibex-agent-id", "x"),
    ]
    own = [*tenants.b.headers.items(), ("content-type", "application/json")]
    answer = Http2Answer()
    for _ in range(SKIPPED_RETRIES):
        provider.clear()
        answer = send_http2(tenants.b, [*PSEUDO, *own], chat_bytes(), forged)
        if b"SERVICE_DEGRADED" not in answer.body:
            break
    check_nothing_foreign(provider, tenants, answer.status)
    assert answer.status == 200


def test_trailers_alone_prove_nothing(world: World, tenants: Tenants, provider: StandIn) -> None:
    trailers = [("authorization", f"Bearer {tenants.a.token}"), ("x-ibex-agent-id", tenants.a.agent_id)]
    answer = send_http2(tenants.b, [*PSEUDO, ("content-type", "application/json")], chat_bytes(QUESTION), trailers)
    assert answer.status == 401
    assert provider.received() == []
