from __future__ import annotations

from opentelemetry import trace
from opentelemetry.trace import SpanContext, TraceFlags

from extproc.telemetry.spans import linked_spans, parent_of, traceparent_of

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_the_first_carrier_that_holds_a_trace_is_the_parent() -> None:
    context = parent_of(["", None, TRACEPARENT, "00-ffffffffffffffffffffffffffffffff-b7ad6b7169203331-01"])
    span = trace.get_current_span(context).get_span_context()
    assert (f"{span.trace_id:032x}", f"{span.span_id:016x}") == tuple(TRACEPARENT.split("-")[1:3])


def test_nonsense_is_no_parent() -> None:
    context = parent_of(["nonsense"])
    assert not trace.get_current_span(context).get_span_context().is_valid
    assert parent_of([]) is None


def test_a_traceparent_is_what_w3c_says() -> None:
    trace_id, span_id = (int(part, 16) for part in TRACEPARENT.split("-")[1:3])
    assert traceparent_of(SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(1))) == TRACEPARENT
    assert traceparent_of(trace.INVALID_SPAN_CONTEXT) is None


def test_of_links_each_span_is_there_once_and_nonsense_is_passed_over() -> None:
    anything: list[object] = ["nonsense", None, 7, {}, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é", ""]
    (link,) = linked_spans([*anything, TRACEPARENT, TRACEPARENT])
    assert traceparent_of(link) == TRACEPARENT


def test_of_many_links_the_first_few_are_taken() -> None:
    many = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 100)]
    assert [link.span_id for link in linked_spans(many)] == list(range(1, 17))
