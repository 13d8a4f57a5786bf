"""What Envoy asks, and an auth service behind a real gRPC connection that a test holds in its hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from envoy.service.auth.v3 import external_auth_pb2 as ext_authz
from ibex.auth.v1 import auth_pb2

ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
TOKEN = "ibex_pat_0123456789abcdefCANARY"
REQUEST_ID = "11111111-2222-4333-8444-555555555555"

Behaviour = Callable[[str, bytes], Awaitable[bytes]]


@dataclass
class Stub:
    """Says yes to everything, unless it is told otherwise."""

    behaviour: Behaviour | None = None
    status: grpc.StatusCode | None = None
    details: str = ""
    calls: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    claims: dict[str, Any] = field(default_factory=dict)
    agent: dict[str, Any] = field(default_factory=dict)

    def handler(self) -> grpc.GenericRpcHandler:
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(self._answer_of(name))
            for name in ("ValidateToken", "ValidateAgent")
        }
        return grpc.method_handlers_generic_handler("ibex.auth.v1.AuthService", methods)

    def _answer_of(self, name: str) -> Any:
        async def answer(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self.calls.append((name, {key: str(value) for key, value in context.invocation_metadata() or ()}))
            if self.status is not None:
                await context.abort(self.status, self.details)
            if self.behaviour is not None:
                return await self.behaviour(name, raw)
            return self.good(name, raw)

        return answer

    def good(self, name: str, raw: bytes) -> bytes:
        if name == "ValidateToken":
            claims = {"org_id": ORG, "permissions": 196609, "token_id": "t1", **self.claims}
            return auth_pb2.ValidateTokenResponse(**claims).SerializeToString()
        asked = auth_pb2.ValidateAgentRequest.FromString(raw)
        agent = {"agent_id": asked.agent_id, "org_id": asked.org_id, "status": "active", **self.agent}
        return auth_pb2.ValidateAgentResponse(**agent).SerializeToString()

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def question(changes: Mapping[str, str | None] | None = None, *, path: str = "/v1/models", raw: bool = True) -> bytes:
    """A CheckRequest; `raw`: as with `encode_raw_headers`."""
    headers: dict[str, str | None] = {
        "authorization": f"Bearer {TOKEN}",
        "x-ibex-agent-id": AGENT,
        "x-request-id": REQUEST_ID,
        **(changes or {}),
    }
    request = ext_authz.CheckRequest()
    request.attributes.source.address.socket_address.address = "10.0.0.1"
    http = request.attributes.request.http
    http.path = path
    for name, value in headers.items():
        if value is None:
            continue
        if raw:
            http.header_map.headers.add(key=name, raw_value=value.encode())
        else:
            http.headers[name] = value
    data: bytes = request.SerializeToString()
    return data


async def check(channel: grpc.aio.Channel, raw: bytes) -> ext_authz.CheckResponse:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        "/envoy.service.auth.v3.Authorization/Check"
    )
    return ext_authz.CheckResponse.FromString(await asyncio.wait_for(call(raw), 30))


def code_of(reply: ext_authz.CheckResponse) -> str:
    """The error code, or `allowed`; both halves of the answer must agree."""
    if reply.HasField("ok_response"):
        assert reply.status.code == 0
        assert reply.dynamic_metadata["decision"] == "allowed"
        return "allowed"
    assert reply.status.code != 0
    error = json.loads(reply.denied_response.body)["error"]
    assert error["code"] == reply.dynamic_metadata["code"]
    return str(error["code"])


def headers_of(options: Any) -> dict[str, str]:
    assert all(option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD for option in options)
    return {option.header.key: option.header.value for option in options}
