"""What a worker counts, for Prometheus. Organisations, agents and users are never labels.

The processes that extract come and go, and are forked; so they only tell what happened, and one process that stays
counts it (`extproc.worker.admin`). Words and metrics are pure: no pipe, no clock.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias, assert_never

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from extproc import names

if TYPE_CHECKING:
    from extproc.worker.session import Done

__all__ = [
    "Batch", "Began", "Ended", "Event", "Outcome", "Ready", "Reason", "SetAside", "Stopping", "WorkerMetrics",
    "batch_of",
]  # fmt: skip

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""From one turn by rules to the default limit of a task."""


class Outcome(StrEnum):
    """Of one attempt at a task."""

    DONE = "done"
    CONTINUED = "continued"
    """Turns are left, for a task of their own."""
    AGAIN = "again"
    """The database or the model is away; it is tried again."""
    SET_ASIDE = "set_aside"
    DROPPED = "dropped"
    """It failed, and could not be set aside."""


class Reason(StrEnum):
    """Why a task was set aside."""

    UNREADABLE = "unreadable"
    """Nobody can make a task of the message."""
    MALFORMED = "malformed"
    """The task names no session."""
    REFUSED = "refused"
    """By the model or the database, or by a setting."""
    ATTEMPTS = "attempts"
    """The database or the model was away too often."""
    TIME = "time"
    BUG = "bug"
    DEADLY = names.DEADLY_TASK
    """Processes that took it died, too often."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker waits for tasks."""


class Stopping(msgspec.Struct, frozen=True, tag=True):
    """It takes no more; running ones may end."""


class Began(msgspec.Struct, frozen=True, tag=True):
    """A task was taken from the queue."""

    is_redelivered: bool


class Ended(msgspec.Struct, frozen=True, tag=True):
    """An attempt at it is over."""

    outcome: Outcome
    seconds: float
    at: float
    """Unix time in seconds."""


class SetAside(msgspec.Struct, frozen=True, tag=True):
    reason: Reason


class Batch(msgspec.Struct, frozen=True, tag=True):
    """What became of some turns of a session."""

    turns: int
    added: int
    merged: int
    superseded: int
    quarantined: int
    unsupported: int
    unwritable: int
    redacted: int
    calls: int
    input_tokens: int
    output_tokens: int
    cost: float


Event: TypeAlias = Ready | Stopping | Began | Ended | SetAside | Batch


def batch_of(done: Done) -> Batch:
    its = done.accounting
    return Batch(
        turns=done.turns,
        added=len(done.memories) - done.quarantined,
        merged=done.merged,
        superseded=done.superseded,
        quarantined=done.quarantined,
        unsupported=its.unsupported,
        unwritable=done.unwritable,
        redacted=its.redacted,
        calls=its.calls,
        input_tokens=its.input_tokens,
        output_tokens=its.output_tokens,
        cost=its.cost,
    )


class WorkerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        tasks = Counter("ibex_worker_tasks", "Attempts at a task, by what became of it", ["outcome"], registry=registry)
        self._tasks = {outcome: tasks.labels(outcome) for outcome in Outcome}
        self._seconds = Histogram("ibex_worker_task_seconds", "Duration of one", buckets=_BUCKETS_S, registry=registry)
        self._redelivered = Counter(
            "ibex_worker_redelivered_tasks",
            "Tasks that came again, since the process or the worker that had them died",
            registry=registry,
        )
        set_aside = Counter("ibex_worker_set_aside", "Dead letters, by reason", ["reason"], registry=registry)
        self._set_aside = {reason: set_aside.labels(reason) for reason in Reason}
        self._turns = Counter("ibex_worker_turns", "Turns whose memories are written", registry=registry)
        self._memories = Counter(
            "ibex_worker_memories", "Memories that were written or changed, by how", ["change"], registry=registry
        )
        self._dropped = Counter(
            "ibex_worker_dropped_memories", "Found and not written, by reason", ["reason"], registry=registry
        )
        self._redacted = Counter("ibex_worker_redacted", "Secrets that were taken out of texts", registry=registry)
        self._calls = Counter("ibex_worker_llm_calls", "Calls of the model that were answered", registry=registry)
        self._tokens = Counter(
            "ibex_worker_llm_tokens", "Tokens, as the model's server counts them", ["direction"], registry=registry
        )
        self._cost = Counter("ibex_worker_llm_cost", "In the currency of the configured prices", registry=registry)
        self._succeeded_at = Gauge(
            "ibex_worker_last_success_timestamp_seconds",
            "When a task was done last; 0: none yet",
            registry=registry,
        )
        self.queue_length = Gauge("ibex_worker_queue_length", "Tasks that no worker has taken yet", registry=registry)
        self.queue_seconds = Gauge(
            "ibex_worker_queue_seconds", "For how long there has always been one", registry=registry
        )
        # An alert on a rise needs a zero before it.
        for change in ("added", "merged", "superseded", "quarantined"):
            self._memories.labels(change)
        for reason in ("unsupported", "unwritable"):
            self._dropped.labels(reason)
        for direction in ("input", "output"):
            self._tokens.labels(direction)

    def count(self, event: Event) -> None:
        match event:
            case Ready() | Stopping():
                pass
            case Began(is_redelivered):
                self._redelivered.inc(is_redelivered)
            case Ended(outcome, seconds, at):
                self._tasks[outcome].inc()
                self._seconds.observe(seconds)
                if outcome in {Outcome.DONE, Outcome.CONTINUED}:
                    self._succeeded_at.set(at)
            case SetAside(reason):
                self._set_aside[reason].inc()
            case Batch():
                self._count_batch(event)
            case _:
                assert_never(event)

    def _count_batch(self, batch: Batch) -> None:
        self._turns.inc(batch.turns)
        for change in ("added", "merged", "superseded", "quarantined"):
            self._memories.labels(change).inc(getattr(batch, change))
        for reason in ("unsupported", "unwritable"):
            self._dropped.labels(reason).inc(getattr(batch, reason))
        self._redacted.inc(batch.redacted)
        self._calls.inc(batch.calls)
        self._tokens.labels("input").inc(batch.input_tokens)
        self._tokens.labels("output").inc(batch.output_tokens)
        self._cost.inc(batch.cost)
