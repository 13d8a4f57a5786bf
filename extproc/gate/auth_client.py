"""Asks an auth service: any `ibex.auth.v1.AuthService`, ours or another's. A failure is a value; no second try.

Whatever is no clear yes or no is UNAVAILABLE: other errors, a late answer, an answer that cannot be one. What the
service writes into an error's message is read for one phrase and shown to nobody.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from ibex.auth.v1 import auth_pb2

from extproc.gate.verdict import AgentVerdict, Claims, TokenVerdict

__all__ = ["AuthClient", "Caller"]

_VALIDATE_TOKEN = "/ibex.auth.v1.AuthService/ValidateToken"  # noqa: S105 - a method's name
_VALIDATE_AGENT = "/ibex.auth.v1.AuthService/ValidateAgent"

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # The first request after the service came back must not be refused for a second of back-off.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Finds a host that vanished without a word.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    # A second try would come after the deadline, or double the load of a service that is going under.
    ("grpc.enable_retries", 0),
    # http_proxy in the environment is for the internet; tokens do not go there.
    ("grpc.enable_http_proxy", 0),
    # A few ids.
    ("grpc.max_receive_message_length", 64 * 1024),
)

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_TOKEN_ID = re.compile(r"[!-~]{1,64}")
_USER = re.compile(r"[!-~]{1,128}")
_NOT_ACTIVE = "agent is not active"
_INACTIVE = frozenset(("paused", "suspended", "archived"))


@dataclass(frozen=True, slots=True)
class Caller:
    """What a call carries on; empty: left out."""

    request_id: str
    traceparent: str


class AuthClient:
    """One channel to one target. Close with `close`."""

    def __init__(self, target: str, timeout_s: float) -> None:
        """`timeout_s`: for each call."""
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        # Bytes both ways: rubbish is ours to name, not grpcio's to raise.
        self._token: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_VALIDATE_TOKEN)
        self._agent: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_VALIDATE_AGENT)

    async def validate_token(self, token: str, caller: Caller) -> Claims | TokenVerdict:
        request = auth_pb2.ValidateTokenRequest(access_token=token).SerializeToString()
        try:
            raw = await self._token(request, timeout=self._timeout_s, metadata=_metadata(caller))
            return _read_claims(auth_pb2.ValidateTokenResponse.FromString(raw))
        except grpc.aio.AioRpcError as error:
            is_invalid = error.code() is grpc.StatusCode.UNAUTHENTICATED
            return TokenVerdict.INVALID if is_invalid else TokenVerdict.UNAVAILABLE
        except (DecodeError, ValueError):
            return TokenVerdict.UNAVAILABLE

    async def validate_agent(self, token: str, org_id: str, agent_id: str, caller: Caller) -> AgentVerdict:
        request = auth_pb2.ValidateAgentRequest(agent_id=agent_id, org_id=org_id).SerializeToString()
        metadata = (("authorization", f"Bearer {token}"), *_metadata(caller))
        try:
            raw = await self._agent(request, timeout=self._timeout_s, metadata=metadata)
            return _read_agent(auth_pb2.ValidateAgentResponse.FromString(raw), org_id, agent_id)
        except grpc.aio.AioRpcError as error:
            return _agent_verdict(error.code(), error.details() or "")
        except DecodeError:
            return AgentVerdict.UNAVAILABLE

    async def is_ready(self, timeout_s: float) -> bool:
        """Whether a connection stands, or can be made within `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        await self._channel.close()


def _metadata(caller: Caller) -> tuple[tuple[str, str], ...]:
    pairs = (("x-request-id", caller.request_id), ("traceparent", caller.traceparent))
    return tuple([pair for pair in pairs if pair[1]])


def _read_claims(answer: auth_pb2.ValidateTokenResponse) -> Claims:
    """Raises ValueError for what no service may answer."""
    if answer.permissions < 0:
        raise ValueError("permissions")
    expires = answer.expires_at
    if not (0 <= expires.nanos < 1_000_000_000):
        raise ValueError("expires_at")
    return Claims(
        org_id=_matching(_UUID, answer.org_id).lower(),
        permissions=answer.permissions,
        # Empty is what services without optional fields send for "none".
        agent_id=_matching(_UUID, answer.agent_id).lower() if answer.agent_id else None,
        user_id=_matching(_USER, answer.user_id) if answer.user_id else None,
        token_id=_matching(_TOKEN_ID, answer.token_id).lower() if answer.token_id else None,
        expires_at=expires.seconds + expires.nanos / 1e9 if answer.HasField("expires_at") else None,
    )


def _matching(form: re.Pattern[str], text: str) -> str:
    if not form.fullmatch(text):
        raise ValueError("an id of the wrong form")
    return text


def _read_agent(answer: auth_pb2.ValidateAgentResponse, org_id: str, agent_id: str) -> AgentVerdict:
    if answer.org_id.lower() != org_id or answer.agent_id.lower() != agent_id:
        return AgentVerdict.UNAVAILABLE
    if answer.status == "active":
        return AgentVerdict.ACTIVE
    return AgentVerdict.INACTIVE if answer.status in _INACTIVE else AgentVerdict.UNAVAILABLE


def _agent_verdict(code: grpc.StatusCode, details: str) -> AgentVerdict:
    match code:
        case grpc.StatusCode.PERMISSION_DENIED:
            return AgentVerdict.INACTIVE if _NOT_ACTIVE in details else AgentVerdict.NOT_AUTHORIZED
        case grpc.StatusCode.UNAUTHENTICATED:
            return AgentVerdict.TOKEN_INVALID
        case _:
            return AgentVerdict.UNAVAILABLE
