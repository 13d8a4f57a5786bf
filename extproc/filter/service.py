"""The gRPC side of the conversation: decodes Envoy's messages, performs the exchange's effects, encodes its replies.

All decisions are in `extproc.filter.exchange`. Messages of one stream are answered one after the other, each exactly
once, of whatever kind, and nothing a client sends may end a stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import grpc
import grpc.aio
import structlog
import uuid_utils
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.message import DecodeError
from ibex.context.v1 import context_pb2
from opentelemetry.trace import SpanContext

from extproc.chat import Placement
from extproc.context.client import EngineClient, EngineFailure
from extproc.filter import exchange as ex
from extproc.filter import wire
from extproc.filter.identity import IdentitySources
from extproc.filter.outcome import Outcome
from extproc.filter.report import Report, WriteLine, count_local_reply
from extproc.telemetry import metrics
from extproc.telemetry.spans import traceparent_of

if TYPE_CHECKING:
    from extproc.directives.client import LookUp

__all__ = ["SERVICE_NAME", "ContextProcessor", "DirectiveSource"]

SERVICE_NAME = "envoy.service.ext_proc.v3.ExternalProcessor"

PLACEMENT_METADATA = "x-ibex-placement"
"""gRPC initial metadata that a route's `grpc_initial_metadata` sets: another placement for this route."""
MEMORY_METADATA = "x-ibex-memory"
"""Likewise: `off` leaves this route without memory."""

_REPLY_RESERVE_MS = 2.0
"""Kept back from the engine for the splice and the reply: both take under 1 ms at 5 MB, and the loop has other work."""
_MIN_ENGINE_MS = 1.0
"""With less left there is no point in asking."""

_FAILURES = {
    EngineFailure.TIMEOUT: Outcome.TIMEOUT,
    EngineFailure.UNAVAILABLE: Outcome.ENGINE_UNAVAILABLE,
    EngineFailure.ERROR: Outcome.ENGINE_ERROR,
}

ServicerContext: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
InitialMetadata: TypeAlias = dict[str, str | bytes]

_log = structlog.get_logger("extproc.filter")


class DirectiveSource(Protocol):
    """`extproc.directives.client.Directives`. Nothing here raises but CancelledError."""

    def prepare(self, org_id: str, agent_id: str) -> None:
        """Begin to look for it, so that it is at hand when it is needed."""
        ...

    def at_hand(self, org_id: str, agent_id: str) -> LookUp | None:
        """What can be said without waiting; None: await `look_up`."""
        ...

    async def look_up(self, org_id: str, agent_id: str) -> LookUp:
        """Within the directive's share of the budget."""
        ...


class ContextProcessor:
    """Role *context*: one instance serves every stream of the process and keeps nothing between them."""

    def __init__(
        self,
        engine: EngineClient,
        policy: ex.Policy,
        identities: IdentitySources,
        budget_ms: float,
        write_line: WriteLine = lambda _line: None,
        directives: DirectiveSource | None = None,
    ) -> None:
        """`directives`: there, if the policy says that there are any."""
        self._policy = policy
        self._directives = directives
        self._engine = engine
        self._identities = identities
        self._budget_ms = budget_ms
        self._write_line = write_line
        self._wanted_headers = ex.REQUEST_HEADERS | identities.header_names | {"traceparent"}

    def add_to_server(self, server: grpc.aio.Server) -> None:
        # Bytes both ways: a message that cannot be decoded is ours to answer, not grpcio's to raise.
        process: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self.process)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process}),))

    async def process(self, _requests: object, context: ServicerContext) -> None:
        """One stream: one HTTP request and its answer."""
        message = await _read(context)
        if message is not None and wire.is_response_headers(message):
            await _pass_local_reply(context)
            return
        initial = dict(context.invocation_metadata() or ())
        exchange = ex.Exchange(self._policy_of(initial), _mint_session_id)
        report = Report([str(initial.get("traceparent", ""))])
        try:
            while message is not None:
                await context.write(await self._answer(exchange, report, message))
                message = await _read(context)
        finally:
            for effect in exchange.receive(ex.StreamEnded()):
                if isinstance(effect, ex.Record):
                    report.finish(exchange, effect, self._write_line)

    def _policy_of(self, initial: InitialMetadata) -> ex.Policy:
        """What the route says wins; a value that is none of ours is ignored and the installation's policy holds."""
        policy = self._policy
        if (placement := initial.get(PLACEMENT_METADATA)) in tuple(Placement):
            policy = replace(policy, placement=Placement(str(placement)))
        if initial.get(MEMORY_METADATA) == "off":
            policy = replace(policy, is_enabled=False)
        return policy

    async def _answer(self, exchange: ex.Exchange, report: Report, raw: bytes) -> bytes:
        """The one reply to one message."""
        report.arrived()
        kind = None
        try:
            message = ext_proc.ProcessingRequest.FromString(raw)
            kind = message.WhichOneof("request")
            effects = exchange.receive(self._event_of(kind, message, report))
            if self._directives is not None:
                effects = await self._find_directive(self._directives, effects, exchange, report)
            if isinstance(order := effects[-1], ex.Assemble):
                effects = exchange.receive(await self._assemble(order, report))
            return self._reply(kind, effects, exchange, report)
        except DecodeError:
            # Strings in protobuf are UTF-8; dynamic metadata made from a header may hold other bytes. Of what kind the
            # message was cannot be known, so the reply is empty and Envoy goes on without us.
            _log.warning("a message of Envoy's cannot be decoded; the request goes on unchanged")
            return self._reply(None, exchange.receive(ex.Failed()), exchange, report)
        except Exception:  # noqa: BLE001 - the driver's one broad catch: a bug of ours must not cost a request
            _log.exception("a bug; this request goes on unchanged", kind=kind, request_id=report.request_id)
            return self._reply(kind, exchange.receive(ex.Failed()), exchange, report)

    def _event_of(self, kind: str | None, message: ext_proc.ProcessingRequest, report: Report) -> ex.Event:
        match kind:
            case "request_headers":
                headers = wire.read_headers(message.request_headers, self._wanted_headers)
                report.request_id = ex.readable_request_id(headers)
                report.add_traceparent(headers.get("traceparent", ""))
                identity = self._identities.identify(
                    headers.get, lambda namespace, path: wire.metadata_text(message, namespace, path)
                )
                return ex.RequestHeaders(headers, identity, message.request_headers.end_of_stream)
            case "request_body":
                return ex.RequestBody(message.request_body.body)
            case "response_headers":
                return ex.ResponseHeaders(wire.read_status(message.response_headers))
            case _:
                return ex.OtherMessage()

    async def _find_directive(
        self, directives: DirectiveSource, effects: list[ex.Effect], exchange: ex.Exchange, report: Report
    ) -> list[ex.Effect]:
        """What the exchange orders once it knows the directive; anything else comes back as it is."""
        match effects[0]:
            case ex.PrepareDirective(identity=identity):
                directives.prepare(identity.org_id, identity.agent_id)
                return effects
            case ex.LookUpDirective(identity=identity):
                report.parse_ms = report.elapsed_ms()
                found = directives.at_hand(identity.org_id, identity.agent_id)
                if found is None:
                    found = await directives.look_up(identity.org_id, identity.agent_id)
                report.directive, report.directive_ms = found.source, report.elapsed_ms() - report.parse_ms
                return exchange.receive(ex.DirectiveKnown(found.directive))
            case _:
                return effects

    async def _assemble(self, order: ex.Assemble, report: Report) -> ex.Assembled | ex.NotAssembled:
        asked_ms = report.elapsed_ms()
        report.parse_ms = asked_ms - report.directive_ms
        left_ms = self._budget_ms - asked_ms - _REPLY_RESERVE_MS
        if left_ms < _MIN_ENGINE_MS:
            return ex.NotAssembled(Outcome.TIMEOUT)
        span = report.start_span()
        answer = await self._engine.assemble(_engine_request(order, span), left_ms / 1e3, traceparent_of(span))
        report.engine_ms = report.elapsed_ms() - asked_ms
        metrics.ENGINE_SECONDS.observe(report.engine_ms / 1e3)
        if isinstance(answer, EngineFailure):
            return ex.NotAssembled(_FAILURES[answer])
        if report.elapsed_ms() > self._budget_ms:
            # The answer was in time, and this loop was not.
            return ex.NotAssembled(Outcome.TIMEOUT)
        report.answer = answer
        return ex.Assembled(answer.text, answer.memories, answer.tokens)

    def _reply(self, kind: str | None, effects: list[ex.Effect], exchange: ex.Exchange, report: Report) -> bytes:
        record = effects[0] if isinstance(effects[0], ex.Record) else None
        metadata = report.metadata(exchange, record) if record else None
        match effects[-1]:
            case ex.Forward(body=bytes() as body, content_length=content_length):
                reply = wire.replace_body(body, content_length, metadata)
            case ex.SetResponseHeaders(headers=headers):
                reply = wire.set_response_headers(headers, metadata)
            case _:
                reply = wire.unchanged(kind, metadata)
        if record:
            report.finish(exchange, record, self._write_line)
        return reply


async def _read(context: ServicerContext) -> bytes | None:
    """None: Envoy sends no more."""
    message = await context.read()
    return None if message is grpc.aio.EOF else message  # type: ignore[comparison-overlap, redundant-expr]  # stub's gap


async def _pass_local_reply(context: ServicerContext) -> None:
    """A stream without a request: most often the gate's 401. Strangers can have any number of them, so each is to cost
    as little as can be: a count, and no line, for the access log and the gate's own have one. The stream ends with its
    one reply, since Envoy shows nothing else of an answer."""
    count_local_reply()
    await context.write(wire.LOCAL_REPLY)


def _mint_session_id() -> str:
    return str(uuid_utils.uuid7())


def _engine_request(order: ex.Assemble, span: SpanContext) -> context_pb2.AssembleContextRequest:
    request, identity = order.request, order.identity
    return context_pb2.AssembleContextRequest(
        agent_id=identity.agent_id,
        org_id=identity.org_id,
        user_id=identity.user_id or "",
        session_id=order.session_id,
        query=request.query,
        # An engine refuses an empty model; a request without one is the provider's to refuse.
        model=order.model or "unknown",
        directive_version_id=order.directive_version_id,
        available_tokens=order.available_tokens,
        recent_messages=[context_pb2.Message(role=message.role, content=message.text) for message in request.recent],
        request_id=order.request_id,
        trace_id=f"{span.trace_id:032x}" if span.is_valid else "",
        span_id=f"{span.span_id:016x}" if span.is_valid else "",
    )
