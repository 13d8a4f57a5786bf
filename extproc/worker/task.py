"""The task around a session's extraction: what is tried again, what is set aside, what is said of it. Ids only."""

from __future__ import annotations

import random
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog
from billiard.exceptions import SoftTimeLimitExceeded
from opentelemetry import trace

from extproc import names
from extproc.memory.store import StoreError, StoreRefused
from extproc.settings import SettingsError
from extproc.telemetry.spans import parent_of
from extproc.worker.extract import ExtractorRefused, ExtractorUnavailable
from extproc.worker.failed import failed_task
from extproc.worker.metrics import Began, Ended, Outcome, Reason, SetAside, batch_of
from extproc.worker.transport import DELIVERIES_HEADER, deliveries

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.settings import WorkerSettings
    from extproc.worker.metrics import Event
    from extproc.worker.parts import Parts
    from extproc.worker.session import Done

__all__ = ["Limits", "longest_wait_s", "run_task", "wait_s"]

_FIRST_WAIT_S = 1.0
_SHARE = 0.5
"""Of the soft limit, in which batches are begun: the last one has as long again."""

_tracer = trace.get_tracer(__name__)


def longest_wait_s(limit_s: float) -> float:
    """Between two attempts; a message that waits stays unacknowledged, so it must come before it counts as lost."""
    return min(60.0, limit_s / 2)


def wait_s(attempts: int, limit_s: float) -> float:
    """Twice as long each time, and never the same for two tasks that failed together."""
    longest = min(longest_wait_s(limit_s), _FIRST_WAIT_S * 2.0 ** min(attempts - 1, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311


class Limits:
    """How long a task has been running."""

    def __init__(self, limit_s: float) -> None:
        self._ends_at = time.monotonic() + limit_s * _SHARE

    def may_go_on(self) -> bool:
        return time.monotonic() < self._ends_at


def run_task(
    task: Any,
    parts: Parts,
    settings: WorkerSettings,
    tell: Callable[[Event], None],
    args: object,
    kwargs: dict[str, object],
) -> None:
    """`task`: Celery's own, bound. Raises its Retry; anything else ends here. `tell`: see `extproc.worker.metrics`."""
    began = time.monotonic()
    attempt = _Attempt(task, parts, settings, tell, kwargs)
    tell(Began(attempt.deliveries > 0))
    try:
        attempt.run(is_well_formed=not args and attempt.given.can_replay)
    finally:
        tell(Ended(attempt.outcome, time.monotonic() - began, time.time()))


class _Attempt:
    """One attempt at a task."""

    def __init__(
        self,
        task: Any,
        parts: Parts,
        settings: WorkerSettings,
        tell: Callable[[Event], None],
        kwargs: dict[str, object],
    ) -> None:
        request = task.request
        self._task = task
        self._parts = parts
        self._settings = settings
        self._tell = tell
        self._kwargs = kwargs
        self._number = int(request.retries) + 1
        self.deliveries = deliveries(getattr(request, DELIVERIES_HEADER, None))
        self.outcome = Outcome.DROPPED
        """Once it has run."""
        self.given = failed_task(request.id, kwargs, "", self._number, datetime.now(UTC))
        self._traceparent = getattr(request, "traceparent", None)
        self._headers = {"traceparent": self._traceparent} if self._traceparent else {}
        self._log = structlog.get_logger(__name__).bind(
            task_id=self.given.task_id,
            org_id=self.given.org_id,
            session_id=self.given.session_id,
            attempts=self._number,
        )

    def run(self, *, is_well_formed: bool) -> None:
        """Raises Celery's Retry."""
        with _tracer.start_as_current_span(
            "memory.extract",
            context=parent_of([self._traceparent]),
            kind=trace.SpanKind.CONSUMER,
            attributes={
                names.ORG_ATTRIBUTE: self.given.org_id,
                "ibex.session.id": self.given.session_id,
                "ibex.task.id": self.given.task_id,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            if not is_well_formed:
                self._set_aside(Reason.MALFORMED, "it does not name a session by `session_id` and `org_id`")
            elif self.deliveries >= self._settings.worker_deliveries:
                span.set_status(trace.StatusCode.ERROR, Reason.DEADLY)
                self._set_aside(
                    Reason.DEADLY,
                    f"{self.deliveries} times the process or the worker that had it died; look for what ended them, "
                    "such as too little memory",
                    self.deliveries,
                )
            else:
                self._extract(span)

    def _extract(self, span: trace.Span) -> None:
        try:
            done = self._parts.extraction().run(
                self.given.org_id,
                self.given.session_id,
                Limits(self._settings.worker_limit_s).may_go_on,
                lambda batch: self._tell(batch_of(batch)),
            )
        except (StoreRefused, ExtractorRefused, SettingsError) as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            self._set_aside(Reason.REFUSED, f"{type(error).__name__}: {error}")
        except (StoreError, ExtractorUnavailable) as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            self._again(str(error))
        except SoftTimeLimitExceeded:
            span.set_status(trace.StatusCode.ERROR, "time limit")
            self._set_aside(Reason.TIME, "it took longer than IBEX_WORKER_LIMIT_S")
        except Exception as error:  # noqa: BLE001 - a bug in one session must not stop the others
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            self._log.error("extraction met a bug", error=type(error).__name__, frames=_frames(error))
            self._set_aside(Reason.BUG, f"{type(error).__name__} (a bug, see the worker's log)")
        else:
            _report(done, span, self._log)
            self.outcome = Outcome.DONE
            if not done.is_finished:
                self.outcome = Outcome.CONTINUED
                self._task.apply_async(kwargs=self._kwargs, task_id=self._task.request.id, headers=self._headers)

    def _again(self, problem: str) -> None:
        """Raises Celery's Retry, or ends it when that was the last attempt."""
        if self._number >= self._settings.worker_attempts:
            self._set_aside(Reason.ATTEMPTS, problem)
            return
        wait = wait_s(self._number, self._settings.worker_limit_s)
        self._log.warning("the task is tried again", problem=problem, wait_s=round(wait, 1))
        self.outcome = Outcome.AGAIN
        raise self._task.retry(countdown=wait, headers=self._headers, throw=False) from None

    def _set_aside(self, reason: Reason, error: str, attempts: int | None = None) -> None:
        """Where even that fails, the session stays as it is, and the sweeper sends it again."""
        failed = replace(self.given, error=error, attempts=attempts or self._number, reason=reason)
        try:
            self._parts.set_aside(failed)
        except StoreError as problem:
            self._log.error(
                "a task failed and could not be set aside; the sweeper of the observer sends its session again",
                error=failed.error,
                problem=str(problem),
            )
        else:
            self.outcome = Outcome.SET_ASIDE
            self._tell(SetAside(reason))
            self._log.error("a task was set aside; see `extproc worker failed`", error=failed.error)


def _report(done: Done, span: trace.Span, log: Any) -> None:
    its = done.accounting
    counts = {
        "turns": done.turns,
        "memories": len(done.memories),
        "merged": done.merged,
        "superseded": done.superseded,
        "redacted": its.redacted,
        "unsupported": its.unsupported,
        "input_tokens": its.input_tokens,
        "output_tokens": its.output_tokens,
        "cost": its.cost,
    }
    for name, number in counts.items():
        span.set_attribute(f"ibex.extraction.{name}", number)
    if done.turns:
        log.info("extracted", **{name: number for name, number in counts.items() if number})


def _frames(error: Exception) -> list[str]:
    """Without the exception's words, which may hold what it was given."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
