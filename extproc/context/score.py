"""How much a memory matters to a request, on a fixed scale, with its parts. Pure.

Relevance decides. Recency, usefulness and confidence only break ties, each by a few per cent, unless the caller asks
for more: letting them decide costs almost all of the recall (LoCoMo R@10 9 in place of 65).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from extproc.memory.text import Subject

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from extproc.context.retrieve import Hit
    from extproc.memory.model import Memory
    from extproc.memory.text import Query

__all__ = ["DEFAULT_WEIGHTS", "SCORE_SCHEMA", "Scored", "Weights", "required_relevance", "score"]

SCORE_SCHEMA = "ibex.lexical.v1"
"""What a score means: relevance is BM25 over the query's sum of idf. Changes when a number changes its meaning."""

RECENCY_HALF_LIFE_DAYS = 30.0
"""Counted back from the newest memory found, not from now: a block must not change because a day has passed."""
NEUTRAL = 0.5
"""The value of recency and usefulness that moves nothing."""
NEUTRAL_CONFIDENCE = 0.8
"""The default confidence of a memory."""

_FACTORS = {Subject.AUTHOR: 1.0, Subject.NAMED: 2.0, Subject.ANYTHING: 3.0}
"""How much more a query must match that does not speak of its author. "Fix this Python error" shares a third of its
information with "The user prefers Python" and needs none of it; "what is my name" rarely shares less than half. At the
default minimum 95 % of LoCoMo's questions, which name people, pass."""
_MOST_REQUIRED = 0.6
"""A query that matches this much is answered, whatever the minimum times the factor is."""

_SHARE_OF_BEST = 0.25
"""Behind a good match, one with less than a quarter of it is noise: without them a block is 10 % shorter and holds the
same evidence (LoCoMo, 1,024 tokens)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How far each part moves the score: `relevance ** relevance * product(1 + weight * (part - neutral))`."""

    relevance: float = 1.0
    recency: float = 0.05
    usefulness: float = 0.05
    confidence: float = 0.05


DEFAULT_WEIGHTS = Weights()


class Scored(NamedTuple):
    memory: Memory
    composite: float
    relevance: float
    recency: float
    usefulness: float
    confidence: float


def score(hits: Iterable[Hit], newest: datetime, weights: Weights = DEFAULT_WEIGHTS) -> list[Scored]:
    """Best first; equal ones by id. `newest`: the latest creation among the hits, or later."""
    newest_day = newest.toordinal()
    scored = [_score(hit, newest_day, weights) for hit in hits]
    scored.sort(key=lambda one: (-one.composite, one.memory.id))
    return scored


def required_relevance(query: Query, minimum: float, best: float) -> float:
    """What each memory must reach. Above `best`, the highest relevance found, when the query needs no memory at all."""
    gate = max(minimum, min(_MOST_REQUIRED, minimum * _FACTORS[query.subject]))
    return best * _SHARE_OF_BEST if best >= gate else gate


def _score(hit: Hit, newest_day: int, weights: Weights) -> Scored:
    memory = hit.memory
    days = max(0, newest_day - memory.created_at.toordinal())
    recency = 0.5 ** (days / RECENCY_HALF_LIFE_DAYS)
    relevance = hit.relevance if weights.relevance == 1.0 else hit.relevance**weights.relevance
    composite = (
        relevance
        * (1 + weights.recency * (recency - NEUTRAL))
        * (1 + weights.usefulness * (memory.usefulness - NEUTRAL))
        * (1 + weights.confidence * (memory.confidence - NEUTRAL_CONFIDENCE))
    )
    return Scored(memory, composite, hit.relevance, recency, memory.usefulness, memory.confidence)
