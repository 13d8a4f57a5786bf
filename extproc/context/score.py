"""How much a memory matters to a request, on a fixed scale, with its parts. Pure.

Relevance decides. Recency, usefulness and confidence only break ties, each by a few per cent, unless the caller or the
question asks for more: letting them decide costs almost all of the recall (LoCoMo R@10 9 in place of 79).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from extproc.context.index import NONE
from extproc.memory.text import Moment, Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from extproc.context.retrieve import Pool
    from extproc.memory.model import Memory
    from extproc.memory.text import Query

__all__ = [
    "CHANCES", "DEFAULT_PARTS", "DEFAULT_WEIGHTS", "SCORE_SCHEMA", "SHARE_OF_BEST", "Parts", "Ranking", "Scored",
    "Weights", "rank", "relevances", "required_relevance", "unranked",
]  # fmt: skip

SCORE_SCHEMA = "ibex.hybrid.v1"
"""What a score means: `Parts` with its defaults. Changes when a number changes its meaning."""

RECENCY_HALF_LIFE_DAYS = 30.0
"""Counted back from the newest candidate, not from now: a block must not change because a day has passed."""
NEUTRAL = 0.5
"""The value of recency and usefulness that moves nothing."""
NEUTRAL_CONFIDENCE = 0.8
"""The default confidence of a memory."""
LATEST_RECENCY = 0.5
"""Weight of recency when the question asks for what holds now: of two that match alike the newer one is far ahead."""

WORDS_SHARE, COSINE_SHARE = 0.6, 0.4
"""What a memory's relevance is made of. By words alone 20 % of generic prompts pass, which share one with some memory;
with the vector's cosine 1 % do (LoCoMo's stores, 95 % of the questions kept)."""
_FACTORS = {Subject.AUTHOR: 1.0, Subject.EVENT: 1.5, Subject.NAMED: 2.0, Subject.KNOWN: 2.0, Subject.ANYTHING: 3.0}
_KNOWN_SUBJECT = 1.25
"""How much more a query must match that does not speak of its author; 1.25 when it names whom memories are about. "Fix
this Python error" shares much with "The user prefers Python" and needs none of it."""
CHANCES = 100
_CHANCE_BY_DECADE = 0.15
_LEAST_CHANCE = 0.8
"""Generic prompts reach 0.16 among 30 memories where they reach 0.18 among 170 (1.4 % and 4 % of them)."""
_MOST_REQUIRED = 0.6
"""A query that matches this much is answered, whatever the minimum times the factor is."""

SHARE_OF_BEST = 0.35
"""Behind a good match, a score of about a third of it is noise (LoCoMo loses nothing by it)."""
_BEST_OF_SESSION = 3


@dataclass(frozen=True, slots=True)
class Parts:
    """What each measure is worth. Round, set by hand around a flat optimum on LoCoMo; see `bench/locomo`."""

    lexical: float = 0.4
    soft: float = 0.7
    cosine: float = 0.9
    previous: float = 0.2
    next: float = 0.3
    before_previous: float = 0.1
    """Of the neighbour's own lexical, soft and cosine: an answer stands beside its question."""
    named: float = 0.3
    session: float = 0.4
    """Of the mean of the session's three best."""
    dated: float = 0.4

    @property
    def full(self) -> float:
        """The score of a memory that matches in everything."""
        own = self.lexical + self.soft + self.cosine
        around = self.previous + self.next + self.before_previous + self.session
        return own * (1 + around) + self.named + self.dated


DEFAULT_PARTS = Parts()


@dataclass(frozen=True, slots=True)
class Weights:
    """How far each prior moves the score: `match ** relevance * product(1 + weight * (prior - neutral))`."""

    relevance: float = 1.0
    recency: float = 0.05
    usefulness: float = 0.05
    confidence: float = 0.05


DEFAULT_WEIGHTS = Weights()


class Scored(NamedTuple):
    memory: Memory
    composite: float
    """0..1, by which candidates are ordered."""
    relevance: float
    """0..1: how much of the query this memory alone matches; what the gate looks at."""
    similarity: float
    """Cosine of the memory's vector with the query's."""
    recency: float
    usefulness: float
    confidence: float


class Ranking(NamedTuple):
    scored: Sequence[Scored] = ()
    """The best, highest first; equal ones by id."""
    best_relevance: float = 0.0
    """Of all candidates."""
    names_subject: bool = False
    """Whether the query names somebody whom candidates are about."""
    evaluated: int = 0


def rank(
    pool: Pool, query: Query, limit: int, weights: Weights = DEFAULT_WEIGHTS, parts: Parts = DEFAULT_PARTS
) -> Ranking:
    """The best of the candidates, at most `limit`."""
    if not len(pool):
        return Ranking()
    match = _match(pool, parts)
    relevance = relevances(pool, query)
    recency = _recency(pool.created)
    moved = weights.recency if query.moment is not Moment.LATEST else max(weights.recency, LATEST_RECENCY)
    composite = (
        match**weights.relevance
        * (1 + moved * (recency - NEUTRAL))
        * (1 + weights.usefulness * (pool.usefulness - NEUTRAL))
        * (1 + weights.confidence * (pool.confidence - NEUTRAL_CONFIDENCE))
    )
    best = np.lexsort((pool.id_low, pool.id_high, -composite))[:limit]
    memories = _memories(pool, best)
    columns = (composite, relevance, pool.cosine, recency, pool.usefulness, pool.confidence)
    scored = list(map(Scored, memories, *(column[best].tolist() for column in columns)))
    return Ranking(scored, float(relevance.max()), bool(pool.is_named.any()), len(pool))


def _memories(pool: Pool, places: NDArray[np.intp]) -> list[Memory]:
    """In order."""
    if len(pool.indexes) == 1:
        return pool.indexes[0].memories(pool.slots[places].tolist())
    pairs = zip(pool.which[places].tolist(), pool.slots[places].tolist(), strict=True)
    return [pool.indexes[which].memory(slot) for which, slot in pairs]


def unranked(memory: Memory) -> Scored:
    """Of a memory that is there whatever is asked."""
    return Scored(memory, 0.0, 0.0, 0.0, NEUTRAL, memory.usefulness, memory.confidence)


def relevances(pool: Pool, query: Query) -> NDArray[np.float32]:
    """0..1, of each memory alone."""
    if query.is_unspaced:  # an English model finds all such texts alike
        return pool.words
    relevance: NDArray[np.float32] = WORDS_SHARE * pool.words + COSINE_SHARE * np.clip(pool.cosine, 0, 1)
    return relevance


def required_relevance(query: Query, minimum: float, *, names_subject: bool, evaluated: int) -> float:
    """What the best memory must reach for anything to be injected. `minimum`: for a query about its author, where
    CHANCES memories are looked at: of more, one is nearer by chance."""
    factor = _FACTORS[query.subject]
    if names_subject:
        factor = min(factor, _KNOWN_SUBJECT)
    factor *= max(_LEAST_CHANCE, 1 + _CHANCE_BY_DECADE * math.log10(max(1, evaluated) / CHANCES))
    return max(minimum, min(_MOST_REQUIRED, minimum * factor))


def _match(pool: Pool, parts: Parts) -> NDArray[np.float64]:
    """0..1, or a little more where BM25 counts a word that is said often."""
    own = (
        parts.lexical * pool.lexical.astype(np.float64)
        + parts.soft * pool.soft
        + parts.cosine * np.maximum(pool.cosine, 0)
    )
    score = own * (1 + parts.session * (pool.session == NONE))
    for neighbour, worth in (
        (pool.previous, parts.previous),
        (pool.next, parts.next),
        (_twice(pool.previous), parts.before_previous),
    ):
        score += worth * np.where(neighbour == NONE, 0, own[neighbour])
    score += parts.session * _best_of_session(pool, own)
    score += parts.named * pool.is_named + parts.dated * pool.is_dated
    match: NDArray[np.float64] = score / parts.full
    return match


def _twice(previous: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.where(previous == NONE, NONE, previous[previous])


def _best_of_session(pool: Pool, own: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the three best of each one's session; a shorter session counts the ones that it has."""
    order = np.lexsort((-own, pool.session))
    sessions = pool.session[order]
    is_first = np.append(True, sessions[1:] != sessions[:-1])
    firsts = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    rank_in_group = np.arange(len(order)) - firsts[group]
    counted = np.where(rank_in_group < _BEST_OF_SESSION, own[order], 0)
    sizes = np.clip(pool.session_size[order][firsts], 1, _BEST_OF_SESSION)
    means = np.add.reduceat(counted, firsts) / sizes
    result = np.empty(len(order))
    result[order] = means[group]
    result[pool.session == NONE] = 0
    return result


def _recency(created: NDArray[np.int64]) -> NDArray[np.float64]:
    days = created // _DAY_MICROSECONDS
    recency: NDArray[np.float64] = 0.5 ** ((days.max() - days) / RECENCY_HALF_LIFE_DAYS)
    return recency


_DAY_MICROSECONDS = 86_400_000_000
