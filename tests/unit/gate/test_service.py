"""The driver over a real gRPC connection; the passage's own cases are in test_passage."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from envoy.service.auth.v3 import external_auth_pb2 as ext_authz
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from extproc.gate import principals, wire
from tests.unit.gate.conftest import Gate
from tests.unit.gate.gate_side import AGENT, ORG, REQUEST_ID, TOKEN, check, code_of, headers_of, question

OTHER = "99999999-9999-4999-8999-999999999999"


async def test_a_good_request_passes_with_its_identity_and_without_its_credentials(gate: Gate) -> None:
    reply = await check(gate.channel, question({"x-ibex-user-id": "u1"}))
    assert code_of(reply) == "allowed"
    metadata = dict(reply.dynamic_metadata)
    assert metadata.pop("auth_ms") > 0
    assert metadata == {
        "decision": "allowed",
        "org_id": ORG,
        "agent_id": AGENT,
        "user_id": "u1",
        "token_id": "t1",
        "permissions": 196609,
        "auth_cached": False,
    }
    removed = set(reply.ok_response.headers_to_remove)
    assert removed >= {"authorization", "x-api-key", "x-goog-api-key", "api-key", "x-ibex-org-id"}
    assert headers_of(reply.ok_response.headers) == {"x-ibex-agent-id": AGENT, "x-ibex-user-id": "u1"}
    assert headers_of(reply.ok_response.response_headers_to_add) == {}
    assert TOKEN not in str(reply)


async def test_both_ways_in_which_envoy_sends_headers_are_read(gate: Gate) -> None:
    for raw in (True, False):
        assert code_of(await check(gate.channel, question(raw=raw))) == "allowed"
        assert code_of(await check(gate.channel, question({"authorization": None}, raw=raw))) == "MISSING_TOKEN"


async def test_bytes_that_are_no_text_are_no_user(gate: Gate) -> None:
    request = ext_authz.CheckRequest.FromString(question())
    request.attributes.request.http.header_map.headers.add(key="x-ibex-user-id", raw_value=b"Andr\xe9")
    assert code_of(await check(gate.channel, request.SerializeToString())) == "VALIDATION_ERROR"


async def test_a_repeated_header_is_malformed(gate: Gate) -> None:
    for name in ("authorization", "x-ibex-agent-id", "x-ibex-user-id"):
        request = ext_authz.CheckRequest.FromString(question({"x-ibex-user-id": "u1"}))
        entries = request.attributes.request.http.header_map.headers
        [same] = [entry for entry in entries if entry.key == name]
        entries.add().CopyFrom(same)
        assert code_of(await check(gate.channel, request.SerializeToString())) != "allowed", name


async def test_calls_carry_request_id_trace_and_the_callers_token(gate: Gate) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    await check(gate.channel, question({"traceparent": trace}))
    (_, token_call), (_, agent_call) = gate.stub.calls
    for metadata in (token_call, agent_call):
        assert metadata["x-request-id"] == REQUEST_ID
        assert metadata["traceparent"] == trace
    assert agent_call["authorization"] == f"Bearer {TOKEN}"


async def test_a_warm_request_asks_nobody_and_says_so(gate: Gate) -> None:
    gate.trust()
    await check(gate.channel, question())
    reply = await check(gate.channel, question())
    assert gate.stub.names() == ["ValidateToken", "ValidateAgent"]
    assert reply.dynamic_metadata["auth_cached"] is True
    assert headers_of(reply.ok_response.response_headers_to_add) == {"x-ibex-auth-cached": "true"}


async def test_without_a_revocation_channel_each_request_asks(gate: Gate) -> None:  # 7.3
    for _ in range(2):
        assert code_of(await check(gate.channel, question())) == "allowed"
    assert gate.stub.names().count("ValidateToken") == 2


async def test_equal_tokens_at_once_are_one_question(gate: Gate) -> None:
    may_answer = asyncio.Event()

    async def slow(name: str, raw: bytes) -> bytes:
        await may_answer.wait()
        return gate.stub.good(name, raw)

    gate.stub.behaviour = slow
    asked = [asyncio.create_task(check(gate.channel, question())) for _ in range(20)]
    await asyncio.sleep(0.5)  # in which most of them are there, on a busy machine too
    may_answer.set()
    assert {code_of(await reply) for reply in asked} == {"allowed"}
    assert len(gate.stub.calls) < 10


async def test_many_good_tokens_at_once_all_pass(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart. The auth service takes its time, and no more than 16 are asked for at once."""
    monkeypatch.setattr(principals, "_WAIT_S", 20.0)  # shipped is 0.1, which a busy machine may need for less
    busy, most = 0, 0

    async def slow(name: str, raw: bytes) -> bytes:
        nonlocal busy, most
        busy, most = busy + 1, max(most, busy + 1)
        await asyncio.sleep(0.002)
        busy -= 1
        return gate.stub.good(name, raw)

    gate.stub.behaviour = slow
    tokens = [f"Bearer ibex_pat_{number:032d}" for number in range(100)]
    replies = await asyncio.gather(*(check(gate.channel, question({"authorization": t})) for t in tokens))
    assert [code_of(reply) for reply in replies].count("allowed") == 100
    assert most <= 100


async def test_a_wrong_token_is_asked_once(gate: Gate) -> None:
    gate.stub.status = grpc.StatusCode.UNAUTHENTICATED
    for _ in range(5):
        assert code_of(await check(gate.channel, question())) == "INVALID_TOKEN"
    assert gate.stub.names() == ["ValidateToken"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "INVALID_TOKEN"),
        (grpc.StatusCode.PERMISSION_DENIED, "SERVICE_DEGRADED"),
        (grpc.StatusCode.UNAVAILABLE, "SERVICE_DEGRADED"),
        (grpc.StatusCode.INTERNAL, "SERVICE_DEGRADED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVICE_DEGRADED"),
        (grpc.StatusCode.UNIMPLEMENTED, "SERVICE_DEGRADED"),
        (grpc.StatusCode.NOT_FOUND, "SERVICE_DEGRADED"),
    ],
)
async def test_an_error_about_a_token_is_a_refusal(gate: Gate, status: grpc.StatusCode, code: str) -> None:
    gate.stub.status, gate.stub.details = status, TOKEN
    reply = await check(gate.channel, question())
    assert code_of(reply) == code
    assert TOKEN not in str(reply)


@pytest.mark.parametrize(
    ("status", "details", "code"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "no", "AGENT_NOT_AUTHORIZED"),
        (grpc.StatusCode.PERMISSION_DENIED, "the agent is not active: paused", "AGENT_SUSPENDED"),
        (grpc.StatusCode.UNAUTHENTICATED, "", "INVALID_TOKEN"),
        (grpc.StatusCode.NOT_FOUND, "", "SERVICE_DEGRADED"),
        (grpc.StatusCode.UNAVAILABLE, "", "SERVICE_DEGRADED"),
    ],
)
async def test_an_error_about_an_agent_is_a_refusal(
    gate: Gate, status: grpc.StatusCode, details: str, code: str
) -> None:
    gate.trust()
    assert code_of(await check(gate.channel, question({"x-ibex-agent-id": OTHER}))) == "allowed"
    gate.stub.status, gate.stub.details = status, details
    assert code_of(await check(gate.channel, question())) == code


@pytest.mark.parametrize(
    "claims",
    [
        {"org_id": ""},
        {"org_id": "org"},
        {"org_id": ORG + "\n"},
        {"agent_id": "agent"},
        {"user_id": "a b"},
        {"token_id": "x" * 65},
        {"permissions": -1},
        {"expires_at": Timestamp(seconds=4_000_000_000, nanos=-1)},
    ],
)
async def test_claims_that_cannot_be_are_a_503(gate: Gate, claims: dict[str, Any]) -> None:
    gate.stub.claims = claims
    assert code_of(await check(gate.channel, question())) == "SERVICE_DEGRADED"


@pytest.mark.parametrize(
    ("agent", "code"),
    [
        ({"org_id": OTHER}, "SERVICE_DEGRADED"),
        ({"agent_id": OTHER}, "SERVICE_DEGRADED"),
        ({"status": ""}, "SERVICE_DEGRADED"),
        ({"status": "Active"}, "SERVICE_DEGRADED"),
        ({"status": "paused"}, "AGENT_SUSPENDED"),
        ({"status": "archived"}, "AGENT_SUSPENDED"),
        ({"status": "suspended"}, "AGENT_SUSPENDED"),
    ],
)
async def test_an_agent_is_active_only_if_it_is_said_in_so_many_words(
    gate: Gate, agent: dict[str, Any], code: str
) -> None:
    gate.stub.agent = agent
    assert code_of(await check(gate.channel, question())) == code


async def test_rubbish_for_an_answer_is_a_503(gate: Gate) -> None:
    async def rubbish(_name: str, _raw: bytes) -> bytes:
        return b"\xff\xff\xff"

    gate.stub.behaviour = rubbish
    assert code_of(await check(gate.channel, question())) == "SERVICE_DEGRADED"


async def test_a_slow_auth_service_is_a_503(gate: Gate) -> None:
    async def forever(_name: str, _raw: bytes) -> bytes:
        await asyncio.sleep(30)
        return b""

    gate.stub.behaviour = forever
    gate.auth._timeout_s = 0.2
    assert code_of(await check(gate.channel, question())) == "SERVICE_DEGRADED"


@pytest.mark.parametrize(
    ("expires_in_s", "code"), [(60, "allowed"), (1, "allowed"), (-2, "allowed"), (-6, "INVALID_TOKEN")]
)
async def test_a_clock_that_differs_by_less_than_five_seconds_is_the_auth_services(
    gate: Gate, expires_in_s: int, code: str
) -> None:
    """It said yes; the gate's own clock says that the token has expired."""
    gate.trust()
    gate.stub.claims = {"expires_at": Timestamp(seconds=int(time.time()) + expires_in_s)}
    assert code_of(await check(gate.channel, question())) == code
    assert len(gate.cache) == (1 if expires_in_s == 60 else 0)


async def test_a_revocation_during_the_validation_refuses_it(gate: Gate) -> None:
    gate.trust()

    async def revoked_meanwhile(name: str, raw: bytes) -> bytes:
        gate.cache.revoke("t1", time.monotonic())
        return gate.stub.good(name, raw)

    gate.stub.behaviour = revoked_meanwhile
    assert code_of(await check(gate.channel, question())) == "INVALID_TOKEN"
    assert len(gate.cache) == 0


async def test_a_token_that_tries_many_foreign_agents_is_stopped(gate: Gate) -> None:
    gate.trust()
    await check(gate.channel, question())
    gate.stub.status = grpc.StatusCode.PERMISSION_DENIED
    agents = [f"00000000-0000-4000-8000-{number:012d}" for number in range(200)]
    began = time.monotonic()
    codes = [code_of(await check(gate.channel, question({"x-ibex-agent-id": agent}))) for agent in agents]
    assert set(codes) == {"AGENT_NOT_AUTHORIZED", "SERVICE_DEGRADED"}
    assert len(gate.stub.calls) < 70 + 12 * (time.monotonic() - began), "50, and 10 a second"
    assert code_of(await check(gate.channel, question())) == "allowed"


async def test_a_denial_is_the_error_envelope(gate: Gate) -> None:
    reply = await check(gate.channel, question({"x-ibex-agent-id": "nonsense"}))
    denied = reply.denied_response
    assert denied.status.code == 400
    error = json.loads(denied.body)["error"]
    assert set(error) == {"code", "message", "request_id", "timestamp", "field_errors"}
    assert error["request_id"] == REQUEST_ID
    assert error["timestamp"].endswith("Z")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(error["timestamp"])).total_seconds()) < 60
    assert error["field_errors"][0]["field"] == "X-IBEX-Agent-ID"
    headers = headers_of(denied.headers)
    assert headers["content-type"] == "application/json"
    assert headers["x-ibex-memories-injected"] == headers["x-ibex-context-tokens"] == "0"
    assert headers["x-ibex-context-fallback"] == "true"
    metadata = dict(reply.dynamic_metadata)
    assert metadata.pop("auth_ms") > 0
    assert metadata == {"decision": "denied", "code": "VALIDATION_ERROR", "org_id": ORG}


async def test_each_denial_is_one_line_without_the_token(gate: Gate) -> None:
    gate.stub.status = grpc.StatusCode.UNAUTHENTICATED
    await check(gate.channel, question({"x-request-id": f"prompt {TOKEN}"}))
    [line] = gate.lines
    assert (line.code.value, line.status, line.request_id) == ("INVALID_TOKEN", 401, "")
    assert TOKEN not in repr(line)


async def test_a_token_in_the_query_is_no_token_and_does_not_go_on(gate: Gate) -> None:
    path = f"/v1beta/models?key={TOKEN}&alt=sse"
    assert code_of(await check(gate.channel, question({"authorization": None}, path=path))) == "MISSING_TOKEN"
    reply = await check(gate.channel, question(path=path))
    assert list(reply.ok_response.query_parameters_to_remove) == ["key"]


@pytest.mark.parametrize("raw", [b"", b"\xff\xff\xff", b"\x0a\x02\x08", ext_authz.CheckRequest().SerializeToString()])
async def test_a_question_that_is_none_is_refused(gate: Gate, raw: bytes) -> None:
    assert code_of(await check(gate.channel, raw)) in {"SERVICE_DEGRADED", "MISSING_TOKEN"}


@pytest.mark.parametrize("where", ["extproc.gate.passage.find_token", "extproc.gate.service.digest_of"])
async def test_a_bug_of_ours_closes_the_gate(gate: Gate, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(where, broken)
    assert code_of(await check(gate.channel, question())) == "SERVICE_DEGRADED"


async def test_a_bug_while_the_answer_is_written_closes_it_too(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(wire, "allow", broken)
    assert code_of(await check(gate.channel, question())) == "SERVICE_DEGRADED"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_question_or_an_error_that_is_caught(raw: bytes) -> None:
    with suppress(DecodeError):
        wire.read_request(raw, frozenset(("authorization",)))
