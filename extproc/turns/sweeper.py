"""Looks now and then for what nobody else would notice: idle sessions, expired texts, sessions left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog
from prometheus_client import Counter

from extproc.turns._threads import DaemonThreads
from extproc.turns.sessions import LeftBehind, Sessions
from extproc.turns.sinks import ExtractionTask, Refused, TaskSink, Unavailable
from extproc.turns.turn import task_id

__all__ = ["Sweeper"]

_MOST_SENT = 1_000
"""Sessions in one sweep: the queue gets a backlog in pieces."""
_JITTER = 0.2
"""Of the interval, to both sides: replicas that started together drift apart."""
_CLAIM_SHARE = 0.5
"""Of the interval: a sweep of another replica within this time counts for this one too."""
_STOP_LIMIT_S = 5.0

_ABANDONED = Counter("ibex_sessions_abandoned", "Sessions that ended by silence")
_EXPIRED = Counter("ibex_turn_texts_expired", "Turns whose text was removed because its time was over")
_RESENT = Counter("ibex_sessions_resent", "Sessions that were sent to extraction again")
_FAILED = Counter("ibex_sweeps_failed", "Sweeps that were given up in the middle")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Swept:
    abandoned: int
    expired: int
    sent: int


class Sweeper:
    """One replica sweeps at a time, whoever comes first. No failure ends it: the next sweep does the rest."""

    def __init__(
        self, sessions: Sessions, tasks: TaskSink | None, *, interval_s: float, idle_s: float, after_s: float
    ) -> None:
        """`tasks`: None where there is no queue, and nothing is sent again."""
        self._sessions = sessions
        self._tasks = tasks
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._after_s = after_s
        self._sent: dict[LeftBehind, datetime] = {}
        """When; at most one pause long. After a restart one is sent once more, with the same task id."""
        self._is_failing = False
        self._thread = DaemonThreads(1, "sweeper")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._sweep_now_and_then(), name="sweep sessions")

    async def stop(self) -> None:
        """A sweep under way is left behind: each of its pieces is a transaction, whole or not there."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.wait_for(self._task, _STOP_LIMIT_S)

    async def _sweep_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311
            try:
                swept = await self._thread.run(partial(self.sweep, datetime.now(UTC)))
            except (Unavailable, Refused) as error:
                self._failed(str(error))
            except Exception:  # noqa: BLE001 - whatever it is, the sweeper must live on
                self._failed("a bug, see the traceback")
                _log.exception("sweep_broke")
            else:
                self._succeeded(swept)

    def sweep(self, now: datetime) -> _Swept | None:
        """One sweep; blocks. None: another replica's was a moment ago. Raises Unavailable or Refused."""
        if not self._sessions.claim_sweep(now, self._interval_s * _CLAIM_SHARE):
            return None
        abandoned = self._sessions.abandon_idle(now, self._idle_s)
        _ABANDONED.inc(abandoned)
        expired = self._sessions.expire_texts(now)
        _EXPIRED.inc(expired)
        return _Swept(abandoned, expired, self._send_left_behind(now))

    def _send_left_behind(self, now: datetime) -> int:
        if self._tasks is None:
            return 0
        oldest = now - timedelta(seconds=self._after_s)
        self._sent = {session: at for session, at in self._sent.items() if at > oldest}
        # Those that were sent a moment ago come first again, and must not stand in the way of the others.
        found = self._sessions.left_behind(now, self._after_s, _MOST_SENT + len(self._sent))
        chosen = [session for session in found if session not in self._sent][:_MOST_SENT]
        if chosen:
            self._tasks.send(_tasks_of(chosen))
            self._sent.update((session, now) for session in chosen)
            _RESENT.inc(len(chosen))
        return len(chosen)

    def _failed(self, problem: str) -> None:
        _FAILED.inc()
        if not self._is_failing:
            self._is_failing = True
            _log.warning("sweeps_fail", error=problem, next="each interval tries again; nothing is lost meanwhile")

    def _succeeded(self, swept: _Swept | None) -> None:
        if self._is_failing:
            self._is_failing = False
            _log.info("sweeps_work_again")
        if swept is not None and (swept.abandoned or swept.expired or swept.sent):
            _log.info("swept", abandoned=swept.abandoned, texts_expired=swept.expired, sessions_sent=swept.sent)


def _tasks_of(left_behind: Sequence[LeftBehind]) -> list[ExtractionTask]:
    return [
        ExtractionTask(task_id(one.org_id, one.session_id, one.turn_index), one.session_id, one.org_id)
        for one in left_behind
    ]
