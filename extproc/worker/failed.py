"""Dead letters: tasks that cannot succeed, with their error, until somebody replays them. Ids, never text."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, select

from extproc.memory.database import Database, act_for, act_for_sweep, insert_into
from extproc.memory.model import InvalidValue, parse_uuid
from extproc.memory.schema import failed_tasks, sessions

__all__ = ["NOBODY", "FailedTask", "FailedTasks", "failed_task"]

NOBODY = "00000000-0000-0000-0000-000000000000"
"""The organisation of tasks that name none."""
_UNNAMED = uuid.UUID("c1c0b3ab-5b0e-5c6e-8d0d-6f7a55f0a0d4")
_MOST_ID_CHARS = 64
_MOST_ERROR_CHARS = 500
_LIST_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class FailedTask:
    task_id: str
    org_id: str
    session_id: str
    """Empty: the task names none, and cannot be replayed."""
    error: str
    attempts: int
    failed_at: datetime
    reason: str = ""
    """Of `extproc.worker.metrics`. The sweeper of sessions leaves `names.DEADLY_TASK` alone."""

    @property
    def can_replay(self) -> bool:
        return bool(self.session_id) and self.org_id != NOBODY


def failed_task(task_id: object, kwargs: object, error: str, attempts: int, now: datetime) -> FailedTask:
    """Of whatever came from the queue: what is not an id is left out."""
    given = kwargs if isinstance(kwargs, dict) else {}
    name = task_id if isinstance(task_id, str) and _is_id(task_id) else ""
    org_id, session_id = _uuid(given.get("org_id")), _uuid(given.get("session_id"))
    # Without an id: one for all tasks of its kind, so that a flood of them is one row.
    name = name or str(uuid.uuid5(_UNNAMED, f"{org_id}\n{session_id}\n{error}"))
    return FailedTask(name, org_id or NOBODY, session_id, error[:_MOST_ERROR_CHARS], attempts, now)


def _is_id(text: str) -> bool:
    return 0 < len(text) <= _MOST_ID_CHARS and text.isascii() and text.replace("-", "").isalnum()


def _uuid(value: object) -> str:
    try:
        return parse_uuid(value, "id") if isinstance(value, str) else ""
    except InvalidValue:
        return ""


class FailedTasks:
    """Every method blocks and raises StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, task: FailedTask) -> None:
        """Once more the same task: attempts add up, and the last error counts."""
        self._database.run(lambda connection: _put(connection, task))

    def all(self) -> list[FailedTask]:
        """Of every organisation, the longest waiting first."""
        return sorted(self._database.run(_all, _LIST_LIMIT_S, writes=False), key=lambda task: task.failed_at)

    def remove(self, task: FailedTask) -> None:
        """As it was seen: one that has failed once more since stays."""

        def work(connection: Connection) -> None:
            act_for(connection, task.org_id)
            c = failed_tasks.c
            mine = (c.org_id == task.org_id, c.task_id == task.task_id, c.failed_at == task.failed_at)
            connection.execute(delete(failed_tasks).where(*mine))

        self._database.run(work)


def _put(connection: Connection, task: FailedTask) -> None:
    act_for(connection, task.org_id)
    c = failed_tasks.c
    row = insert_into(connection.dialect.name, failed_tasks).values(
        task_id=task.task_id,
        org_id=task.org_id,
        payload={"session_id": task.session_id, "org_id": task.org_id, "reason": task.reason},
        error=task.error,
        attempts=task.attempts,
        failed_at=task.failed_at,
    )
    last = ("payload", "error", "failed_at")
    again = {name: row.excluded[name] for name in last} | {"attempts": c.attempts + row.excluded.attempts}
    connection.execute(row.on_conflict_do_update(index_elements=[c.task_id], set_=again))


def _all(connection: Connection) -> list[FailedTask]:
    act_for_sweep(connection)
    orgs = sorted({NOBODY, *connection.execute(select(sessions.c.org_id).distinct()).scalars()})
    c = failed_tasks.c
    found: list[FailedTask] = []
    for org_id in orgs:
        act_for(connection, org_id)
        query = select(c.task_id, c.payload, c.error, c.attempts, c.failed_at).where(c.org_id == org_id)
        found += [
            FailedTask(
                row.task_id,
                org_id,
                str(row.payload.get("session_id", "")),
                row.error,
                row.attempts,
                row.failed_at,
                str(row.payload.get("reason", "")),
            )
            for row in connection.execute(query)
        ]
    return found
