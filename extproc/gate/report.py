"""What was said about one request, told once: a count, a span when it is traced, a log line when it was refused.

Ids, codes and numbers. A token, a path or a header's value never comes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeAlias

import msgspec
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode

from extproc import names
from extproc.gate import metrics
from extproc.gate.passage import Allow, Deny
from extproc.gate.verdict import Code
from extproc.telemetry.spans import parent_of

__all__ = ["DenialLine", "Report", "WriteLine"]

_tracer = trace.get_tracer("extproc.gate")

CODE_ATTRIBUTE = "ibex.gate.code"
CACHED_ATTRIBUTE = "ibex.gate.auth_cached"


class DenialLine(msgspec.Struct, gc=False):
    timestamp: datetime
    code: Code
    status: int
    request_id: str
    trace_id: str
    org_id: str
    agent_id: str
    gate_ms: float
    event: str = "denied"
    level: str = "info"
    process: str = "gate"


WriteLine: TypeAlias = Callable[[DenialLine], None]


class Report:
    """The clock of one request; `finish` is called once."""

    __slots__ = ("_arrived", "request_id", "traceparent")

    def __init__(self) -> None:
        self._arrived = time.perf_counter()
        self.request_id = ""
        self.traceparent = ""
        """W3C trace context of the request; empty: not traced, or nobody wants spans."""

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self._arrived) * 1e3

    def finish(self, verdict: Allow | Deny, write_line: WriteLine) -> None:
        gate_ms = self.elapsed_ms()
        trace_id = self._end_span(verdict, gate_ms) if self.traceparent else ""
        if isinstance(verdict, Allow):
            metrics.CHECKS.add("allowed", verdict.is_cached, gate_ms)
            return
        code = verdict.denial.code
        metrics.CHECKS.add(code.value, False, gate_ms)
        write_line(
            DenialLine(
                timestamp=datetime.now(UTC),
                code=code,
                status=verdict.denial.status,
                request_id=self.request_id,
                trace_id=trace_id,
                org_id=verdict.org_id,
                agent_id=verdict.agent_id,
                gate_ms=round(gate_ms, 3),
            )
        )

    def _end_span(self, verdict: Allow | Deny, gate_ms: float) -> str:
        """Returns the trace's id; empty when there is none."""
        started_ns = time.time_ns() - int(gate_ms * 1e6)
        span = _tracer.start_span("gate.check", parent_of((self.traceparent,)), SpanKind.SERVER, start_time=started_ns)
        if span.is_recording():
            span.set_attribute(names.REQUEST_ID_ATTRIBUTE, self.request_id)
            org_id = verdict.claims.org_id if isinstance(verdict, Allow) else verdict.org_id
            if org_id:
                span.set_attribute(names.ORG_ATTRIBUTE, org_id)
            if verdict.agent_id:
                span.set_attribute(names.GEN_AI_AGENT_ID, verdict.agent_id)
            if isinstance(verdict, Allow):
                span.set_attribute(CODE_ATTRIBUTE, "allowed")
                span.set_attribute(CACHED_ATTRIBUTE, verdict.is_cached)
            else:
                span.set_attribute(CODE_ATTRIBUTE, verdict.denial.code.value)
                if verdict.denial.status >= 500:
                    span.set_status(StatusCode.ERROR, verdict.denial.code.value)
        span.end()
        context = span.get_span_context()
        return f"{context.trace_id:032x}" if context.is_valid else ""
