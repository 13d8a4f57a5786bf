"""Delivery from a real outbox to sinks that the test controls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from extproc.turns import delivery as delivery_module
from extproc.turns._outside import look, retry_set_aside, set_aside_entries
from extproc.turns._tables import Consumer, FileTrouble, NewRow
from extproc.turns.delivery import Delivery, Pace
from extproc.turns.outbox import Outbox
from extproc.turns.sinks import Refused, Unavailable
from extproc.turns.turn import End, TurnText, task_id
from tests.unit.turns.outbox_side import NOON, ORG, TEXT, TRACEPARENT, Database, Queue, Traces, turn, wait_for

PACE = Pace(first_s=0.01, longest_s=0.04, gather_s=0.0, trace_gather_s=0.0)


class Side:
    """An outbox with its delivery and the three systems behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.database, self.queue, self.traces = Database(), Queue(), Traces()
        self.open()

    def open(self) -> None:
        self.registry = CollectorRegistry()
        self.outbox = Outbox(self.directory, 2**26, self.registry, look_s=0.05)
        self.delivery: Delivery | None = None

    def start(self, **absent: None) -> None:
        sinks: dict[str, Any] = {"checkpoints": self.database, "tasks": self.queue, "traces": self.traces, **absent}
        self.delivery = Delivery(self.outbox, pace=PACE, **sinks)
        self.delivery.start()

    def put(self, *requests: str, text: TurnText | None = TEXT, **given: Any) -> None:
        for request in requests:
            self.outbox.put(turn(request, **given), text)
        assert self.outbox.flush(5)

    def close(self, timeout_s: float = 5) -> None:
        if self.delivery is not None:
            self.delivery.stop(timeout_s)
            self.delivery = None
        if not self.outbox._is_closed:
            self.outbox.close()

    def is_empty(self) -> bool:
        return all(file.waiting_bytes == 0 for file in self.outbox.files())

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"ibex_outbox_{name}", labels) or 0.0


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    made = Side(tmp_path / "state")
    yield made
    made.close()


def test_a_turn_becomes_a_checkpoint_a_task_and_a_trace_row(side: Side) -> None:
    side.start()
    side.put("r1", traceparent=TRACEPARENT)
    wait_for(side.is_empty)
    assert side.database.rows == {"r1": (0, TEXT)}
    (task,) = side.queue.sent
    session = turn("r1").session_id
    assert (task.id, task.session_id, task.org_id) == (task_id(ORG, session, 0), session, ORG)
    assert task.traceparent == TRACEPARENT
    assert side.traces.rows == ["r1"]
    # Counted when it is no longer in the outbox.
    wait_for(lambda: [side.count("delivered_total", consumer=consumer) for consumer in Consumer] == [1, 1, 1])


def test_what_failed_or_was_denied_leaves_a_trace_only(side: Side) -> None:
    side.start()
    side.put("denied", end=End.DENIED, status_code=401)
    side.put("failed", end=End.PROVIDER_ERROR, status_code=500)
    wait_for(side.is_empty)
    assert (side.database.rows, side.queue.sent) == ({}, [])
    assert side.traces.rows == ["denied", "failed"]


def test_who_asked_to_skip_extraction_gets_a_checkpoint_without_text_or_task(side: Side) -> None:
    side.start()
    side.put("r", skip_extraction=True)
    wait_for(side.is_empty)
    assert side.database.rows == {"r": (0, None)}
    assert side.queue.sent == []


def test_each_system_that_is_down_holds_up_only_what_depends_on_it(side: Side) -> None:
    side.queue.failing = Unavailable("nobody there")
    side.start()
    side.put("r1", "r2")
    wait_for(lambda: side.traces.rows == ["r1", "r2"])
    assert list(side.database.rows) == ["r1", "r2"]
    side.database.failing = Unavailable("nobody there")
    side.put("r3")
    wait_for(lambda: "r3" in side.traces.rows)
    side.queue.failing = None
    wait_for(lambda: len(side.queue.sent) == 2)
    assert "r3" not in side.database.rows
    side.database.failing = None
    wait_for(side.is_empty)
    assert len(side.queue.sent) == 3


def test_an_outage_is_said_when_it_begins_and_when_it_is_over(side: Side) -> None:
    side.database.failing = Unavailable("connection refused")
    with capture_logs() as logs:
        side.start()
        side.put("r1")
        wait_for(lambda: len(side.database.calls) > 4)
        wait_for(lambda: look(side.outbox.files()[0].path).states[Consumer.CHECKPOINT].problem == "connection refused")
        side.database.failing = None
        wait_for(side.is_empty)
        wait_for(lambda: look(side.outbox.files()[0].path).states[Consumer.CHECKPOINT].problem == "")
    assert [(line["log_level"], line["consumer"]) for line in logs] == [
        ("warning", Consumer.CHECKPOINT),
        ("info", Consumer.CHECKPOINT),
    ]
    assert side.count("failures_total", consumer="checkpoint") > 4


def test_after_a_crash_nothing_is_missing_and_a_written_checkpoint_still_gets_its_task(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database commits, and the process ends before the outbox notes it."""
    with monkeypatch.context() as broken:
        broken.setattr("extproc.turns._file.OutboxFile.written", raise_trouble)
        side.start(traces=None)
        side.put("r1", "r2")
        wait_for(lambda: len(side.database.rows) == 2)
        side.close(timeout_s=0)
    assert side.queue.sent == []
    side.open()
    side.start()
    wait_for(side.is_empty)
    assert [index for index, _ in side.database.rows.values()] == [0, 1]
    assert [task.id for task in side.queue.sent] == [task_id(ORG, turn().session_id, index) for index in (0, 1)]
    assert side.count("duplicate_turns_total") == 0


def raise_trouble(*_: object) -> None:
    raise FileTrouble("the process ends here")


def test_another_exchange_with_the_same_request_id_is_counted_and_named(side: Side) -> None:
    side.start()
    with capture_logs() as logs:
        side.put("r1")
        wait_for(side.is_empty)
        side.put("r1", "r2", messages_hash="another")
        side.put("r2")
        wait_for(side.is_empty)
    assert side.count("duplicate_turns_total") == 2
    assert [line["request_id"] for line in logs if line["log_level"] == "warning"] == ["r1", "r2"]
    assert len(side.queue.sent) == 2


def test_a_request_id_that_is_used_again_during_an_outage_is_a_duplicate_all_the_same(side: Side) -> None:
    side.database.failing = Unavailable("nobody there")
    side.start()
    side.put("r1")
    side.put("r1", session_id="another session")
    wait_for(lambda: 2 in side.database.calls)
    with capture_logs() as logs:
        side.database.failing = None
        wait_for(side.is_empty)
    assert side.count("duplicate_turns_total") == 1
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert (line["request_id"], line["session_id"]) == ("r1", "another session")
    assert [task.session_id for task in side.queue.sent] == [turn().session_id]


def test_a_task_is_for_the_row_that_the_session_has_also_after_a_restart(side: Side) -> None:
    side.database.sessions = {turn().session_id: "a row that another program made"}
    side.queue.failing = Unavailable("nobody there")
    side.start()
    side.put("r1")
    wait_for(lambda: side.outbox.files()[0].state(Consumer.ENQUEUE).depth)
    side.close(timeout_s=0.5)
    side.open()
    side.queue.failing = None
    side.start()
    wait_for(side.is_empty)
    (task,) = side.queue.sent
    row = "a row that another program made"
    assert (task.id, task.session_id) == (task_id(ORG, row, 0), row)


def test_a_sink_that_does_not_come_back_is_not_well_and_that_is_said_once(side: Side) -> None:
    original, may_return = side.database.write, threading.Event()

    def hang(entries: Any) -> Any:
        may_return.wait(30)
        return original(entries)

    side.database.write = hang  # type: ignore[method-assign]
    pace = Pace(gather_s=0.0, trace_gather_s=0.0, hanging_s=0.05)
    delivery = side.delivery = Delivery(side.outbox, side.database, side.queue, side.traces, pace)
    assert delivery.is_well(Consumer.CHECKPOINT)
    try:
        with capture_logs() as logs:
            delivery.start()
            side.put("r1")
            wait_for(lambda: not delivery.is_well(Consumer.CHECKPOINT))
            wait_for(lambda: look(side.outbox.files()[0].path).states[Consumer.CHECKPOINT].problem)
            wait_for(lambda: side.traces.rows == ["r1"])
            assert delivery.is_well(Consumer.TRACE)
            threading.Event().wait(0.2)  # several looks
            may_return.set()
            wait_for(side.is_empty)
            wait_for(lambda: look(side.outbox.files()[0].path).states[Consumer.CHECKPOINT].problem == "")
    finally:
        may_return.set()
    assert delivery.is_well(Consumer.CHECKPOINT)
    assert [(line["log_level"], line["consumer"]) for line in logs] == [
        ("warning", Consumer.CHECKPOINT),
        ("info", Consumer.CHECKPOINT),
    ]


def test_one_that_is_sent_again_after_an_outage_is_no_duplicate(side: Side) -> None:
    """The connection broke after the commit, so the database has them and nobody knows."""
    original = side.database.write

    def write_and_break(entries: Any) -> Any:
        side.database.write = original  # type: ignore[method-assign]
        original(entries)
        raise Unavailable("connection reset")

    side.database.write = write_and_break  # type: ignore[method-assign]
    side.start()
    side.put("r1")
    wait_for(side.is_empty)
    assert side.count("duplicate_turns_total") == 0
    assert len(side.queue.sent) == 1


@pytest.mark.parametrize("refusal", [Refused, ValueError])
def test_the_one_checkpoint_that_is_refused_is_set_aside_and_the_others_go_on(
    side: Side, refusal: type[Exception]
) -> None:
    side.database.refused, side.database.refusal = {"r13"}, refusal
    requests = [f"r{number}" for number in range(40)]
    for request in requests:
        side.outbox.put(turn(request), TEXT)
    with capture_logs() as logs:
        side.start()
        assert side.outbox.flush(5)
        wait_for(side.is_empty)
    assert list(side.database.rows) == [request for request in requests if request != "r13"]
    assert len(side.database.calls) < 28, "batches grow again"
    assert len(side.queue.sent) == 39
    assert side.traces.rows == requests
    assert side.count("set_aside_total", consumer="checkpoint") == 1
    (aside,) = set_aside_entries(side.outbox.files()[0].path)
    assert (aside.consumer, aside.error) == (Consumer.CHECKPOINT, refusal.__name__)
    errors = [line for line in logs if "set aside" in line["event"]]
    assert [line["request_id"] for line in errors] == ["r13"]
    assert "Ada" not in str(logs)


def test_a_bug_is_tried_eight_times_before_its_entry_is_set_aside(side: Side) -> None:
    side.database.refused, side.database.refusal = {"bad"}, KeyError
    side.start()
    side.put("bad")
    wait_for(side.is_empty)
    assert side.database.calls == [1] * 8


def test_the_words_of_a_bug_are_not_logged(side: Side) -> None:
    side.traces.failing = ValueError("what the user said")
    with capture_logs() as logs:
        side.start()
        side.put("r")
        wait_for(side.is_empty)
    assert "ValueError" in str(logs)
    assert "what the user said" not in str(logs)


def test_what_was_set_aside_comes_back_when_somebody_asks(side: Side) -> None:
    side.traces.refused, side.traces.refusal = {"r1"}, Refused
    side.start()
    side.put("r1", "r2")
    wait_for(lambda: side.traces.rows == ["r2"] and side.is_empty())
    side.traces.refused = set()
    assert retry_set_aside(side.outbox.files()[0].path, None, []) == 1
    wait_for(lambda: side.traces.rows == ["r2", "r1"])
    assert list(side.database.rows) == ["r1", "r2"]
    assert len(side.database.calls) <= 2


def test_a_trace_batch_that_comes_again_has_the_same_rows_and_token(side: Side) -> None:
    """Its answer was lost: the sink has the rows, and recognises them by the token."""
    side.traces.failing, side.traces.fails_after_insert = Unavailable("time-out"), True
    side.start()
    side.put("r1", "r2")
    wait_for(lambda: len(side.traces.calls) > 2)
    side.put("r3")
    side.traces.failing = None
    wait_for(side.is_empty)
    assert side.traces.rows == ["r1", "r2", "r3"]


def test_a_trace_batch_in_flight_is_the_first_after_a_restart(side: Side) -> None:
    side.traces.failing, side.traces.fails_after_insert = Unavailable("time-out"), True
    side.start()
    side.put("r1", "r2")
    wait_for(lambda: side.traces.calls)
    side.close(timeout_s=0.5)
    side.open()
    side.put("r3")
    side.traces.failing = None
    side.start()
    wait_for(side.is_empty)
    assert side.traces.rows == ["r1", "r2", "r3"]


def test_systems_that_are_not_there_have_nothing_to_do(side: Side) -> None:
    side.start(checkpoints=None, tasks=None, traces=None)
    side.put("r1", "r2")
    wait_for(side.is_empty)
    assert (side.database.calls, side.queue.sent, side.traces.calls) == ([], [], [])


def test_without_a_database_there_are_no_tasks(side: Side) -> None:
    side.start(checkpoints=None)
    side.put("r1")
    wait_for(side.is_empty)
    assert side.queue.sent == []
    assert side.traces.rows == ["r1"]


def test_a_row_that_cannot_be_read_is_set_aside(side: Side) -> None:
    side.outbox.files()[0].append([NewRow(time.time(), True, False, b"nonsense", None)])
    side.put("r1")
    side.start()
    wait_for(side.is_empty)
    assert list(side.database.rows) == side.traces.rows == ["r1"]
    aside = set_aside_entries(side.outbox.files()[0].path)
    assert sorted(entry.consumer for entry in aside) == [Consumer.CHECKPOINT, Consumer.TRACE]


def test_stopping_delivers_what_is_there_and_closes_the_sinks(side: Side) -> None:
    side.start()
    for number in range(300):
        side.outbox.put(turn(f"r{number}"), TEXT)
    assert side.outbox.flush(5)
    assert side.delivery is not None
    side.delivery.stop(10)
    assert (len(side.database.rows), len(side.queue.sent), len(side.traces.rows)) == (300, 300, 300)
    assert side.database.is_closed
    assert side.queue.is_closed
    assert side.traces.is_closed


def test_what_came_when_it_had_just_looked_is_delivered_at_a_stop(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    side.start()
    assert side.delivery is not None
    checkpoint = side.delivery._checkpoint
    real, look = type(checkpoint)._drain, checkpoint._drain
    asked = threading.Event()

    def look_too_early() -> bool | None:
        result = look()
        if not asked.is_set():
            asked.set()
            side.outbox.put(turn("late"), TEXT)
            assert side.outbox.flush(5)
            checkpoint.ask_to_stop(time.monotonic() + 10)
        return result

    monkeypatch.setattr(type(checkpoint), "_drain", lambda one: look_too_early() if one is checkpoint else real(one))
    side.put("early")
    checkpoint._thread.join(10)
    assert len(side.database.rows) == 2


def test_one_that_was_never_started_closes_its_sinks_too(side: Side) -> None:
    Delivery(side.outbox, side.database, side.queue, side.traces).stop(5)
    assert side.database.is_closed


def test_stopping_does_not_wait_for_what_is_down(side: Side) -> None:
    for system in (side.database, side.queue, side.traces):
        system.failing = Unavailable("nobody there")
    side.delivery = Delivery(side.outbox, side.database, side.queue, side.traces, Pace(first_s=30, longest_s=30))
    side.delivery.start()
    side.put("r1")
    wait_for(lambda: side.database.calls and side.traces.calls)
    began = time.monotonic()
    side.close(timeout_s=20)
    assert time.monotonic() - began < 20


def test_checkpoints_travel_together_when_many_come(side: Side) -> None:
    side.delivery = Delivery(side.outbox, side.database, side.queue, side.traces)
    side.delivery.start()
    for _ in range(1000):
        side.outbox.put(turn(), TEXT)
    assert side.outbox.flush(5)
    wait_for(side.is_empty)
    assert len(side.database.calls) < 200
    assert max(side.database.calls) <= 100
    assert max(number for _, number in side.traces.calls) <= 500


def test_an_adopted_file_is_delivered_and_removed(side: Side, tmp_path: Path) -> None:
    dead = Outbox(side.directory, 2**26, CollectorRegistry(), look_s=60)
    dead.put(turn("left"), TEXT)
    dead.close()
    side.start()
    wait_for(lambda: "left" in side.database.rows and len(side.queue.sent) == 1 and side.traces.rows == ["left"])
    wait_for(lambda: not dead.files()[0].path.exists())


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(delivery_module, "_tracer", provider.get_tracer("test"))
    return exporter


def test_a_checkpoint_is_a_span_of_its_request_and_the_task_goes_on_from_it(
    side: Side, spans: InMemorySpanExporter
) -> None:
    side.start()
    side.put("r1", traceparent=TRACEPARENT)
    wait_for(side.is_empty)
    (span,) = spans.get_finished_spans()
    (task,) = side.queue.sent
    assert span.name == "outbox.checkpoint"
    assert span.context is not None
    assert span.parent is not None
    assert f"00-{span.context.trace_id:032x}-{span.parent.span_id:016x}-01" == TRACEPARENT
    assert task.traceparent == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert "Ada" not in str(span.attributes)
    assert dict(span.attributes or {})["ibex.request.id"] == "r1"


def test_the_span_of_a_checkpoint_is_remembered_until_its_task_is_sent(side: Side, spans: InMemorySpanExporter) -> None:
    side.queue.failing = Unavailable("nobody there")
    side.start()
    side.put("r1", traceparent=TRACEPARENT)
    wait_for(lambda: side.outbox.files()[0].state(Consumer.ENQUEUE).depth)
    side.close(timeout_s=0.5)
    side.open()
    side.queue.failing = None
    side.start()
    wait_for(side.is_empty)
    (span,) = spans.get_finished_spans()
    assert span.context is not None
    assert f"{span.context.span_id:016x}" in side.queue.sent[0].traceparent


def test_turns_of_long_ago_are_not_waited_for(side: Side) -> None:
    """A clock that was set back or forward costs no more than the gathering time."""
    side.delivery = Delivery(side.outbox, side.database, side.queue, side.traces, Pace(gather_s=0.05))
    for put_at in (0.0, time.time() + 10_000):
        side.outbox.files()[0].append([NewRow(put_at, False, False, encoded(), None)])
    side.delivery.start()
    wait_for(side.is_empty)


def encoded() -> bytes:
    return msgspec.json.encode(turn(requested_at=NOON))
