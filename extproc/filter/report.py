"""What became of one request, told once: a count, a span, a log line, dynamic metadata. Ids and numbers, no content."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TypeAlias

import msgspec
from opentelemetry import trace
from opentelemetry.trace import Span, SpanContext, SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue

from extproc import names
from extproc.context.client import EngineAnswer
from extproc.filter.exchange import Exchange, Record
from extproc.filter.outcome import Outcome
from extproc.telemetry import metrics
from extproc.telemetry.spans import parent_of

__all__ = ["Report", "RequestLine", "WriteLine", "count_local_reply"]

_tracer = trace.get_tracer("extproc.filter")
_count = {outcome: metrics.REQUESTS.labels(outcome=outcome.value) for outcome in Outcome}


def count_local_reply() -> None:
    """All that is told of an answer whose request was not shown."""
    _count[Outcome.LOCAL_REPLY].inc()


class RequestLine(msgspec.Struct, gc=False):
    """The log line of one request. A class of its own, because a dict for each would cost four times more."""

    timestamp: datetime
    outcome: Outcome
    request_id: str
    trace_id: str
    session_id: str
    org_id: str
    agent_id: str
    chat_format: str
    memories: int
    tokens: int
    parse_ms: float
    engine_ms: float
    assemble_ms: float
    directive: str = ""
    """`extproc.directives.client.Source`; empty: nobody was asked for one."""
    directive_version_id: str = ""
    """Of the directive that went in."""
    directive_ms: float = 0.0
    event: str = "request"
    level: str = "info"
    process: str = "filter"


WriteLine: TypeAlias = Callable[[RequestLine], None]


class Report:
    """The clocks and the span of one request. `arrived` starts it anew with each message; `finish` is called once."""

    __slots__ = (
        "_arrived",
        "_span",
        "_traceparents",
        "answer",
        "directive",
        "directive_ms",
        "engine_ms",
        "parse_ms",
        "request_id",
    )

    def __init__(self, traceparents: Iterable[str]) -> None:
        """`traceparents`: W3C trace context, the best source first; `add_traceparent` adds another behind them."""
        self._traceparents = list(traceparents)
        self._arrived = time.perf_counter()
        self._span: Span | None = None
        self.request_id = ""
        self.parse_ms = 0.0
        self.engine_ms = 0.0
        self.directive_ms = 0.0
        self.directive = ""
        """How the directive was found; empty: nobody was asked for one."""
        self.answer: EngineAnswer | None = None

    def arrived(self) -> None:
        """A message came: the budget's clock starts."""
        self._arrived = time.perf_counter()

    def add_traceparent(self, traceparent: str) -> None:
        self._traceparents.append(traceparent)

    def elapsed_ms(self) -> float:
        """Since the last message arrived."""
        return (time.perf_counter() - self._arrived) * 1e3

    def start_span(self) -> SpanContext:
        """The span that the engine's call belongs to; it begins when the message arrived."""
        started_ns = time.time_ns() - int(self.elapsed_ms() * 1e6)
        parent = parent_of(self._traceparents)
        self._span = _tracer.start_span("context.assemble", parent, SpanKind.CLIENT, start_time=started_ns)
        return self._span.get_span_context()

    def metadata(self, exchange: Exchange, record: Record) -> dict[str, str | float | bool]:
        """What the access log shows, and what filters behind this one and the observer take over."""
        values: dict[str, str | float | bool] = {
            "outcome": record.outcome.value,
            "memories": record.memories,
            "tokens": record.tokens,
            "fallback": record.outcome.is_fallback,
            "assemble_ms": round(self.elapsed_ms(), 3),
            "engine_ms": round(self.engine_ms, 3),
            "session_id": exchange.session_id,
        }
        if self.directive:
            values["directive_ms"] = round(self.directive_ms, 3)
            if record.directive_version_id:
                values["directive_version_id"] = record.directive_version_id
        if exchange.chat_format:
            values["chat_format"] = exchange.chat_format
        if identity := exchange.identity:
            values["org_id"] = identity.org_id
            values["agent_id"] = identity.agent_id
            if identity.user_id is not None:
                values["user_id"] = identity.user_id
        return values

    def finish(self, exchange: Exchange, record: Record, write_line: WriteLine) -> None:
        assemble_ms = self.elapsed_ms()
        _count[record.outcome].inc()
        metrics.FILTER_SECONDS.observe(assemble_ms / 1e3)
        if record.tokens:
            metrics.INJECTED_TOKENS.observe(record.tokens)
        trace_id = self._end_span(exchange, record, assemble_ms) if exchange.chat_format else 0
        identity = exchange.identity
        write_line(
            RequestLine(
                timestamp=datetime.now(UTC),
                outcome=record.outcome,
                request_id=self.request_id,
                trace_id=f"{trace_id:032x}" if trace_id else "",
                session_id=exchange.session_id,
                org_id=identity.org_id if identity else "",
                agent_id=identity.agent_id if identity else "",
                chat_format=exchange.chat_format,
                memories=record.memories,
                tokens=record.tokens,
                parse_ms=round(self.parse_ms, 3),
                engine_ms=round(self.engine_ms, 3),
                assemble_ms=round(assemble_ms, 3),
                directive=self.directive,
                directive_version_id=record.directive_version_id,
                directive_ms=round(self.directive_ms, 3),
            )
        )

    def _end_span(self, exchange: Exchange, record: Record, assemble_ms: float) -> int:
        """Returns the trace's id; 0 when there is none."""
        if self._span is None:
            self.start_span()
        span = self._span
        assert span is not None  # noqa: S101 - start_span sets it
        if span.is_recording():
            attributes: dict[str, AttributeValue] = {
                names.GEN_AI_OPERATION_NAME: "retrieval",
                names.GEN_AI_DATA_SOURCE_ID: "ibex.memory",
                names.GEN_AI_REQUEST_MODEL: exchange.model,
                names.GEN_AI_CONVERSATION_ID: exchange.session_id,
                names.REQUEST_ID_ATTRIBUTE: self.request_id,
                names.OUTCOME_ATTRIBUTE: record.outcome.value,
                names.MEMORIES_INCLUDED_ATTRIBUTE: record.memories,
                names.CONTEXT_TOKENS_ATTRIBUTE: record.tokens,
                names.STAGE_MS_ATTRIBUTE.format("parse"): self.parse_ms,
                names.STAGE_MS_ATTRIBUTE.format("engine"): self.engine_ms,
                names.STAGE_MS_ATTRIBUTE.format("total"): assemble_ms,
            }
            if self.directive:
                attributes[names.DIRECTIVE_VERSION_ATTRIBUTE] = record.directive_version_id
                attributes[names.STAGE_MS_ATTRIBUTE.format("directive")] = self.directive_ms
            if (identity := exchange.identity) is not None:
                attributes[names.ORG_ATTRIBUTE] = identity.org_id
                attributes[names.GEN_AI_AGENT_ID] = identity.agent_id
            if (answer := self.answer) is not None:
                attributes[names.CANDIDATES_ATTRIBUTE] = answer.candidates
                attributes[names.MEMORY_IDS_ATTRIBUTE] = answer.memory_ids
                attributes[names.MEMORY_SCORES_ATTRIBUTE] = answer.memory_scores
            span.set_attributes(attributes)
            if record.outcome.is_fallback:
                span.set_status(StatusCode.ERROR, record.outcome.value)
        span.end()
        return span.get_span_context().trace_id
