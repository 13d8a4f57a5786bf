"""What consolidation decided, as rows to write: new ones, and changes of those that are there. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import assert_never

from extproc.memory.model import InvalidValue, Memory, Namespace, Source, Status, new_memory
from extproc.worker.consolidate import Add, Candidate, Decision, Merge, Noop, Supersede, fact_metadata

__all__ = ["Plan", "make_plan", "quarantined"]


@dataclass(frozen=True, slots=True)
class Plan:
    new: list[Memory]
    """Active, or already superseded by one that is known."""
    revised: list[Memory]
    """Memories that are there, as they are from now on."""
    unwritable: int = 0
    """Candidates that no row can hold."""


def make_plan(
    decisions: Iterable[Decision],
    known: Mapping[str, Memory],
    namespace: Namespace,
    session_id: str,
    now: datetime,
    metadata: Mapping[str, object] | None = None,
) -> Plan:
    """`known`: by id, all that was given to `consolidate`. `metadata`: further entries of each new row.

    Memories of one turn are a microsecond apart, in their order: by their time alone they are shown as they were said,
    where their ids have none.
    """
    rows = dict(known)
    new: dict[str, None] = {}
    touched: dict[str, None] = {}
    unwritable = 0
    made: Counter[int] = Counter()

    def put(memory: Memory) -> None:
        rows[memory.id] = memory
        if memory.id not in new:
            touched[memory.id] = None

    for decision in decisions:
        match decision:
            case Noop():
                pass
            case Merge(into, confidence, seen_at):
                if into in rows:
                    said = {**rows[into].metadata, "said_at": seen_at.isoformat()}
                    put(replace(rows[into], confidence=confidence, metadata=said))
            case Add(candidate) | Supersede(candidate):
                turn = candidate.extracted.turn_index
                try:
                    memory = _memory(candidate, namespace, session_id, now, metadata or {})
                except InvalidValue:
                    unwritable += 1
                    continue
                memory = replace(memory, created_at=memory.created_at + timedelta(microseconds=made[turn]))
                made[turn] += 1
                new[memory.id] = None
                put(_past(memory, decision) if isinstance(decision, Add) else memory)
                if isinstance(decision, Supersede):
                    for old in decision.replaces:
                        put(_superseded(rows[old], memory.id, decision.valid_until))
            case _:
                assert_never(decision)
    return Plan([rows[one] for one in new], [rows[one] for one in touched], unwritable)


def quarantined(
    candidates: Iterable[Candidate], namespace: Namespace, session_id: str, now: datetime, written: frozenset[str]
) -> list[Memory]:
    """Rows for what is kept apart; those that are there stay as they are."""
    made: dict[str, Memory] = {}
    for candidate in candidates:
        if candidate.id not in written:
            try:
                memory = _memory(candidate, namespace, session_id, now, {})
            except InvalidValue:
                continue
            made[memory.id] = replace(memory, status=Status.QUARANTINED)
    return list(made.values())


def _memory(
    candidate: Candidate, namespace: Namespace, session_id: str, now: datetime, metadata: Mapping[str, object]
) -> Memory:
    """Raises InvalidValue."""
    new = candidate.extracted
    return new_memory(
        namespace,
        new.content,
        id=candidate.id,
        now=now,
        category=new.category,
        confidence=new.confidence,
        source=Source.EXTRACTED,
        created_at=new.at,
        session_id=session_id,
        turn_index=new.turn_index,
        valid_from=new.valid_from,
        valid_until=new.valid_until,
        metadata={**metadata, **fact_metadata(new)},
    )


def _past(memory: Memory, decision: Add) -> Memory:
    if decision.superseded_by is None:
        return memory
    return _superseded(memory, decision.superseded_by, decision.valid_until or memory.created_at)


def _superseded(memory: Memory, by: str, until: datetime) -> Memory:
    """Where it had an end already, the earlier one counts."""
    ends = until if memory.valid_until is None else min(until, memory.valid_until)
    return replace(memory, status=Status.SUPERSEDED, superseded_by=by, valid_until=ends)
