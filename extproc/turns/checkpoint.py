"""Turns become rows: session, checkpoint and text of a whole batch in one transaction, on SQLite and PostgreSQL.

Doing it twice adds nothing: a turn is known by its (org, request id).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, case, insert, select, update
from sqlalchemy.sql.dml import ReturningInsert

from extproc.memory.database import Database, act_for, insert_into
from extproc.memory.schema import checkpoints, sessions, sessions_once, turns
from extproc.memory.store import StoreError, StoreRefused
from extproc.turns.sinks import Refused, Unavailable, Written
from extproc.turns.turn import Entry, Turn

__all__ = ["DatabaseCheckpoints", "sink_errors"]

_MOST_NAME_CHARS = 256
"""Of what a client or a provider calls a model or an answer; no real name is longer."""
_MOST_COUNT = 2**31 - 1
"""Of PostgreSQL's `integer`."""

_Key = tuple[str, str, str]
"""What makes a session of an organisation one: agent, user (empty: none) and the client's name for it. Its id need not
be the derived one, for another program may have made the row."""

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


@dataclass(frozen=True, slots=True)
class _Place:
    session_id: str
    turn_index: int


_Exchange = tuple[_Key, datetime, str, str | None]
"""Tells two exchanges with one request id from each other."""


def _write_org(connection: Connection, org_id: str, entries: list[Entry], retention: timedelta) -> list[Written]:
    places, exchanges = _stored(connection, org_id, {entry.turn.request_id for entry in entries})
    new: dict[str, Entry] = {}
    for entry in entries:
        if entry.turn.request_id not in places:
            new.setdefault(entry.turn.request_id, entry)  # of two in one batch the first
    if new:
        places |= _add(connection, org_id, list(new.values()), retention)
        exchanges |= {request_id: _exchange(entry.turn) for request_id, entry in new.items()}
    written = []
    for entry in entries:
        request_id = entry.turn.request_id
        is_same = exchanges.get(request_id) == _exchange(entry.turn)
        if is_same:
            del exchanges[request_id]  # an entry is in a batch once
        place = places[request_id]
        written.append(Written(place.turn_index, is_same and request_id in new, place.session_id, is_same))
    return written


def _stored(
    connection: Connection, org_id: str, request_ids: set[str]
) -> tuple[dict[str, _Place], dict[str, _Exchange]]:
    """Those that are there already, by request id.

    What another process adds after this question breaks a unique constraint, and the transaction begins again.
    """
    c, s = checkpoints.c, sessions.c
    known = (
        select(
            *(c.request_id, c.session_id, c.turn_index, c.created_at, c.messages_hash, c.completion_hash),
            *(s.agent_id, s.user_id, s.external_id),
        )
        .join(sessions, c.session_id == s.id)
        .where(c.org_id == org_id, c.request_id.in_(request_ids))
    )
    rows = connection.execute(known).all()
    places = {row.request_id: _Place(row.session_id, row.turn_index) for row in rows}
    exchanges = {row.request_id: (_key(row), row.created_at, row.messages_hash, row.completion_hash) for row in rows}
    return places, exchanges


def _exchange(turn: Turn) -> _Exchange:
    return _key(turn), turn.completed_at, turn.messages_hash, turn.completion_hash


def _key(owner: Turn | Row[*tuple[Any, ...]]) -> _Key:
    return owner.agent_id, owner.user_id or "", owner.external_id


def _add(connection: Connection, org_id: str, new: list[Entry], retention: timedelta) -> dict[str, _Place]:
    """Turns that are not stored yet, each once. Returns where they are by request id."""
    by_session = dict(sorted(_grouped(new, lambda entry: _key(entry.turn)).items()))
    rows = _count_in_sessions(connection, org_id, by_session)
    placed = [
        (entry, _Place(rows[key].id, rows[key].turn_count - len(its) + number))
        for key, its in by_session.items()
        for number, entry in enumerate(its)
    ]
    connection.execute(insert(checkpoints), [_checkpoint(entry.turn, place) for entry, place in placed])
    texts = [row for entry, place in placed if (row := _text_row(entry, place, retention)) is not None]
    if texts:
        connection.execute(insert(turns), texts)
    return {entry.turn.request_id: place for entry, place in placed}


def _count_in_sessions(
    connection: Connection, org_id: str, by_session: dict[_Key, list[Entry]]
) -> dict[_Key, Row[Any]]:
    """Make or bring up to date the sessions, which stay locked. Returns id and number of turns that each has now."""
    added = [_session([entry.turn for entry in its]) for its in by_session.values()]
    rows = {_key(row): row for row in connection.execute(_upsert(connection.dialect.name), added)}
    revived = [
        row.id
        for key, row in rows.items()
        if _is_revived(row.status, row.completed_at, max(entry.turn.requested_at for entry in by_session[key]))
    ]
    if revived:
        c = sessions.c
        again = update(sessions).where(c.org_id == org_id, c.id.in_(revived)).values(status="active", completed_at=None)
        connection.execute(again)
    return rows


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
    upsert = added.on_conflict_do_update(index_elements=sessions_once.expressions, set_=changes)
    return upsert.returning(c.id, c.agent_id, c.user_id, c.external_id, c.turn_count, c.status, c.completed_at)


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


def _checkpoint(turn: Turn, place: _Place) -> dict[str, object]:
    return {
        "id": turn.checkpoint_id,
        "session_id": place.session_id,
        "org_id": turn.org_id,
        "agent_id": turn.agent_id,
        "turn_index": place.turn_index,
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


def _text_row(entry: Entry, place: _Place, retention: timedelta) -> dict[str, object] | None:
    """None: nothing of this turn is to be kept."""
    turn = entry.turn
    if entry.text is None or turn.skip_extraction:
        return None
    return {
        "session_id": place.session_id,
        "org_id": turn.org_id,
        "turn_index": place.turn_index,
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
