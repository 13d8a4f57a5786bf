"""The numbers of an answer are written byte by byte; protobuf must read them as it would have written them."""

from __future__ import annotations

import pytest
from envoy.service.auth.v3 import external_auth_pb2 as ext_authz
from hypothesis import given
from hypothesis import strategies as st

from extproc.gate import wire
from extproc.gate.passage import Allow
from extproc.gate.verdict import CHAT_PERMISSIONS, Claims, Quota
from tests.unit.gate.gate_side import AGENT, ORG, headers_of, question

WANTED = frozenset((wire.ADDRESS_HEADER,))
CLAIMS = Claims(ORG, CHAT_PERMISSIONS, None, None, "t1", None)


def read(order: Allow, auth_ms: float, secrets: tuple[str, ...] = ()) -> ext_authz.CheckResponse:
    return ext_authz.CheckResponse.FromString(wire.allow(order, auth_ms, secrets))


@given(st.floats(0, 1e6), st.integers(0, 2**53), st.integers(0, 2**53), st.integers(0, 2**53))
def test_numbers_are_read_as_they_were_given(auth_ms: float, limit: int, remaining: int, reset: int) -> None:
    reply = read(Allow(CLAIMS, AGENT, None, True, Quota(True, limit, remaining, reset, 30)), auth_ms)
    assert reply.dynamic_metadata["auth_ms"] == auth_ms
    assert headers_of(reply.ok_response.response_headers_to_add) == {
        "x-ibex-auth-cached": "true",
        "x-ratelimit-limit": str(limit),
        "x-ratelimit-remaining": str(remaining),
        "x-ratelimit-reset": str(reset),
    }
    assert reply.FromString(reply.SerializeToString()) == reply


def test_bytes_are_those_of_protobuf() -> None:
    expected = ext_authz.CheckResponse()
    expected.dynamic_metadata.fields["auth_ms"].number_value = 0.25
    assert wire._AUTH_MS + wire._DOUBLE.pack(0.25) == expected.SerializeToString()
    expected = ext_authz.CheckResponse()
    wire._add(expected.ok_response.response_headers_to_add, "x-ratelimit-limit", "600")
    assert wire._numbered(b"x-ratelimit-limit", 600) == expected.SerializeToString()


def test_what_is_appended_leaves_the_rest_alone() -> None:
    reply = read(Allow(CLAIMS, AGENT, "u1", True, Quota(True, 60, 59, 1, 30)), 0.5, ("key",))
    assert headers_of(reply.ok_response.headers) == {"x-ibex-agent-id": AGENT, "x-ibex-user-id": "u1"}
    assert list(reply.ok_response.query_parameters_to_remove) == ["key"]
    assert dict(reply.dynamic_metadata) == {
        "decision": "allowed",
        "org_id": ORG,
        "agent_id": AGENT,
        "user_id": "u1",
        "token_id": "t1",
        "permissions": CHAT_PERMISSIONS,
        "auth_cached": True,
        "auth_ms": 0.5,
    }


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    ("told", "address"),
    [
        (None, "10.0.0.1"),
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8::9", "2001:db8::9"),
        ("", "10.0.0.1"),
        ("rubbish", "10.0.0.1"),
        ("203.0.113.9, 203.0.113.10", "10.0.0.1"),
    ],
)
def test_the_address_is_the_one_that_envoy_tells_else_the_connections(
    told: str | None, address: str, *, raw: bool
) -> None:
    assert wire.read_request(question({wire.ADDRESS_HEADER: told}, raw=raw), WANTED).address == address


def test_an_address_that_was_not_wanted_is_not_believed() -> None:
    assert wire.read_request(question({wire.ADDRESS_HEADER: "203.0.113.9"}), frozenset()).address == "10.0.0.1"
