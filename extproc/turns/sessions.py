"""The life of a session beside its turns: ended by the client or by silence, its texts forgotten, left behind or not.

Every method blocks, and raises Unavailable or Refused as a sink does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, and_, delete, func, or_, select, text, update

from extproc import names
from extproc.memory.database import Database, act_for, act_for_sweep, insert_into
from extproc.memory.schema import failed_tasks, sessions, sweeps, turns
from extproc.turns.checkpoint import sink_errors
from extproc.turns.turn import task_id

__all__ = ["LeftBehind", "Sessions", "TerminatedSession"]

_SWEEP_LIMIT_S = 30.0
"""Of one statement: after a long silence there may be many rows."""
_MOST_ABANDONED = 5_000
"""Sessions of one organisation in one sweep: they are locked until it ends, and their next turns wait."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TerminatedSession:
    session_id: str
    external_id: str
    status: str
    turn_count: int
    completed_at: datetime


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """A session with text that nobody has extracted."""

    org_id: str
    session_id: str
    turn_index: int
    """Of the last turn whose text is there."""


class Sessions:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._is_log_due = True
        """Whether SQLite's log may hold texts that were removed: also by a process before this one."""

    def terminate(
        self, org_id: str, agent_id: str, user_id: str | None, external_id: str, now: datetime
    ) -> TerminatedSession | None:
        """The client is done with the session. Again: the same answer. None: no turn of such a session is stored."""
        c = sessions.c
        # By what makes it one, as `sessions_once` has it: another program may have given it an id.
        its_user = func.coalesce(c.user_id, text("''")) == (user_id or "")
        mine = and_(c.org_id == org_id, c.agent_id == agent_id, its_user, c.external_id == external_id)
        with sink_errors():
            return self._database.run(lambda connection: _terminate(connection, org_id, mine, now))

    def claim_sweep(self, now: datetime, pause_s: float) -> bool:
        """Whether the caller is the one to sweep now: nobody has within `pause_s`, on any machine."""
        return self._swept(lambda connection: _claim(connection, now, timedelta(seconds=pause_s)))

    def abandon_idle(self, now: datetime, idle_s: float) -> int:
        """Mark active sessions without a turn since `idle_s`. Returns how many."""
        latest = now - timedelta(seconds=idle_s)
        return self._swept(lambda connection: _abandon(connection, latest))

    def expire_texts(self, now: datetime) -> int:
        """Remove the texts whose time is over. Returns of how many turns."""
        removed = self._swept(lambda connection: _expire(connection, now))
        if removed or self._is_log_due:
            with sink_errors():
                self._is_log_due = not self._database.forget_log()
        return removed

    def left_behind(self, now: datetime, after_s: float, limit: int) -> list[LeftBehind]:
        """Sessions whose last turn is older than `after_s` and has not been extracted; the longest waiting first.

        Without those whose task is set aside since processes die of it.
        Of whatever status: what a client has ended or left can still be learnt from.
        """
        latest = now - timedelta(seconds=after_s)
        return self._swept(lambda connection: _left_behind(connection, latest, limit), writes=False)

    def _swept(self, work: Callable[[Connection], T], *, writes: bool = True) -> T:
        with sink_errors():
            return self._database.run(work, _SWEEP_LIMIT_S, writes=writes)


def _terminate(
    connection: Connection, org_id: str, mine: ColumnElement[bool], now: datetime
) -> TerminatedSession | None:
    act_for(connection, org_id)
    c = sessions.c
    connection.execute(
        update(sessions).where(mine, c.status != "completed").values(status="completed", completed_at=now)
    )
    row = connection.execute(
        select(c.id, c.external_id, c.status, c.turn_count, c.completed_at).where(mine)
    ).one_or_none()
    return None if row is None else TerminatedSession(*row)


def _claim(connection: Connection, now: datetime, pause: timedelta) -> bool:
    """The row of the last sweep decides: whoever moves it forward sweeps. It is locked while somebody tries."""
    act_for_sweep(connection)
    insert = insert_into(connection.dialect.name, sweeps)
    c = sweeps.c
    # One from the future is of a machine whose clock is wrong, and must not stop all others.
    is_due = or_(c.swept_at <= now - pause, c.swept_at > now + pause)
    claim = insert.values(name="sessions", swept_at=now).on_conflict_do_update(
        index_elements=[c.name], set_={"swept_at": insert.excluded.swept_at}, where=is_due
    )
    return connection.execute(claim.returning(c.name)).one_or_none() is not None


def _abandon(connection: Connection, latest: datetime) -> int:
    c = sessions.c
    idle = and_(c.status == "active", c.updated_at <= latest)
    abandoned = 0
    for org_id in _orgs(connection, select(c.org_id).where(idle).distinct()):
        act_for(connection, org_id)
        # One that is locked has a turn just now.
        those = select(c.id).where(c.org_id == org_id, idle).limit(_MOST_ABANDONED).with_for_update(skip_locked=True)
        done = update(sessions).where(c.org_id == org_id, c.id.in_(those)).values(status="abandoned")
        abandoned += connection.execute(done).rowcount
    return abandoned


def _expire(connection: Connection, now: datetime) -> int:
    c = turns.c
    removed = 0
    for org_id in _orgs(connection, _every_org()):
        act_for(connection, org_id)
        removed += connection.execute(delete(turns).where(c.org_id == org_id, c.expires_at <= now)).rowcount
    return removed


def _left_behind(connection: Connection, latest: datetime, limit: int) -> list[LeftBehind]:
    c = sessions.c
    waiting = and_(c.extracted_turns < c.turn_count, c.updated_at <= latest)
    found: list[tuple[datetime, LeftBehind]] = []
    for org_id in _orgs(connection, select(c.org_id).where(waiting).distinct()):
        act_for(connection, org_id)
        deadly = _deadly(connection, org_id)
        last = func.max(turns.c.turn_index)
        query = (
            select(c.updated_at, c.org_id, c.id, last)
            .join(turns, and_(turns.c.session_id == c.id, turns.c.turn_index >= c.extracted_turns))
            .where(c.org_id == org_id, turns.c.org_id == org_id, waiting)
            .group_by(c.id)
            .order_by(c.updated_at, c.id)
            .limit(limit + len(deadly))
        )
        found += [
            (row[0], LeftBehind(*row[1:])) for row in connection.execute(query) if task_id(*row[1:]) not in deadly
        ]
        found.sort(key=lambda pair: pair[0])
        del found[limit:]
    return [session for _, session in found]


def _deadly(connection: Connection, org_id: str) -> set[str]:
    """Tasks that would only end more processes, until `extproc worker replay` sends them or the session goes on."""
    c = failed_tasks.c
    query = select(c.task_id).where(c.org_id == org_id, c.payload["reason"].as_string() == names.DEADLY_TASK)
    return set(connection.execute(query).scalars())


def _orgs(connection: Connection, query: Select[Any]) -> list[str]:
    """The organisations that `query` finds; the only question that goes across them, and to `sessions` only."""
    act_for_sweep(connection)
    return sorted(connection.execute(query).scalars())


@cache
def _every_org() -> Select[Any]:
    """Each organisation once, by jumps along the index: as many steps as organisations, not as sessions."""
    c = sessions.c
    first = select(select(c.org_id).order_by(c.org_id).limit(1).scalar_subquery().label("org_id"))
    walk = first.cte("walk", recursive=True)
    following = select(c.org_id).where(c.org_id > walk.c.org_id).order_by(c.org_id).limit(1).scalar_subquery()
    walk = walk.union_all(select(following.label("org_id")).where(walk.c.org_id.is_not(None)))
    return select(walk.c.org_id).where(walk.c.org_id.is_not(None))
