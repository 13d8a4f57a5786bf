"""A session's turns become memories, exactly once: read what is due, extract, and write all of it in one transaction.

The session's row decides. It says how many turns are done with (`extracted_turns`), is locked while they are written,
and moves on in the transaction that writes their memories and removes their texts. Whoever finds that it moved
meanwhile throws its own work away. So a task may run twice, or beside another, or end anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import structlog
from opentelemetry import trace
from sqlalchemy import Connection, and_, delete, select, update

from extproc import names
from extproc.memory.database import Database, act_for
from extproc.memory.forgetting import forgotten_until
from extproc.memory.model import Memory, Namespace, Status, content_hash
from extproc.memory.schema import checkpoints, sessions, turns
from extproc.memory.text import stems
from extproc.telemetry.spans import traceparent_of
from extproc.worker.consolidate import Candidate, Known, Vector, consolidate, memory_id
from extproc.worker.extract import EPISODE, Accounting, Extracted, Extractor, Turn
from extproc.worker.plan import Plan, make_plan, quarantined

if TYPE_CHECKING:
    from extproc.memory.embedding import Embedder
    from extproc.memory.rows import Rows
    from extproc.memory.store import MemoryStore

__all__ = ["Done", "SessionExtraction"]

_NEAREST = 16
"""Memories that may be near duplicates of one episode, by its rarest words."""
_READ_LIMIT_S = 5.0

_tracer = trace.get_tracer(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a session's turns."""

    turns: int = 0
    memories: tuple[str, ...] = ()
    """Ids of those that were written."""
    quarantined: int = 0
    """Of these: kept apart."""
    merged: int = 0
    """Memories that were there and were said again."""
    superseded: int = 0
    """Memories that were there and no longer hold."""
    unwritable: int = 0
    """No row can hold them."""
    accounting: Accounting = field(default_factory=Accounting)
    is_finished: bool = True
    """False: turns are left, for another task."""

    def __add__(self, other: Done) -> Done:
        return Done(
            self.turns + other.turns,
            self.memories + other.memories,
            self.quarantined + other.quarantined,
            self.merged + other.merged,
            self.superseded + other.superseded,
            self.unwritable + other.unwritable,
            self.accounting + other.accounting,
            other.is_finished,
        )


@dataclass(frozen=True, slots=True)
class _Due:
    """Turns of a session that nobody has extracted."""

    namespace: Namespace
    session_id: str
    first: int
    """Turns that are done with."""
    end: int
    """Turns that are, once these are written: what has no text is passed over."""
    turns: list[Turn]
    forgotten_until: datetime | None
    """What was said up to then is not among the turns."""


class SessionExtraction:
    """The parts of a worker's process; one task at a time."""

    def __init__(
        self, database: Database, store: MemoryStore, embedder: Embedder, extractor: Extractor, turns_at_once: int
    ) -> None:
        """`embedder`: for comparing texts with each other; the measured limits are those of the word table.

        `store` lies in `database`. Both are closed by who opened them.
        """
        self._database = database
        self._store = store
        self._embedder = embedder
        self._extractor = extractor
        self._turns_at_once = turns_at_once

    def run(
        self,
        org_id: str,
        session_id: str,
        may_go_on: Callable[[], bool] = lambda: True,
        on_batch: Callable[[Done], None] = lambda _: None,
    ) -> Done:
        """All that is due, batch after batch, as long as it may. Raises StoreError, ExtractorUnavailable, -Refused.

        `on_batch` hears of each as soon as it is written, since a later one may fail.
        """
        done = Done()
        while (due := self._read(org_id, session_id)) is not None:
            if not may_go_on():
                done = replace(done, is_finished=False)
                break
            batch = self._extract(due)
            on_batch(batch)
            done += batch
        if done.turns:
            self._database.forget_log()
        return done

    def _read(self, org_id: str, session_id: str) -> _Due | None:
        return self._database.run(
            lambda connection: _due(connection, org_id, session_id, self._turns_at_once), _READ_LIMIT_S, writes=False
        )

    def _extract(self, due: _Due) -> Done:
        extraction = self._extractor.extract(due.turns)
        candidates = self._candidates(due, extraction.memories)
        near = self._near(due.namespace, [one for one in candidates if one.extracted.slot == EPISODE])
        with _tracer.start_as_current_span("memory.write") as span:
            traceparent = traceparent_of(span.get_span_context())
            marks = {"traceparent": traceparent} if traceparent else {}
            plan = self._store.transact(
                due.namespace.org_id, lambda rows: self._write(rows, due, candidates, near, marks)
            )
            if plan is None:
                # Somebody else was quicker; the model was asked all the same.
                return Done(accounting=extraction.accounting)
            ids = tuple(memory.id for memory in plan.new)
            span.set_attribute(names.MEMORY_IDS_ATTRIBUTE, ids)
        if plan.unwritable:
            structlog.get_logger(__name__).warning(
                "memories were left out: no row can hold them", session_id=due.session_id, count=plan.unwritable
            )
        superseded = sum(memory.status is Status.SUPERSEDED for memory in plan.revised)
        return Done(
            turns=due.end - due.first,
            memories=ids,
            quarantined=sum(memory.status is Status.QUARANTINED for memory in plan.new),
            merged=len(plan.revised) - superseded,
            superseded=superseded,
            unwritable=plan.unwritable,
            accounting=extraction.accounting,
        )

    def _candidates(self, due: _Due, found: Sequence[Extracted]) -> list[Candidate]:
        vectors = self._vectors([one.content for one in found])
        return [
            Candidate(memory_id(due.namespace, due.session_id, one), one, vector)
            for one, vector in zip(found, vectors, strict=True)
        ]

    def _near(self, namespace: Namespace, episodes: Sequence[Candidate]) -> set[str]:
        """Ids of memories that might say the same. Asked before the write, which looks at them again."""
        return {
            row.memory.id
            for episode in episodes
            for row in self._store.candidates(
                namespace, list(dict.fromkeys(stems(episode.extracted.content))), None, _NEAREST
            )
            if namespace.owns(row.memory)
        }

    def _write(
        self, rows: Rows, due: _Due, candidates: list[Candidate], near: set[str], marks: Mapping[str, object]
    ) -> Plan | None:
        """In the transaction. None: somebody else has extracted these turns, or their owner was forgotten meanwhile."""
        if candidates:
            rows.lock(due.namespace)
            if forgotten_until(rows.connection, due.namespace) != due.forgotten_until:
                return None
        if not _claim(rows.connection, due):
            return None
        now = datetime.now(UTC)
        plan = Plan([], [])
        if candidates:
            plan = self._plan(rows, due, candidates, near, marks, now)
            rows.revise(due.namespace, plan.revised, now)
            rows.add_many(plan.new)
        _forget_texts(rows.connection, due)
        return plan

    def _plan(
        self,
        rows: Rows,
        due: _Due,
        candidates: list[Candidate],
        near: set[str],
        marks: Mapping[str, object],
        now: datetime,
    ) -> Plan:
        plain = [one for one in candidates if not one.extracted.is_quarantined]
        apart = [one for one in candidates if one.extracted.is_quarantined]
        written = rows.existing(due.namespace.org_id, {one.id for one in candidates})
        hashes = {content_hash(one.extracted.content) for one in plain}
        slots = {one.extracted.slot for one in plain if one.extracted.slot != EPISODE}
        known = {memory.id: memory for memory in rows.known(due.namespace, hashes, slots, near)}
        decisions = consolidate(plain, self._compared(list(known.values())), written)
        plan = make_plan(decisions, known, due.namespace, due.session_id, now, marks)
        return replace(plan, new=[*plan.new, *quarantined(apart, due.namespace, due.session_id, now, written)])

    def _compared(self, known: list[Memory]) -> list[Known]:
        vectors = self._vectors([memory.content for memory in known])
        return [Known.of(memory, vector) for memory, vector in zip(known, vectors, strict=True)]

    def _vectors(self, texts: list[str]) -> list[Vector | None]:
        """None: no word of it is known."""
        return [vector.tolist() if vector.any() else None for vector in self._embedder.embed(texts)] if texts else []


def _due(connection: Connection, org_id: str, session_id: str, most: int) -> _Due | None:
    """None: there is no such session, or nothing is left of it."""
    act_for(connection, org_id)
    s, t, c = sessions.c, turns.c, checkpoints.c
    query = select(s.agent_id, s.user_id, s.extracted_turns, s.turn_count).where(
        s.org_id == org_id, s.id == session_id, s.extracted_turns < s.turn_count
    )
    session = connection.execute(query).one_or_none()
    if session is None:
        return None
    texts = (
        select(t.turn_index, t.user_text, t.assistant_text, c.created_at, c.latency_ms)
        .join(checkpoints, and_(c.session_id == t.session_id, c.turn_index == t.turn_index))
        .where(
            *(t.org_id == org_id, c.org_id == org_id, t.session_id == session_id),
            *(t.turn_index >= session.extracted_turns, t.turn_index < session.turn_count),
        )
        .order_by(t.turn_index)
        .limit(most)
    )
    rows = connection.execute(texts).all()
    end = rows[-1].turn_index + 1 if len(rows) == most else session.turn_count
    namespace = Namespace(org_id, session.agent_id, session.user_id)
    until = forgotten_until(connection, namespace)
    # A turn is stored when its answer ends, and was said when its request came.
    its = [
        Turn(session_id, *row[:4])
        for row in rows
        if until is None or row.created_at - timedelta(milliseconds=row.latency_ms) > until
    ]
    return _Due(namespace, session_id, session.extracted_turns, end, its, until)


def _claim(connection: Connection, due: _Due) -> bool:
    """Lock the session, and move it on if it stands where it was read. SQLite's writers exclude each other anyway."""
    c = sessions.c
    mine = and_(c.org_id == due.namespace.org_id, c.id == due.session_id)
    extracted = connection.execute(select(c.extracted_turns).where(mine).with_for_update()).scalar_one_or_none()
    if extracted != due.first:
        return False
    connection.execute(update(sessions).where(mine).values(extracted_turns=due.end))
    return True


def _forget_texts(connection: Connection, due: _Due) -> None:
    c = turns.c
    mine = and_(c.org_id == due.namespace.org_id, c.session_id == due.session_id, c.turn_index < due.end)
    connection.execute(delete(turns).where(mine))
