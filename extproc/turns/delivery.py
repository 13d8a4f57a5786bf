"""Brings turns from the outbox to where they belong: three consumers, each with its thread, its pace and its failures.

Everything is delivered at least once, and the sinks make that exactly once: checkpoints by (org, request id), tasks by
their id, trace rows by their batch's token. So whatever goes wrong here, the answer is to do it again later.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
from opentelemetry import trace

from extproc.names import GEN_AI_AGENT_ID, GEN_AI_CONVERSATION_ID, ORG_ATTRIBUTE, REQUEST_ID_ATTRIBUTE
from extproc.telemetry.spans import parent_of, traceparent_of
from extproc.turns._file import OutboxFile
from extproc.turns._tables import Batch, Consumer, FileClosed, FileTrouble, Mark, Row
from extproc.turns.metrics import OutboxMetrics
from extproc.turns.outbox import Backoff, Outbox, ids_of
from extproc.turns.sinks import CheckpointSink, ExtractionTask, Refused, TaskSink, TraceSink, Unavailable
from extproc.turns.turn import Entry, Turn, TurnText, task_id

__all__ = ["Consumer", "Delivery", "Pace"]

_log = structlog.get_logger(__name__)
_tracer = trace.get_tracer(__name__)

CHECKPOINT_SPAN = "outbox.checkpoint"
_CHECKPOINT_ROWS = 100
_ENQUEUE_ROWS = 100
_TRACE_ROWS = 500
"""The contract's batch."""
_SINGLE_TRIES = 8
"""An entry that meets a bug so often is set aside: with the longest wait each time, after a minute or so."""
_MOST_PROBLEM_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Pace:
    """Waits, in seconds."""

    first_s: float = 0.1
    """After the first failure; twice as long after each further one."""
    longest_s: float = 10.0
    gather_s: float = 0.1
    """A checkpoint waits so long for others, from its `put`, so that they share a transaction."""
    trace_gather_s: float = 0.2
    """A trace row, in the same way: the contract's 200 ms."""
    hanging_s: float = 15.0
    """A delivery that lasts longer is not well; where a sink has a time-out of its own, that is shorter."""


class Delivery:
    def __init__(
        self,
        outbox: Outbox,
        checkpoints: CheckpointSink | None,
        tasks: TaskSink | None,
        traces: TraceSink | None,
        pace: Pace | None = None,
    ) -> None:
        """Where a sink is None there is nothing to do, and its entries pass. `stop` closes the sinks."""
        pace = pace or Pace()
        idle_s = pace.trace_gather_s
        self._checkpoint = _Thread(
            Consumer.CHECKPOINT,
            None if checkpoints is None else _Checkpoints(checkpoints, outbox.metrics),
            outbox,
            pace,
            idle_s if checkpoints is None else pace.gather_s,
        )
        self._enqueue = _Thread(
            Consumer.ENQUEUE, None if tasks is None else _Tasks(tasks), outbox, pace, idle_s if tasks is None else 0.0
        )
        self._trace = _Thread(
            Consumer.TRACE, None if traces is None else _Traces(traces), outbox, pace, pace.trace_gather_s
        )

        self._checkpoint.followers.append(self._enqueue.wake)
        for thread in (self._checkpoint, self._enqueue, self._trace):
            outbox.watch(thread.look)

    def start(self) -> None:
        for thread in (self._checkpoint, self._enqueue, self._trace):
            thread.start()

    def is_well(self, consumer: Consumer) -> bool:
        """False while something waits because its last delivery failed, or does not come back."""
        threads = {Consumer.CHECKPOINT: self._checkpoint, Consumer.ENQUEUE: self._enqueue, Consumer.TRACE: self._trace}
        return threads[consumer].is_well

    def stop(self, timeout_s: float) -> None:
        """Deliver what is there as long as that goes well, close the sinks and end. The rest stays in the outbox.

        A call into a sink that lasts longer is left behind.
        """
        deadline = time.monotonic() + timeout_s
        self._trace.ask_to_stop(deadline)
        self._checkpoint.ask_to_stop(deadline)
        self._checkpoint.join(deadline)
        self._enqueue.ask_to_stop(deadline)  # after the last checkpoints, which make tasks
        self._enqueue.join(deadline)
        self._trace.join(deadline)


class _Work(Protocol):
    """What one consumer does with a batch."""

    most_rows: int
    batch_tries: int
    """So often is the same batch tried when a bug is met, before a part of it is."""

    def deliver(self, file: OutboxFile, batch: Batch) -> None:
        """To the sink, and then noted in the file. Raises what sink and file raise, and _Unreadable before either."""
        ...

    def close(self) -> None: ...


class _Unreadable(Exception):
    """A row that no turn can be made of."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row


class _Checkpoints:
    most_rows = _CHECKPOINT_ROWS
    batch_tries = 1

    def __init__(self, sink: CheckpointSink, metrics: OutboxMetrics) -> None:
        self._sink = sink
        self._metrics = metrics
        self.close = sink.close

    def deliver(self, file: OutboxFile, batch: Batch) -> None:
        entries = [_entry(row) for row in batch.rows]
        started_ns = time.time_ns()
        results = self._sink.write(entries)
        ended_ns = time.time_ns()
        is_traced = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        marks = []
        for entry, written in zip(entries, results, strict=True):
            if written.is_new or written.is_same:
                # The same was written before we could note it, so its task is not sent yet.
                traceparent = _span(entry.turn, started_ns, ended_ns) if is_traced else entry.turn.traceparent
                marks.append(Mark(written.turn_index, traceparent, written.session_id))
            else:
                self._report_duplicate(entry.turn)
                marks.append(Mark(None, "", ""))
        file.written(batch, marks)

    def _report_duplicate(self, turn: Turn) -> None:
        self._metrics.duplicates.inc()
        _log.warning(
            "a turn was not stored: another exchange has its X-Request-ID; let Envoy make one for each LLM call",
            org_id=turn.org_id,
            session_id=turn.session_id,
            request_id=turn.request_id,
        )


class _Tasks:
    most_rows = _ENQUEUE_ROWS
    batch_tries = 1

    def __init__(self, sink: TaskSink) -> None:
        self._sink = sink
        self.close = sink.close

    def deliver(self, file: OutboxFile, batch: Batch) -> None:
        self._sink.send([_task(row) for row in batch.rows])
        file.done(batch)


class _Traces:
    most_rows = _TRACE_ROWS
    batch_tries = 3
    """A batch that failed may be there all the same, and only with its token is that noticed."""

    def __init__(self, sink: TraceSink) -> None:
        self._sink = sink
        self.close = sink.close

    def deliver(self, file: OutboxFile, batch: Batch) -> None:
        self._sink.insert([_entry(row) for row in batch.rows], batch.token)
        file.done(batch)


class _Failed(Exception):
    """A delivery that is tried again after `wait_s`."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s


class _Thread:
    """One consumer: takes batches from every file of the outbox, and waits where its sink cannot take them."""

    def __init__(self, consumer: Consumer, work: _Work | None, outbox: Outbox, pace: Pace, gather_s: float) -> None:
        self._consumer = consumer
        self._work = work
        self._outbox = outbox
        self._metrics = outbox.metrics
        self._pace = pace
        self._gather_s = gather_s
        self._backoff = Backoff(pace.first_s, pace.longest_s)
        self._most_rows = work.most_rows if work else 0
        """Of the next batch: less than usual after one was refused, to find the entry that is the reason."""
        self._failing: Path | None = None
        """The file whose batch waits."""
        self._tried: tuple[Path, int, int] | None = None
        """The batch that met a bug, by file, first seq and number of rows; and how often."""
        self._tries = 0
        self._called_at: float | None = None
        """Monotonic; None: no delivery is on its way."""
        self._hangs = False
        """It was said that a delivery does not come back."""
        self._deadline = float("inf")
        self.wake = threading.Event()
        self.wake.set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"outbox-{consumer}", daemon=True)
        outbox.subscribe(self.wake.set)
        self.followers: list[threading.Event] = []
        """Set when this has gone on."""

    @property
    def is_well(self) -> bool:
        return self._failing is None and not self._is_overdue()

    def look(self) -> None:
        """From another thread: say it once when a delivery does not come back."""
        if self._hangs or not self._is_overdue():
            return
        self._hangs = True
        problem = f"no answer for {self._pace.hanging_s:.0f} s"
        _log.warning("turns wait in the outbox, a delivery does not end", consumer=self._consumer, problem=problem)
        self._note_problem(problem)

    def _is_overdue(self) -> bool:
        called_at = self._called_at
        return called_at is not None and time.monotonic() - called_at > self._pace.hanging_s

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self, deadline: float) -> None:
        self._deadline = deadline
        self._stopping.set()
        self.wake.set()

    def join(self, deadline: float) -> None:
        if self._thread.ident is None:  # never started
            self._close_sink()
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            _log.warning("a delivery did not end in time; what it has not noted is sent again", consumer=self._consumer)

    def _run(self) -> None:
        try:
            self._note_problem("")
            is_last = False
            while not is_last:
                if not self._stopping.is_set():
                    self.wake.wait()
                is_last = self._stopping.is_set()  # before it looks: what came while it last looked is there
                self._gather()
                self.wake.clear()
                if not self._drain():
                    return
        finally:
            self._close_sink()

    def _close_sink(self) -> None:
        if self._work is not None:
            self._work.close()

    def _gather(self) -> None:
        """Until the first that waits has waited long enough for others."""
        oldest = [at for file in self._outbox.files() if (at := file.state(self._consumer).oldest_at) is not None]
        waited_s = time.time() - min(oldest, default=0.0)
        if 0 <= waited_s < self._gather_s:  # below 0: the clock was set back
            self._stopping.wait(self._gather_s - waited_s)

    def _drain(self) -> bool:
        """All that is there. When stopping: within the deadline, and up to the first failure, which is False."""
        while self._may_go_on():
            try:
                for file in self._outbox.files():
                    while self._may_go_on() and self._step(file):
                        if file.path == self._failing:
                            self._recovered()
                        self._wake_followers()
            except _Failed as failed:
                if self._stopping.is_set():
                    return False
                self._stopping.wait(failed.wait_s)
            else:
                self._recovered()
                self._wake_followers()  # what is not for this one was passed over
                return True
        return False

    def _wake_followers(self) -> None:
        for follower in self.followers:
            follower.set()

    def _may_go_on(self) -> bool:
        return not self._stopping.is_set() or time.monotonic() < self._deadline

    def _step(self, file: OutboxFile) -> bool:
        """One batch. False: nothing is due. Raises _Failed."""
        try:
            if self._work is None:
                return file.pass_all(self._consumer)
            batch = file.take(self._consumer, self._most_rows)
            if batch is None:
                return False
            self._deliver(self._work, file, batch)
        except FileClosed:
            return False
        except FileTrouble as error:
            if error.is_disk_full:
                self._make_do(file)
            raise self._failure(file, f"the outbox: {error}") from None
        except _Failed:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, this thread must live on
            self._log_bug(error)
            raise self._failure(file, type(error).__name__, self._pace.longest_s) from None
        return True

    def _make_do(self, file: OutboxFile) -> None:
        """On a full disk: a small batch is noted within the room that the log has, and frees some."""
        self._most_rows = max(1, self._most_rows // 4)
        with suppress(FileTrouble):
            file.make_log_reusable()

    def _deliver(self, work: _Work, file: OutboxFile, batch: Batch) -> None:
        try:
            with self._watched():
                work.deliver(file, batch)
        except FileTrouble:
            raise
        except _Unreadable as error:
            self._set_aside(file, error.row, "Unreadable")
        except Unavailable as error:
            raise self._failure(file, str(error)) from None
        except Refused as error:
            self._refused(file, batch, error)
        except Exception as error:  # noqa: BLE001 - a bug in one place must not keep everything else waiting
            self._broke(work, file, batch, error)
        else:
            self._metrics.delivered[self._consumer].inc(len(batch.rows))
            self._most_rows = min(work.most_rows, self._most_rows * 2)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._called_at = time.monotonic()
        try:
            yield
        finally:
            self._called_at = None

    def _refused(self, file: OutboxFile, batch: Batch, error: Exception) -> None:
        """Again with half of it, until the one that is refused stands alone."""
        self._metrics.failures[self._consumer].inc()
        if len(batch.rows) == 1:
            self._set_aside(file, batch.rows[0], type(error).__name__, str(error) if isinstance(error, Refused) else "")
            return
        file.give_up(batch)
        self._most_rows = len(batch.rows) // 2

    def _broke(self, work: _Work, file: OutboxFile, batch: Batch, error: Exception) -> None:
        key = (file.path, batch.rows[0].seq, len(batch.rows))
        self._tries = self._tries + 1 if key == self._tried else 1
        self._tried = key
        self._log_bug(error, rows=len(batch.rows), tries=self._tries, **ids_of(batch.rows[0].turn))
        if self._tries >= (_SINGLE_TRIES if len(batch.rows) == 1 else work.batch_tries):
            self._refused(file, batch, error)
            if len(batch.rows) == 1:
                return
        raise self._failure(file, type(error).__name__, self._pace.longest_s)

    def _log_bug(self, error: Exception, **about: object) -> None:
        # Frames only: the words of an exception of some library may hold what it was given.
        frames = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
        ]
        name = type(error).__name__
        _log.error("a delivery met a bug", consumer=self._consumer, error=name, frames=frames, **about)

    def _set_aside(self, file: OutboxFile, row: Row, error: str, problem: str = "") -> None:
        file.set_aside(self._consumer, row, error)
        self._metrics.set_aside[self._consumer].inc()
        _log.error(
            "an entry cannot be delivered and was set aside; see `extproc outbox show-aside`",
            consumer=self._consumer,
            error=error,
            problem=problem[:_MOST_PROBLEM_CHARACTERS],
            **ids_of(row.turn),
        )

    def _failure(self, file: OutboxFile, problem: str, wait_s: float | None = None) -> _Failed:
        """Count it, and say so when it is the first. `wait_s`: instead of the next of the growing waits."""
        self._metrics.failures[self._consumer].inc()
        if self._failing is None:
            problem = problem[:_MOST_PROBLEM_CHARACTERS]
            _log.warning("turns wait in the outbox, delivery is tried again", consumer=self._consumer, problem=problem)
            self._note_problem(problem)
        self._failing = file.path
        return _Failed(self._backoff.next_s() if wait_s is None else wait_s)

    def _recovered(self) -> None:
        if self._failing is not None or self._hangs:
            self._failing, self._hangs = None, False
            _log.info("turns are delivered again", consumer=self._consumer)
            self._note_problem("")
        self._backoff.reset()

    def _note_problem(self, problem: str) -> None:
        with suppress(FileTrouble):
            self._outbox.files()[0].note_problem(self._consumer, problem)


def _entry(row: Row) -> Entry:
    try:
        text = None if row.text is None else msgspec.json.decode(row.text, type=TurnText)
        return Entry(row.seq, msgspec.json.decode(row.turn, type=Turn), text, row.turn_index)
    except msgspec.MsgspecError as error:
        raise _Unreadable(row) from error


class _Origin(msgspec.Struct):
    """What a task needs of a turn."""

    org_id: str
    session_id: str
    traceparent: str = ""


def _task(row: Row) -> ExtractionTask:
    try:
        origin = msgspec.json.decode(row.turn, type=_Origin)
    except msgspec.MsgspecError as error:
        raise _Unreadable(row) from error
    assert row.turn_index is not None  # noqa: S101 - an entry without it asks for no task
    session_id = row.session_id or origin.session_id
    return ExtractionTask(
        id=task_id(origin.org_id, session_id, row.turn_index),
        session_id=session_id,
        org_id=origin.org_id,
        traceparent=row.traceparent or origin.traceparent,
    )


def _span(turn: Turn, started_ns: int, ended_ns: int) -> str:
    """The span of a written checkpoint; returns the `traceparent` for what follows from it."""
    span = _tracer.start_span(
        CHECKPOINT_SPAN,
        context=parent_of([turn.traceparent]),
        attributes={
            ORG_ATTRIBUTE: turn.org_id,
            GEN_AI_AGENT_ID: turn.agent_id,
            GEN_AI_CONVERSATION_ID: turn.external_id,
            REQUEST_ID_ATTRIBUTE: turn.request_id,
        },
        start_time=started_ns,
    )
    span.end(ended_ns)
    return traceparent_of(span.get_span_context()) or turn.traceparent
