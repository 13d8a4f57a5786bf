"""Choosing what goes into the block: greedy by score within the budget. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from extproc.context.order import group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import date

    from extproc.context.score import Scored
    from extproc.memory.model import Memory

__all__ = ["STANDING_SHARE", "Exclusion", "Packed", "pack"]

STANDING_SHARE = 0.15
"""Of the budget, at most, for what is there whatever is asked: a full block still answers the question."""


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
    group_cost: int = 0,
    standing: Sequence[Scored] = (),
) -> list[Packed]:
    """A decision for each candidate, `standing` ones first, then in the order given (best first).

    A candidate that does not fit is skipped, and smaller ones behind it still get in. `tokens`: what is left after the
    wrapper. `required`: score below which nothing is included, but for standing ones, which have a share of the budget
    of their own. `group_cost`: tokens of a date line, which the first memory of a group pays.
    """
    decisions: list[Packed] = []
    included: set[str] = set()
    groups: set[tuple[str, date]] = set()
    left = tokens

    def decide(candidate: Scored, room: int) -> int:
        """Returns what it took."""
        memory = candidate.memory
        key = group(memory)
        line = 0 if key in groups else group_cost
        price = memory.content_tokens + line
        if len(included) == max_memories or price > room or (price := cost(memory) + line) > room:
            decisions.append(Packed(candidate, Exclusion.BUDGET, price))
            return 0
        decisions.append(Packed(candidate, Exclusion.INCLUDED, price))
        included.add(memory.id)
        groups.add(key)
        return price

    room = int(tokens * STANDING_SHARE)
    for candidate in standing:
        taken = decide(candidate, room)
        room -= taken
        left -= taken
        if not taken:
            decisions.pop()  # it may still get in by its score
    for candidate in scored:
        if candidate.memory.id in included:
            continue
        if candidate.composite < required:
            decisions.append(Packed(candidate, Exclusion.FILTER, candidate.memory.content_tokens))
        else:
            left -= decide(candidate, left)
    return decisions
