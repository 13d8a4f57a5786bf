"""The gRPC side of the conversation: decodes Envoy's messages, performs the exchange's effects, encodes its replies.

All decisions are in `extproc.filter.exchange`; the budget's clock is here. Messages of one stream are answered one
after the other, each exactly once, of whatever kind, and nothing a client sends may end a stream.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeAlias

import grpc
import grpc.aio
import structlog
import uuid_utils
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf import struct_pb2
from ibex.context.v1 import context_pb2
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue

from extproc import names
from extproc.chat import Placement
from extproc.context.client import EngineAnswer, EngineClient, EngineFailure
from extproc.filter import exchange as ex
from extproc.filter import wire
from extproc.filter.identity import IdentitySources
from extproc.filter.outcome import Outcome
from extproc.telemetry import metrics
from extproc.telemetry.spans import parent_of, traceparent_of

__all__ = ["SERVICE_NAME", "ContextProcessor"]

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

ServicerContext: TypeAlias = grpc.aio.ServicerContext[ext_proc.ProcessingRequest, ext_proc.ProcessingResponse]
InitialMetadata: TypeAlias = dict[str, str | bytes]

_log = structlog.get_logger("extproc.filter")
_tracer = trace.get_tracer("extproc.filter")
_count_outcome = {outcome: metrics.REQUESTS.labels(outcome=outcome.value) for outcome in Outcome}


class ContextProcessor:
    """Role *context*: one instance serves every stream of the process and keeps nothing between them."""

    def __init__(self, engine: EngineClient, policy: ex.Policy, identities: IdentitySources, budget_ms: float) -> None:
        self._engine = engine
        self._policy = policy
        self._identities = identities
        self._budget_ms = budget_ms

    def add_to_server(self, server: grpc.aio.Server) -> None:
        process = grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=ext_proc.ProcessingRequest.FromString,
            response_serializer=ext_proc.ProcessingResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process}),))

    async def process(self, _requests: object, context: ServicerContext) -> None:
        """One stream: one HTTP request and its answer."""
        initial = dict(context.invocation_metadata() or ())
        exchange = ex.Exchange(self._policy_of(initial), _mint_session_id)
        conversation = _Conversation(exchange, self._engine, self._identities, self._budget_ms, initial)
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                await context.write(await conversation.answer(message))
        finally:
            conversation.end()

    def _policy_of(self, initial: InitialMetadata) -> ex.Policy:
        """What the route says wins; a value that is none of ours is ignored and the installation's policy holds."""
        policy = self._policy
        if (placement := initial.get(PLACEMENT_METADATA)) in tuple(Placement):
            policy = replace(policy, placement=Placement(str(placement)))
        if initial.get(MEMORY_METADATA) == "off":
            policy = replace(policy, is_enabled=False)
        return policy


def _mint_session_id() -> str:
    return str(uuid_utils.uuid7())


class _Conversation:
    """One stream: the exchange, and what the driver has to know besides: clocks, the span, the log line."""

    __slots__ = (
        "_answer",
        "_arrived",
        "_budget_ms",
        "_engine",
        "_engine_ms",
        "_exchange",
        "_identities",
        "_parse_ms",
        "_request_id",
        "_span",
        "_traceparents",
    )

    def __init__(
        self,
        exchange: ex.Exchange,
        engine: EngineClient,
        identities: IdentitySources,
        budget_ms: float,
        initial: InitialMetadata,
    ) -> None:
        self._exchange = exchange
        self._engine = engine
        self._identities = identities
        self._budget_ms = budget_ms
        self._traceparents = [str(initial.get("traceparent", ""))]
        self._request_id = ""
        self._arrived = 0.0
        """`time.perf_counter` at the last message."""
        self._parse_ms = 0.0
        self._engine_ms = 0.0
        self._answer: EngineAnswer | None = None
        self._span: Span | None = None

    async def answer(self, message: ext_proc.ProcessingRequest) -> ext_proc.ProcessingResponse:
        """The one reply to one message."""
        self._arrived = time.perf_counter()
        kind = message.WhichOneof("request")
        try:
            effects = self._exchange.receive(self._event_of(kind, message))
            if effects and isinstance(assemble := effects[-1], ex.Assemble):
                effects = self._exchange.receive(await self._assemble(assemble))
            return self._reply(kind, effects)
        except Exception:  # noqa: BLE001 - the driver's one broad catch: a bug of ours must not cost a request
            _log.exception(
                "bug while handling a message; the request goes on unchanged", kind=kind, request_id=self._request_id
            )
            return self._reply(kind, self._exchange.receive(ex.Failed()))

    def end(self) -> None:
        """Envoy closed the stream; counts the request when nothing had been decided yet."""
        for effect in self._exchange.receive(ex.StreamEnded()):
            if isinstance(effect, ex.Record):
                self._report(effect)

    def _event_of(self, kind: str | None, message: ext_proc.ProcessingRequest) -> ex.Event:
        match kind:
            case "request_headers":
                headers = wire.header_map(message.request_headers)
                self._request_id = headers.get(names.REQUEST_ID_HEADER, "")
                self._traceparents.append(headers.get("traceparent", ""))
                identity = self._identities.identify(
                    headers.get, lambda namespace, path: wire.metadata_text(message, namespace, path)
                )
                return ex.RequestHeaders(headers, identity, message.request_headers.end_of_stream)
            case "request_body":
                return ex.RequestBody(message.request_body.body)
            case "response_headers":
                return ex.ResponseHeaders(wire.header_map(message.response_headers).get(":status", ""))
            case _:
                return ex.OtherMessage()

    async def _assemble(self, order: ex.Assemble) -> ex.Assembled | ex.NotAssembled:
        asked = time.perf_counter()
        self._parse_ms = (asked - self._arrived) * 1e3
        left_ms = self._budget_ms - self._parse_ms - _REPLY_RESERVE_MS
        if left_ms < _MIN_ENGINE_MS:
            return ex.NotAssembled(Outcome.TIMEOUT)
        span = self._start_span()
        answer = await self._engine.assemble(
            _engine_request(order, span), left_ms / 1e3, traceparent_of(span.get_span_context())
        )
        self._engine_ms = (time.perf_counter() - asked) * 1e3
        metrics.ENGINE_SECONDS.observe(self._engine_ms / 1e3)
        if isinstance(answer, EngineFailure):
            return ex.NotAssembled(_FAILURES[answer])
        self._answer = answer
        return ex.Assembled(answer.text, answer.memories, answer.tokens)

    def _start_span(self) -> Span:
        now_ns = time.time_ns()
        started_ns = now_ns - int((time.perf_counter() - self._arrived) * 1e9)
        self._span = _tracer.start_span(
            "context.assemble", parent_of(self._traceparents), SpanKind.CLIENT, start_time=started_ns
        )
        return self._span

    def _reply(self, kind: str | None, effects: list[ex.Effect]) -> ext_proc.ProcessingResponse:
        record = next((effect for effect in effects if isinstance(effect, ex.Record)), None)
        metadata = self._metadata(record) if record else None
        match effects[-1]:
            case ex.Forward(body=bytes() as body, content_length=content_length):
                reply = wire.replace_body(body, content_length, metadata)
            case ex.SetResponseHeaders(headers=headers):
                reply = wire.set_response_headers(headers, metadata)
            case _:
                reply = wire.unchanged(kind, metadata)
        if record:
            self._report(record)
        return reply

    def _metadata(self, record: ex.Record) -> struct_pb2.Struct:
        """What the access log shows and the observer takes over, as dynamic metadata `ibex.context`."""
        exchange = self._exchange
        values: dict[str, str | float | bool] = {
            "outcome": record.outcome.value,
            "memories": record.memories,
            "tokens": record.tokens,
            "fallback": record.outcome.is_fallback,
            "session_id": exchange.session_id,
            "assemble_ms": self._elapsed_ms(),
            "engine_ms": round(self._engine_ms, 3),
        }
        if exchange.chat_format:
            values |= {"chat_format": exchange.chat_format, "model": exchange.model}
        if identity := exchange.identity:
            values |= {"org_id": identity.org_id, "agent_id": identity.agent_id, "user_id": identity.user_id or ""}
        return wire.metadata_struct(names.CONTEXT_METADATA, values)

    def _elapsed_ms(self) -> float:
        return round((time.perf_counter() - self._arrived) * 1e3, 3)

    def _report(self, record: ex.Record) -> None:
        """One count, one span and one line for each request."""
        filter_ms = self._elapsed_ms()
        _count_outcome[record.outcome].inc()
        metrics.FILTER_SECONDS.observe(filter_ms / 1e3)
        if record.outcome is Outcome.INJECTED:
            metrics.INJECTED_TOKENS.observe(record.tokens)
        exchange = self._exchange
        if exchange.chat_format:
            self._end_span(record, filter_ms)
        identity = exchange.identity
        _log.info(
            "request",
            outcome=record.outcome.value,
            request_id=self._request_id,
            session_id=exchange.session_id,
            org_id=identity.org_id if identity else None,
            agent_id=identity.agent_id if identity else None,
            chat_format=exchange.chat_format,
            memories=record.memories,
            tokens=record.tokens,
            parse_ms=round(self._parse_ms, 3),
            engine_ms=round(self._engine_ms, 3),
            filter_ms=filter_ms,
        )

    def _end_span(self, record: ex.Record, filter_ms: float) -> None:
        span = self._span or self._start_span()
        if span.is_recording():
            exchange, identity, answer = self._exchange, self._exchange.identity, self._answer
            attributes: dict[str, AttributeValue] = {
                names.GEN_AI_OPERATION_NAME: "retrieval",
                names.GEN_AI_DATA_SOURCE_ID: "ibex.memory",
                names.GEN_AI_REQUEST_MODEL: exchange.model,
                names.GEN_AI_CONVERSATION_ID: exchange.session_id,
                names.REQUEST_ID_ATTRIBUTE: self._request_id,
                names.OUTCOME_ATTRIBUTE: record.outcome.value,
                names.MEMORIES_INCLUDED_ATTRIBUTE: record.memories,
                names.CONTEXT_TOKENS_ATTRIBUTE: record.tokens,
                "ibex.stage.parse_ms": self._parse_ms,
                "ibex.stage.engine_ms": self._engine_ms,
                "ibex.stage.total_ms": filter_ms,
            }
            if identity is not None:
                attributes[names.ORG_ATTRIBUTE] = identity.org_id
                attributes[names.GEN_AI_AGENT_ID] = identity.agent_id
            if answer is not None:
                attributes[names.CANDIDATES_ATTRIBUTE] = answer.candidates
                attributes[names.MEMORY_IDS_ATTRIBUTE] = [hit.id for hit in answer.hits]
                attributes[names.MEMORY_SCORES_ATTRIBUTE] = [hit.score for hit in answer.hits]
            span.set_attributes(attributes)
            if record.outcome.is_fallback:
                span.set_status(StatusCode.ERROR, record.outcome.value)
        span.end()


def _engine_request(order: ex.Assemble, span: Span) -> context_pb2.AssembleContextRequest:
    context = span.get_span_context()
    request, identity = order.request, order.identity
    return context_pb2.AssembleContextRequest(
        agent_id=identity.agent_id,
        org_id=identity.org_id,
        user_id=identity.user_id or "",
        session_id=order.session_id,
        query=request.query,
        # An engine refuses an empty model; a request without one is the provider's to refuse.
        model=request.model or "unknown",
        available_tokens=order.available_tokens,
        recent_messages=[context_pb2.Message(role=message.role, content=message.text) for message in request.recent],
        request_id=order.request_id,
        trace_id=f"{context.trace_id:032x}" if context.is_valid else "",
        span_id=f"{context.span_id:016x}" if context.is_valid else "",
    )
