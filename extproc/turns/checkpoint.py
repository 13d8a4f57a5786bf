"""Turns become rows: session, checkpoint and text of a whole batch in one transaction, on SQLite and PostgreSQL.

Doing it twice adds nothing: a turn is known by its (org, request id).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import Connection, case, insert, select, update
from sqlalchemy.sql.dml import ReturningInsert

from extproc.memory.database import Database, act_for, insert_into
from extproc.memory.schema import checkpoints, sessions, turns
from extproc.memory.store import StoreError, StoreRefused
from extproc.turns.sinks import Refused, Unavailable, Written
from extproc.turns.turn import Entry, Turn

__all__ = ["DatabaseCheckpoints", "sink_errors"]

_MOST_NAME_CHARS = 256
"""Of what a client or a provider calls a model or an answer; no real name is longer."""
_MOST_COUNT = 2**31 - 1
"""Of PostgreSQL's `integer`."""

K = TypeVar("K")
V = TypeVar("V")


class DatabaseCheckpoints:
    """The CheckpointSink of both databases."""

    def __init__(self, database: Database, retention_s: int) -> None:
        """`retention_s`: how long a turn's text is kept after its end."""
        self._database = database
        self._retention = timedelta(seconds=retention_s)

    def write(self, entries: Sequence[Entry]) -> list[Written]:
        with sink_errors():
            return self._database.run(lambda connection: _write(connection, entries, self._retention))

    def close(self) -> None:
        self._database.close()


@contextmanager
def sink_errors() -> Iterator[None]:
    """The store's errors as those of a sink."""
    try:
        yield
    except StoreRefused as error:
        raise Refused(str(error)) from None
    except StoreError as error:
        raise Unavailable(str(error)) from None


def _write(connection: Connection, entries: Sequence[Entry], retention: timedelta) -> list[Written]:
    written: dict[int, Written] = {}
    # In one order everywhere, here and for the sessions of an organisation: two writers wait, and never for each other.
    for org_id, places in sorted(_grouped(range(len(entries)), lambda place: entries[place].turn.org_id).items()):
        act_for(connection, org_id)
        results = _write_org(connection, org_id, [entries[place] for place in places], retention)
        written.update(zip(places, results, strict=True))
    return [written[place] for place in range(len(entries))]


def _write_org(connection: Connection, org_id: str, entries: list[Entry], retention: timedelta) -> list[Written]:
    indexes = _stored(connection, org_id, {entry.turn.request_id for entry in entries})
    new: dict[str, Entry] = {}
    for entry in entries:
        if entry.turn.request_id not in indexes:
            new.setdefault(entry.turn.request_id, entry)
    if new:
        indexes.update(_add(connection, org_id, list(new.values()), retention))
    written = []
    for entry in entries:
        is_new = new.pop(entry.turn.request_id, None) is not None  # of two in one batch the first
        written.append(Written(indexes[entry.turn.request_id], is_new))
    return written


def _stored(connection: Connection, org_id: str, request_ids: set[str]) -> dict[str, int]:
    """Turn indexes of those that are there already.

    What another process adds after this question breaks a unique constraint, and the transaction begins again.
    """
    c = checkpoints.c
    known = select(c.request_id, c.turn_index).where(c.org_id == org_id, c.request_id.in_(request_ids))
    return {row.request_id: row.turn_index for row in connection.execute(known)}


def _add(connection: Connection, org_id: str, new: list[Entry], retention: timedelta) -> dict[str, int]:
    """Turns that are not stored yet, each once. Returns their indexes by request id."""
    by_session = sorted(_grouped(new, lambda entry: entry.turn.session_id).items())
    counts = _count_in_sessions(connection, org_id, by_session)
    numbered = [
        (entry, counts[session_id] - len(its) + place)
        for session_id, its in by_session
        for place, entry in enumerate(its)
    ]
    connection.execute(insert(checkpoints), [_checkpoint(entry.turn, index) for entry, index in numbered])
    texts = [row for entry, index in numbered if (row := _text_row(entry, index, retention)) is not None]
    if texts:
        connection.execute(insert(turns), texts)
    return {entry.turn.request_id: index for entry, index in numbered}


def _count_in_sessions(
    connection: Connection, org_id: str, by_session: list[tuple[str, list[Entry]]]
) -> dict[str, int]:
    """Make or bring up to date the sessions, which stay locked. Returns the turns that each has now."""
    added = {session_id: _session([entry.turn for entry in its]) for session_id, its in by_session}
    rows = connection.execute(_upsert(connection.dialect.name), list(added.values())).all()
    if len(rows) != len(added):
        raise StoreRefused("a session of another organisation has the id of one in this batch")
    requested = {session_id: max(entry.turn.requested_at for entry in its) for session_id, its in by_session}
    revived = [row.id for row in rows if _is_revived(row.status, row.completed_at, requested[row.id])]
    if revived:
        c = sessions.c
        again = update(sessions).where(c.org_id == org_id, c.id.in_(revived)).values(status="active", completed_at=None)
        connection.execute(again)
    return {row.id: row.turn_count for row in rows}


def _is_revived(status: str, completed_at: datetime | None, requested_at: datetime) -> bool:
    """Whether a turn says that its session goes on. One that was under way when the client ended it does not."""
    if status == "completed":
        return completed_at is None or requested_at > completed_at
    return status == "abandoned"


@cache
def _upsert(dialect: str) -> ReturningInsert[Any]:
    """One row a session, with the totals of the turns that are new: the session's if it is new, else added to it."""
    added = insert_into(dialect, sessions)
    c, new = sessions.c, added.excluded
    is_latest = new.updated_at >= c.updated_at
    changes = {
        "turn_count": c.turn_count + new.turn_count,
        "total_input_tokens": c.total_input_tokens + new.total_input_tokens,
        "total_output_tokens": c.total_output_tokens + new.total_output_tokens,
        "total_latency_ms": c.total_latency_ms + new.total_latency_ms,
        "model": case((is_latest, new.model), else_=c.model),
        "provider": case((is_latest, new.provider), else_=c.provider),
        "created_at": case((new.created_at < c.created_at, new.created_at), else_=c.created_at),
        "updated_at": case((is_latest, new.updated_at), else_=c.updated_at),
    }
    upsert = added.on_conflict_do_update(index_elements=[c.id], set_=changes, where=c.org_id == new.org_id)
    return upsert.returning(c.id, c.turn_count, c.status, c.completed_at)


def _session(its: list[Turn]) -> dict[str, object]:
    """What these turns alone would make of their session."""
    latest = max(its, key=lambda turn: turn.completed_at)
    return {
        "id": latest.session_id,
        "org_id": latest.org_id,
        "agent_id": latest.agent_id,
        "user_id": latest.user_id,
        "external_id": latest.external_id,
        "status": "active",
        "model": _name(latest.model),
        "provider": _name(latest.provider),
        "turn_count": len(its),
        "total_input_tokens": sum(_count(turn.input_tokens) or 0 for turn in its),
        "total_output_tokens": sum(_count(turn.output_tokens) or 0 for turn in its),
        "total_latency_ms": sum(_milliseconds(turn) for turn in its),
        "created_at": min(turn.requested_at for turn in its),
        "updated_at": latest.completed_at,
    }


def _checkpoint(turn: Turn, turn_index: int) -> dict[str, object]:
    return {
        "id": turn.checkpoint_id,
        "session_id": turn.session_id,
        "org_id": turn.org_id,
        "agent_id": turn.agent_id,
        "turn_index": turn_index,
        "request_id": turn.request_id,
        "messages_hash": turn.messages_hash,
        "completion_hash": turn.completion_hash,
        "input_tokens": _count(turn.input_tokens),
        "output_tokens": _count(turn.output_tokens),
        "model": _name(turn.model),
        "provider": _name(turn.provider),
        "latency_ms": _milliseconds(turn),
        "provider_request_id": None if turn.provider_request_id is None else _name(turn.provider_request_id),
        "is_streaming": turn.is_streaming,
        "is_complete": turn.is_complete,
        "memories_injected": _count(turn.memories_injected) or 0,
        "context_tokens": _count(turn.context_tokens) or 0,
        "context_fallback": turn.context_fallback,
        "created_at": turn.completed_at,
    }


def _text_row(entry: Entry, turn_index: int, retention: timedelta) -> dict[str, object] | None:
    """None: nothing of this turn is to be kept."""
    turn = entry.turn
    if entry.text is None or turn.skip_extraction:
        return None
    return {
        "session_id": turn.session_id,
        "org_id": turn.org_id,
        "turn_index": turn_index,
        "user_text": _storable(entry.text.user_text),
        "assistant_text": _storable(entry.text.assistant_text),
        "expires_at": turn.completed_at + retention,
    }


def _count(number: int | None) -> int | None:
    """A provider's count; one that cannot be meant is unknown, and no reason to lose the turn."""
    return number if number is not None and 0 <= number <= _MOST_COUNT else None


def _milliseconds(turn: Turn) -> int:
    return int(min(max(turn.total_ms, 0.0), _MOST_COUNT))


def _name(text: str) -> str:
    return _storable(text[:_MOST_NAME_CHARS])


def _storable(text: str) -> str:
    """As PostgreSQL takes it: NUL and halves of a surrogate pair, which JSON can carry, become U+FFFD."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _grouped(items: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    groups: dict[K, list[V]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
