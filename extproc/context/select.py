"""Whether a request gets memories at all, and which: gate, then budget. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from extproc.context.pack import Packed, pack
from extproc.context.render import DATE_TOKENS, WRAPPER_TOKENS, item_tokens
from extproc.context.score import SHARE_OF_BEST, required_relevance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.context.score import Ranking, Scored
    from extproc.memory.text import Query

__all__ = ["select"]


def select(
    ranking: Ranking,
    query: Query,
    *,
    min_relevance: float,
    tokens: int,
    max_memories: int,
    pinned: Sequence[Scored] = (),
    profile: Sequence[Scored] = (),
) -> list[Packed]:
    """A decision for each candidate. `tokens`: of the whole block.

    What is pinned is there whatever is asked; a profile comes along when memories are called for.
    """
    scored = ranking.scored
    gate = required_relevance(query, min_relevance, names_subject=ranking.names_subject, evaluated=ranking.evaluated)
    is_open = bool(scored) and ranking.best_relevance >= gate
    return pack(
        scored,
        tokens=tokens - WRAPPER_TOKENS,
        max_memories=max_memories,
        required=scored[0].composite * SHARE_OF_BEST if is_open else math.inf,
        cost=item_tokens,
        group_cost=DATE_TOKENS,
        standing=[*pinned, *(profile if is_open else ())],
    )
