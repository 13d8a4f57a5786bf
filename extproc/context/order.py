"""In which order memories are shown, and which share a date line. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date

    from extproc.memory.model import Memory

__all__ = ["chronological", "group"]


def group(memory: Memory) -> tuple[str, date]:
    """Memories of one group stand under one date line: a day of a session, or of no session."""
    return memory.session_id or "", (memory.valid_from or memory.created_at).date()


def chronological(memories: Sequence[Memory]) -> list[Memory]:
    """By session, sessions by their earliest memory here, and by time within: a model reads them as they happened."""
    began: dict[tuple[str, str], float] = {}

    def session(memory: Memory) -> tuple[str, str]:
        name, day = group(memory)
        return name, "" if name else day.isoformat()

    for memory in memories:
        at = memory.created_at.timestamp()
        began[session(memory)] = min(at, began.get(session(memory), at))

    def key(memory: Memory) -> tuple[object, ...]:
        its = session(memory)
        said = memory.created_at.timestamp(), memory.turn_index or 0, memory.content, memory.id
        return began[its], its, group(memory), *said

    return sorted(memories, key=key)
