"""`ibex.auth.v1.AuthService` over gRPC: decode, look up, decide, encode.

What a caller learns of a refusal is its status code and one fixed sentence: not whether a token is unknown, revoked or
expired, nor whether an agent is unknown or somebody else's. Nothing of a token is in any message, log line or span.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import grpc
import structlog
import uuid_utils
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from ibex.auth.v1 import auth_pb2 as pb
from ibex.auth.v1 import auth_pb2_grpc
from opentelemetry import trace
from prometheus_client import REGISTRY
from typing_extensions import override

from extproc import names
from extproc.auth.gossip import Gossip
from extproc.auth.hashing import HashUnusable, hash_token
from extproc.auth.metrics import AuthMetrics
from extproc.auth.new_token import new_token, parse_reason
from extproc.auth.store import AgentStatus, IdentityStore, NoSuch
from extproc.auth.token import Permission, Refusal, Token, refusal_of, split
from extproc.auth.verifier import Verifier
from extproc.memory.lane import Lane, LaneFull
from extproc.memory.model import InvalidValue, parse_uuid
from extproc.memory.store import StoreError
from extproc.telemetry.spans import parent_of

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from grpc import aio
    from ibex.auth.v1.auth_pb2_grpc import _ServicerContext as Context
    from prometheus_client import CollectorRegistry

    from extproc.auth.announce import Announcer
    from extproc.memory.database import Database

__all__ = ["SERVICE_NAME", "AuthService"]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AuthService"].full_name
"""For the health service."""

_DATABASE_THREADS = 4
"""As many connections as one `Database` opens."""
_DATABASE_ROOM = 64
"""Look-ups of 1 to 2 ms: the last of them still has half of the gate's 50 ms."""
_HASHING_ROOM = 3
"""For each thread: one check of 10 ms that runs and two that wait."""
_DEFAULT_LISTED = 50
_MOST_LISTED = 500
_REVOCATION_METADATA = "x-ibex-revocation"
"""Trailing metadata of RevokeToken: whether gates were told, see `Heard`."""
_CODE_ATTRIBUTE = "rpc.grpc.status_code"

_NOT_VALID = "the token is not valid"
_NOT_AUTHORIZED = "the agent is not authorized"
_NOT_ACTIVE = "agent is not active"
_NOT_ADMIN = "this needs a token of the organisation that may manage tokens"
_BUSY = "too many calls at once; try again"
_AWAY = "the token store cannot be used now"

_REQUEST_ID = re.compile(r"[0-9A-Fa-f-]{36}", re.ASCII)
"""A UUID: another text may be anything, and is not repeated."""

_log = structlog.get_logger(__name__)
_tracer = trace.get_tracer("extproc.auth")

M = TypeVar("M", bound="Message")
T = TypeVar("T")


class _Unauthenticated(Exception):
    def __init__(self, refusal: Refusal, token: Token | None = None) -> None:
        super().__init__(refusal)
        self.refusal = refusal
        self.token = token


class _Denied(Exception):
    """The message is shown to the caller."""


@dataclass(slots=True)
class _Call:
    """What is known of one call, for its log line and its span."""

    method: str
    request_id: str
    span: trace.Span


class AuthService(auth_pb2_grpc.AuthServiceServicer):
    """Await `start` before the server starts and `stop` after it has; both in the server's event loop."""

    def __init__(
        self,
        database: Database,
        announcer: Announcer | None,
        registry: CollectorRegistry = REGISTRY,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`announcer`: None where there is no Redis. The database stays the caller's to close, after `stop`."""
        self._store = IdentityStore(database)
        self._now = now
        threads = max(1, len(os.sched_getaffinity(0)))
        self._database = Lane("auth-database", _DATABASE_THREADS, _DATABASE_ROOM)
        self._hashing = Lane("auth-hashing", threads, _HASHING_ROOM * threads)
        self._verifier = Verifier(self._hashing)
        self._gossip = Gossip(self._store, self._database, announcer)
        self._metrics = AuthMetrics(registry)
        self._writes: set[asyncio.Task[object]] = set()

    async def start(self) -> None:
        """A database that is away is waited for, call by call."""
        try:
            await self.check()
        except StoreError as error:
            _log.warning("store_away", error=str(error), next="calls are refused with UNAVAILABLE until it is back")
        self._gossip.start()

    async def stop(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes)
        await self._gossip.stop()
        self._hashing.close()
        self._database.close()

    async def check(self) -> None:
        """For readiness. Raises StoreError when tokens cannot be looked up, and LaneFull."""
        await self._database.run(self._store.check)

    def add_to_server(self, server: aio.Server) -> None:
        auth_pb2_grpc.add_AuthServiceServicer_to_server(self, server)

    @override
    async def ValidateToken(self, request: pb.ValidateTokenRequest, context: Context) -> pb.ValidateTokenResponse:
        return await self._answer("ValidateToken", context, partial(self._validate_token, request))

    @override
    async def ValidateAgent(self, request: pb.ValidateAgentRequest, context: Context) -> pb.ValidateAgentResponse:
        return await self._answer("ValidateAgent", context, partial(self._validate_agent, request, context))

    @override
    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenResponse:
        return await self._answer("CreateToken", context, partial(self._create_token, request, context))

    @override
    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> Empty:
        return await self._answer("RevokeToken", context, partial(self._revoke_token, request, context))

    @override
    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensResponse:
        return await self._answer("ListTokens", context, partial(self._list_tokens, request, context))

    async def _answer(self, method: str, context: Context, work: Callable[[_Call], Awaitable[M]]) -> M:
        """The one place where failures become status codes, and calls are counted."""
        began = time.perf_counter()
        call = _started(method, context)
        code, reason = grpc.StatusCode.CANCELLED, ""
        try:
            answer = await work(call)
        except InvalidValue as error:
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except _Unauthenticated as error:
            code, reason = grpc.StatusCode.UNAUTHENTICATED, _NOT_VALID
            self._refused(call, error)
        except _Denied as error:
            code, reason = grpc.StatusCode.PERMISSION_DENIED, str(error)
        except NoSuch as error:
            code, reason = grpc.StatusCode.NOT_FOUND, str(error)
        except LaneFull:
            code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, _BUSY
        except StoreError as error:
            code, reason = grpc.StatusCode.UNAVAILABLE, _AWAY
            _log.warning("call_failed", method=method, request_id=call.request_id, error=str(error))
        except HashUnusable as error:
            code, reason = grpc.StatusCode.UNAVAILABLE, _AWAY
            _log.error("call_failed", method=method, request_id=call.request_id, error=str(error))
        except Exception:  # noqa: BLE001 (the edge: a bug ends one call, not the server)
            code, reason = grpc.StatusCode.INTERNAL, "internal error"
            _log.exception("call_failed_by_a_bug", method=method, request_id=call.request_id)
        else:
            code = grpc.StatusCode.OK
            return answer
        finally:
            self._metrics.requests.labels(method, code.name).inc()
            self._metrics.seconds.labels(method).observe(time.perf_counter() - began)
            call.span.set_attribute(_CODE_ATTRIBUTE, code.value[0])
            call.span.end()
        await context.abort(code, reason)
        raise AssertionError("abort raises")

    def _refused(self, call: _Call, error: _Unauthenticated) -> None:
        self._metrics.refusals[error.refusal].inc()
        # Of a token that is nobody's there is nothing to say, and there may be a flood of them.
        if error.token is not None:
            _log.info(
                "token_refused",
                reason=error.refusal,
                token_id=error.token.id,
                org_id=error.token.org_id,
                request_id=call.request_id,
            )

    async def _validate_token(self, request: pb.ValidateTokenRequest, call: _Call) -> pb.ValidateTokenResponse:
        plaintext = request.access_token
        prefix = _prefix_of(plaintext)
        found = await self._database.run(lambda: self._store.token_by_prefix(prefix))
        token = await self._proven(found, plaintext, call)
        return pb.ValidateTokenResponse(
            org_id=token.org_id,
            permissions=token.permissions,
            agent_id=token.agent_id,
            user_id=token.user_id,
            token_id=token.id,
            expires_at=_timestamp(token.expires_at),
        )

    async def _validate_agent(
        self, request: pb.ValidateAgentRequest, context: Context, call: _Call
    ) -> pb.ValidateAgentResponse:
        plaintext = _bearer(context)
        prefix = _prefix_of(plaintext)
        org_id, agent_id = parse_uuid(request.org_id, "org_id"), parse_uuid(request.agent_id, "agent_id")
        found, status = await self._database.run(lambda: self._store.token_and_agent(prefix, org_id, agent_id))
        token = await self._proven(found, plaintext, call)
        if token.org_id != org_id or token.agent_id not in {None, agent_id} or status is None:
            raise _Denied(_NOT_AUTHORIZED)
        if status is not AgentStatus.ACTIVE:
            raise _Denied(f"{_NOT_ACTIVE}: it is {status}")
        return pb.ValidateAgentResponse(agent_id=agent_id, org_id=org_id, status=status)

    async def _create_token(
        self, request: pb.CreateTokenRequest, context: Context, call: _Call
    ) -> pb.CreateTokenResponse:
        await self._admin(request.org_id, context, call)
        if request.type not in {pb.TOKEN_TYPE_UNSPECIFIED, pb.TOKEN_TYPE_PAT}:
            raise InvalidValue("type is not TOKEN_TYPE_PAT")
        if request.permissions & Permission.TOKEN_ADMIN:
            raise InvalidValue("permissions hold the right to manage tokens, which `extproc token create` alone gives")
        make = partial(
            new_token,
            id=str(uuid_utils.uuid7()),
            now=self._now(),
            org_id=request.org_id,
            name=request.name,
            description=request.description,
            permissions=request.permissions,
            agent_id=request.agent_id,
            user_id=request.user_id,
            expires_at=_datetime(request.expires_at) if request.HasField("expires_at") else None,
            hash_of=hash_token,
        )
        token, plaintext = await self._hashing.run(make)
        await self._write(self._database.run(lambda: self._store.add_token(token)))
        _log.info("token_created", token_id=token.id, org_id=token.org_id, request_id=call.request_id)
        return pb.CreateTokenResponse(
            token_id=token.id, plaintext=plaintext, prefix=token.prefix, created_at=_timestamp(token.created_at)
        )

    async def _revoke_token(self, request: pb.RevokeTokenRequest, context: Context, call: _Call) -> Empty:
        await self._admin(request.org_id, context, call)
        org_id, token_id = parse_uuid(request.org_id, "org_id"), parse_uuid(request.token_id, "token_id")
        reason = parse_reason(request.revoke_reason)
        heard = await self._write(self._revoke(org_id, token_id, reason))
        context.set_trailing_metadata(((_REVOCATION_METADATA, heard),))
        _log.info("token_revoked", token_id=token_id, org_id=org_id, gates_told=heard, request_id=call.request_id)
        return Empty()

    async def _revoke(self, org_id: str, token_id: str, reason: str | None) -> str:
        now = self._now()
        revoked_at = await self._database.run(lambda: self._store.revoke_token(org_id, token_id, reason, now))
        return await self._gossip.revoked(org_id, token_id, revoked_at)

    async def _list_tokens(self, request: pb.ListTokensRequest, context: Context, call: _Call) -> pb.ListTokensResponse:
        await self._admin(request.org_id, context, call)
        if request.limit < 0:
            raise InvalidValue("limit is below 0")
        org_id = parse_uuid(request.org_id, "org_id")
        after = parse_uuid(request.cursor, "cursor") if request.cursor else ""
        limit = min(request.limit or _DEFAULT_LISTED, _MOST_LISTED)
        found = await self._database.run(lambda: self._store.tokens(org_id, limit + 1, after))
        page = found[:limit]
        return pb.ListTokensResponse(
            tokens=[_described(token) for token in page], next_cursor=page[-1].id if len(found) > limit else ""
        )

    async def _proven(self, token: Token | None, plaintext: str, call: _Call) -> Token:
        """The token, once its secret is the caller's and it may be used now. Raises _Unauthenticated."""
        if token is None:
            raise _Unauthenticated(Refusal.UNKNOWN)
        if refusal := refusal_of(token, self._now()):
            raise _Unauthenticated(refusal, token)
        if not await self._verifier.is_genuine(token, plaintext):
            raise _Unauthenticated(Refusal.WRONG_SECRET, token)
        call.span.set_attributes({names.ORG_ATTRIBUTE: token.org_id, names.TOKEN_ID_ATTRIBUTE: token.id})
        return token

    async def _admin(self, org_id: str, context: Context, call: _Call) -> None:
        """The caller may manage the tokens of the organisation. Raises _Unauthenticated or _Denied."""
        plaintext = _bearer(context)
        prefix = _prefix_of(plaintext)
        found = await self._database.run(lambda: self._store.token_by_prefix(prefix))
        token = await self._proven(found, plaintext, call)
        # An organisation that is no UUID is nobody's.
        if token.org_id != org_id.lower() or not token.permissions & Permission.TOKEN_ADMIN:
            raise _Denied(_NOT_ADMIN)

    async def _write(self, work: Awaitable[T]) -> T:
        """`work` to its end, also when the caller goes away: what is written must be told."""
        task = asyncio.ensure_future(work)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)


def _started(method: str, context: Context) -> _Call:
    """Ids of the call's metadata, and a span below the caller's."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    given = metadata.get(names.REQUEST_ID_HEADER, "")
    request_id = given if _REQUEST_ID.fullmatch(given) else ""
    span = _tracer.start_span(
        f"auth.{method}", context=parent_of([metadata.get("traceparent")]), kind=trace.SpanKind.SERVER
    )
    if request_id:
        span.set_attribute(names.REQUEST_ID_ATTRIBUTE, request_id)
    return _Call(method, request_id, span)


def _bearer(context: Context) -> str:
    """The caller's token. Raises _Unauthenticated when there is none, or more than one."""
    given = {value for key, value in context.invocation_metadata() or () if key == "authorization"}
    if len(given) != 1:
        raise _Unauthenticated(Refusal.MALFORMED if given else Refusal.MISSING)
    value = given.pop()
    scheme, _, plaintext = (value if isinstance(value, str) else "").partition(" ")
    if scheme.lower() != "bearer":
        raise _Unauthenticated(Refusal.MALFORMED)
    return plaintext.strip()


def _prefix_of(plaintext: str) -> str:
    prefix = split(plaintext)
    if prefix is None:
        raise _Unauthenticated(Refusal.MALFORMED if plaintext else Refusal.MISSING)
    return prefix


def _described(token: Token) -> pb.TokenMetadata:
    return pb.TokenMetadata(
        token_id=token.id,
        name=token.name,
        prefix=token.prefix,
        permissions=token.permissions,
        expires_at=_timestamp(token.expires_at),
        created_at=_timestamp(token.created_at),
        revoked_at=_timestamp(token.revoked_at),
        is_revoked=token.revoked_at is not None,
    )


def _timestamp(at: datetime | None) -> Timestamp | None:
    if at is None:
        return None
    made = Timestamp()
    made.FromDatetime(at)
    return made


def _datetime(at: Timestamp) -> datetime:
    """Raises InvalidValue."""
    try:
        return at.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise InvalidValue("expires_at is no time from year 1 to 9999") from None
