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

if TYPE_CHECKING:
    from extproc.settings import WorkerSettings
    from extproc.worker.failed import FailedTask
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


def run_task(task: Any, parts: Parts, settings: WorkerSettings, args: object, kwargs: dict[str, object]) -> None:
    """`task`: Celery's own, bound. Raises its Retry; anything else ends here."""
    request = task.request
    attempts = int(request.retries) + 1
    given = failed_task(request.id, kwargs, "it does not name a session by `session_id` and `org_id`", attempts, _now())
    log = structlog.get_logger(__name__).bind(
        task_id=given.task_id, org_id=given.org_id, session_id=given.session_id, attempts=attempts
    )
    traceparent = getattr(request, "traceparent", None)
    headers = {"traceparent": traceparent} if traceparent else {}

    def again(problem: str) -> Exception:
        if attempts >= settings.worker_attempts:
            _set_aside(parts, _with(given, problem), log)
            raise _Ended
        wait = wait_s(attempts, settings.worker_limit_s)
        log.warning("the task is tried again", problem=problem, wait_s=round(wait, 1))
        retry: Exception = task.retry(countdown=wait, headers=headers, throw=False)
        return retry

    with _tracer.start_as_current_span(
        "memory.extract",
        context=parent_of([traceparent]),
        kind=trace.SpanKind.CONSUMER,
        attributes={
            names.ORG_ATTRIBUTE: given.org_id,
            "ibex.session.id": given.session_id,
            "ibex.task.id": given.task_id,
        },
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            if args or not given.can_replay:
                _set_aside(parts, given, log)
                return
            done = parts.extraction().run(given.org_id, given.session_id, Limits(settings.worker_limit_s).may_go_on)
        except (StoreRefused, ExtractorRefused, SettingsError) as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            _set_aside(parts, _with(given, f"{type(error).__name__}: {error}"), log)
        except (StoreError, ExtractorUnavailable) as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            try:
                raise again(str(error)) from None
            except _Ended:
                return
        except SoftTimeLimitExceeded:
            span.set_status(trace.StatusCode.ERROR, "time limit")
            _set_aside(parts, _with(given, "it took longer than IBEX_WORKER_LIMIT_S"), log)
        except Exception as error:  # noqa: BLE001 - a bug in one session must not stop the others
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            log.error("extraction met a bug", error=type(error).__name__, frames=_frames(error))  # noqa: TRY400 - no words of it
            _set_aside(parts, _with(given, f"{type(error).__name__} (a bug, see the worker's log)"), log)
        else:
            _report(done, span, log)
            if not done.is_finished:
                task.apply_async(kwargs=kwargs, task_id=request.id, headers=headers)


class _Ended(Exception):
    """No further attempt."""


def _set_aside(parts: Parts, failed: FailedTask, log: Any) -> None:
    """Where even that fails, the session stays as it is, and the sweeper sends it again."""
    try:
        parts.set_aside(failed)
    except StoreError as error:
        log.error(  # noqa: TRY400 - expected
            "a task failed and could not be set aside; the sweeper of the observer sends its session again",
            error=failed.error,
            problem=str(error),
        )
    else:
        log.error("a task was set aside; see `extproc worker failed`", error=failed.error)


def _report(done: Done, span: trace.Span, log: Any) -> None:
    its = done.accounting
    counts = {
        "turns": done.turns,
        "memories": len(done.memories),
        "revised": done.revised,
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


def _with(task: FailedTask, error: str) -> FailedTask:
    return replace(task, error=error)


def _frames(error: Exception) -> list[str]:
    """Without the exception's words, which may hold what it was given."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]


def _now() -> datetime:
    return datetime.now(UTC)
