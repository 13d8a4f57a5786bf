"""The gRPC side of the gate: decodes Envoy's question, performs what the passage orders, encodes the answer.

All decisions are in `extproc.gate.passage`. Whatever goes wrong here is a 503: nothing but an `Allow` lets a request
pass, and Envoy itself is closed when no answer comes at all.
"""

from __future__ import annotations

import re
from typing import TypeAlias

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from extproc import names
from extproc.gate import glance, wire
from extproc.gate import passage as ps
from extproc.gate.auth_client import Caller
from extproc.gate.credential import secret_parameters
from extproc.gate.limiter import RateLimiter
from extproc.gate.principals import Principals, digest_of
from extproc.gate.repeats import Repeat, Repeats, repeat_key
from extproc.gate.report import Report, WriteLine
from extproc.gate.verdict import DEGRADED
from extproc.redis.link import LinkProblem

__all__ = ["SERVICE_NAME", "Authorizer"]

SERVICE_NAME = "envoy.service.auth.v3.Authorization"

_REQUEST_ID = re.compile(r"[!-~]{1,64}")
"""A client may write what it likes there, and it goes into logs and onto the auth service."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_WANTED_HEADERS = ps.REQUEST_HEADERS | {wire.ADDRESS_HEADER, "traceparent"}
_DECIDING_NAMES = frozenset(name.encode() for name in ps.DECIDING_HEADERS)
_NOT_LIMITED = ps.NotLimited()

ServicerContext: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

_log = structlog.get_logger("extproc.gate")


class Authorizer:
    """One instance answers every check of the process."""

    def __init__(
        self,
        principals: Principals,
        limiter: RateLimiter | None,
        *,
        denies_uncounted: bool,
        is_traced: bool = False,
        write_line: WriteLine = lambda _line: None,
    ) -> None:
        """No `limiter`: any number of requests. `is_traced`: somebody takes spans."""
        self._principals = principals
        self._limiter = limiter
        self._denies_uncounted = denies_uncounted
        self._is_traced = is_traced
        self._write_line = write_line
        self._repeats = Repeats()

    def add_to_server(self, server: grpc.aio.Server) -> None:
        # Bytes both ways: a message that cannot be decoded is ours to answer, not grpcio's to raise.
        check: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self.check)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Check": check}),))

    async def check(self, raw: bytes, context: ServicerContext) -> bytes:
        report = Report()
        try:
            # Spans take more of a question than is cut out of it.
            sight = None if self._is_traced else glance.cut(raw, _DECIDING_NAMES)
            key = None if sight is None else repeat_key(sight.headers)
            if sight is not None and key is not None and (admitted := self._admitted_before(key)) is not None:
                path = sight.path
                verdict = admitted.settle(
                    await self._count(admitted.claims.org_id, admitted.agent_id),
                    denies_uncounted=self._denies_uncounted,
                )
                if isinstance(verdict, ps.Deny):
                    report.request_id = _readable_request_id(wire.read_request(raw, _WANTED_HEADERS))
            else:
                request = wire.read_request(raw, _WANTED_HEADERS)
                path = request.path
                report.request_id = _readable_request_id(request)
                if self._is_traced:
                    report.traceparent = _traceparent(request, context)
                verdict = await self._decide(request, report, context, key)
            if isinstance(verdict, ps.Allow):
                secrets = secret_parameters(path) if "?" in path else ()
                reply = wire.allow(verdict, round(report.elapsed_ms(), 3), secrets)
                report.finish(verdict, self._write_line)
                return reply
        except DecodeError:
            _log.warning("a question of Envoy's cannot be decoded; the request is refused")
            verdict = ps.Deny(DEGRADED)
        except Exception:  # noqa: BLE001 - the driver's one broad catch: a bug of ours closes the gate
            _log.exception("a bug; this request is refused", request_id=report.request_id)
            verdict = ps.Deny(DEGRADED)
        report.finish(verdict, self._write_line)
        return wire.deny(verdict, report.request_id, round(report.elapsed_ms(), 3))

    def _admitted_before(self, key: bytes) -> ps.Admitted | None:
        """What the passage would find out once more: the caches still say what it was told."""
        repeat = self._repeats.get(key)
        if repeat is None:
            return None
        admitted = repeat.admitted
        is_known = self._principals.are_known(repeat.digest, admitted.claims, admitted.agent_id)
        return admitted if is_known else None

    async def _decide(
        self, request: wire.CheckedRequest, report: Report, context: ServicerContext, key: bytes | None
    ) -> ps.Allow | ps.Deny:
        """`key`: of the headers, to find the passage's findings by; None: they are not kept."""
        principals = self._principals
        passage = ps.Passage(denies_uncounted=self._denies_uncounted)
        effect = passage.receive(ps.Arrived(request.headers))
        digest = b""
        while True:
            match effect:
                case ps.NeedToken():
                    digest = digest_of(effect.token)
                    if (claims := principals.known_claims(digest)) is not None:
                        effect = passage.receive(ps.TokenChecked(claims, True))
                        continue
                    caller = _caller(request, report, context)
                    found = await principals.ask_claims(effect.token, digest, request.address, caller)
                    effect = passage.receive(ps.TokenChecked(found))
                case ps.NeedAgent():
                    verdict = principals.known_agent(digest, effect.agent_id)
                    if verdict is None:
                        caller = _caller(request, report, context)
                        verdict = await principals.ask_agent(
                            effect.token, digest, effect.org_id, effect.agent_id, caller
                        )
                    effect = passage.receive(ps.AgentChecked(verdict))
                case ps.Count():
                    admitted = passage.admitted
                    if key is not None and admitted is not None and admitted.is_cached:
                        self._repeats.put(key, Repeat(digest, admitted))
                    effect = passage.receive(await self._count(effect.org_id, effect.agent_id))
                case ps.Allow() | ps.Deny():
                    return effect

    async def _count(self, org_id: str, agent_id: str) -> ps.Counted | ps.NotLimited | ps.LimiterDown:
        if self._limiter is None:
            return _NOT_LIMITED
        counted = await self._limiter.count(org_id, agent_id)
        if isinstance(counted, LinkProblem):
            return ps.LimiterDown()
        return _NOT_LIMITED if counted is None else ps.Counted(counted)


def _readable_request_id(request: wire.CheckedRequest) -> str:
    sent = request.headers.get(names.REQUEST_ID_HEADER, "")
    return sent if _REQUEST_ID.fullmatch(sent) else ""


def _caller(request: wire.CheckedRequest, report: Report, context: ServicerContext) -> Caller:
    return Caller(report.request_id, report.traceparent or _traceparent(request, context))


def _traceparent(request: wire.CheckedRequest, context: ServicerContext) -> str:
    """Envoy's own, which it sends beside its question, else the client's; empty without a well-formed one."""
    sent = dict(context.invocation_metadata() or ()).get("traceparent") or request.headers.get("traceparent", "")
    return str(sent) if _TRACEPARENT.fullmatch(str(sent)) else ""
