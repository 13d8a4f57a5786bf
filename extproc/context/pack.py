"""Choosing what goes into the block: greedy by score within the budget. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.context.score import Scored
    from extproc.memory.model import Memory

__all__ = ["Exclusion", "Packed", "chronological", "pack"]


class Exclusion(StrEnum):
    """What became of a candidate, in the words of the protocol."""

    INCLUDED = "included"
    BUDGET = "budget"
    """It did not fit: too many tokens, or enough memories already."""
    FILTER = "filter"
    """It matters too little."""


class Packed(NamedTuple):
    scored: Scored
    exclusion: Exclusion
    tokens: int
    """What it costs, rendered; of the content alone when that was enough to leave it out."""


def pack(
    scored: Sequence[Scored],
    *,
    tokens: int,
    max_memories: int,
    required: float,
    cost: Callable[[Memory], int],
) -> list[Packed]:
    """A decision for each candidate, in the order given (best first). `tokens`: what is left after the wrapper.

    A candidate that does not fit is skipped, and smaller ones behind it still get in. `required`: relevance below which
    nothing is included.
    """
    decisions = []
    included = 0
    for candidate in scored:
        price = candidate.memory.content_tokens
        if candidate.relevance < required:
            exclusion = Exclusion.FILTER
        elif included == max_memories or price > tokens or (price := cost(candidate.memory)) > tokens:
            exclusion = Exclusion.BUDGET
        else:
            exclusion = Exclusion.INCLUDED
            included += 1
            tokens -= price
        decisions.append(Packed(candidate, exclusion, price))
    return decisions


def chronological(memories: Sequence[Memory]) -> list[Memory]:
    """By session, sessions by their earliest memory here, and by time within: a model reads them as they happened."""
    began: dict[str | None, float] = {}
    for memory in memories:
        at = memory.created_at.timestamp()
        began[memory.session_id] = min(at, began.get(memory.session_id, at))

    def key(memory: Memory) -> tuple[float, str, float, int, str]:
        at = memory.created_at.timestamp()
        start = at if memory.session_id is None else began[memory.session_id]
        return (start, memory.session_id or "", at, memory.turn_index or 0, memory.id)

    return sorted(memories, key=key)
