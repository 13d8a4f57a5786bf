"""Forgetting all that somebody said: what is remembered of it, and what waits to be.

Removing memories alone is not enough. Turns that nobody has extracted yet lie in `turns`, in a worker's hands, or in an
outbox on another machine, and would become memories a moment later. So the owner is marked with the time: of what was
said until then, whoever extracts learns nothing (`forgotten_until`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import and_, delete, select

from extproc.memory.database import insert_into
from extproc.memory.schema import forgotten, sessions, turns

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement, Connection

    from extproc.memory.model import Namespace
    from extproc.memory.rows import Rows
    from extproc.memory.store import MemoryStore

__all__ = ["Forgotten", "forget_owner", "forgotten_until"]


@dataclass(frozen=True, slots=True)
class Forgotten:
    memories: int
    turn_texts: int
    """Of turns that were not extracted yet."""


def forget_owner(store: MemoryStore, partition: Namespace, now: datetime) -> Forgotten:
    """All of exactly this partition, for good. Again: what is left, and a later time. Raises StoreError.

    The mark comes first: what a worker writes before it is removed with the rest, and after it a worker writes nothing.
    """
    texts = store.transact(partition.org_id, lambda rows: _mark(rows, partition, now))
    return Forgotten(store.forget_all(partition), texts)


def forgotten_until(connection: Connection, partition: Namespace) -> datetime | None:
    """Nothing may be learnt of what was said up to then; None: nothing was forgotten.

    Who writes memories asks within the transaction that writes them, once it holds the agent's lock.
    """
    until: datetime | None = connection.execute(
        select(forgotten.c.said_until).where(_marks(partition))
    ).scalar_one_or_none()
    return until


def _mark(rows: Rows, partition: Namespace, now: datetime) -> int:
    """Returns how many texts were removed."""
    rows.lock(partition)
    connection, c = rows.connection, forgotten.c
    mark = insert_into(connection.dialect.name, forgotten).values(
        org_id=partition.org_id, agent_id=partition.agent_id, user_id=partition.user_id or "", said_until=now
    )
    later = mark.on_conflict_do_update(
        index_elements=[c.org_id, c.agent_id, c.user_id],
        set_={"said_until": mark.excluded.said_until},
        where=mark.excluded.said_until > c.said_until,
    )
    connection.execute(later)
    s = sessions.c
    user = s.user_id.is_(None) if partition.user_id is None else s.user_id == partition.user_id
    theirs = select(s.id).where(s.org_id == partition.org_id, s.agent_id == partition.agent_id, user)
    texts = delete(turns).where(turns.c.org_id == partition.org_id, turns.c.session_id.in_(theirs))
    return connection.execute(texts).rowcount


def _marks(partition: Namespace) -> ColumnElement[bool]:
    c = forgotten.c
    return and_(c.org_id == partition.org_id, c.agent_id == partition.agent_id, c.user_id == (partition.user_id or ""))
