"""The engine's own retrieval, asked questions whose evidence is known: what is among the first, and what is in a block.

No judge and no model: *recall* is the share of a question's evidence memories that is found, the mean over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np

from extproc.context.index import Index
from extproc.context.pack import Exclusion
from extproc.context.retrieve import Meanings, Pool, collect
from extproc.context.score import DEFAULT_PARTS, Parts, Ranking, rank, required_relevance
from extproc.context.select import select
from extproc.memory.features import Indexer, Row, WindowIndexer
from extproc.memory.model import Memory
from extproc.memory.text import Query

__all__ = [
    "BUDGETS", "FIRST", "GATES", "Answer", "Conversation", "Gate", "Question", "Store", "answers", "at_share", "blocks",
    "gate", "mean", "ndcg", "recalls", "rows",
]  # fmt: skip

FIRST = (5, 10, 25, 50)
BUDGETS = (256, 512, 1024, 2048, 4096)
GATES = tuple(round(0.01 * step, 2) for step in range(8, 41))
"""Settings of `min_relevance` that are tried."""
LATER = datetime(2030, 1, 1, tzinfo=UTC)
"""When the questions are asked: after everything that was said."""
MOST = 200
"""Memories in a block here: the budget alone decides."""


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    kind: str
    evidence: frozenset[str]
    """Ids of memories."""
    language: str = "en"


@dataclass(frozen=True, slots=True)
class Conversation:
    name: str
    memories: list[Memory]
    """In order."""
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found for one question."""

    question: Question
    conversation: str
    found: tuple[float, ...]
    """Share of its evidence, by k, by budget, or one number."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Percent that get a block, by setting of GATES."""

    unrelated: list[float]
    asked: list[float]


@dataclass(slots=True)
class Store:
    """One index, and the questions that are put to it."""

    index: Index
    conversations: Sequence[Conversation]
    indexer: WindowIndexer
    meanings: Meanings
    parts: Parts = DEFAULT_PARTS
    pools: dict[str, tuple[Pool, Query]] = field(default_factory=dict)
    """Of what was asked already: candidates do not depend on `parts`."""

    def ask(self, text: str, limit: int) -> tuple[Ranking, Query]:
        if text not in self.pools:
            question = self.indexer.question(text)
            self.pools[text] = collect([self.index], question, self.meanings, LATER), question.query
        pool, query = self.pools[text]
        return rank(pool, query, limit, parts=self.parts), query

    def with_parts(self, parts: Parts) -> Store:
        return replace(self, parts=parts)


def rows(conversation: Conversation, indexer: Indexer) -> list[Row]:
    memories = conversation.memories
    before = [
        [one for one in memories[max(0, place - 2) : place] if one.session_id == memory.session_id]
        for place, memory in enumerate(memories)
    ]
    return list(map(Row, memories, indexer.features(memories, before)))


def answers(stores: Iterable[Store], found: Callable[[Store, Question], tuple[float, ...]]) -> list[Answer]:
    """Of every question that has evidence."""
    return [
        Answer(asked, conversation.name, found(store, asked))
        for store in stores
        for conversation in store.conversations
        for asked in conversation.questions
        if asked.evidence
    ]


def recalls(store: Store, asked: Question) -> tuple[float, ...]:
    """Evidence among the first k of FIRST."""
    ids = _ids(store, asked, FIRST[-1])
    return tuple(_share(asked, ids[:k]) for k in FIRST)


def ndcg(store: Store, asked: Question) -> tuple[float]:
    """Of the first ten; each evidence memory is worth the same."""
    gains = [1 / np.log2(place + 2) for place, one in enumerate(_ids(store, asked, 10)) if one in asked.evidence]
    best = sum(1 / np.log2(place + 2) for place in range(min(10, len(asked.evidence))))
    return (float(sum(gains) / best),)


def blocks(min_relevance: float) -> Callable[[Store, Question], tuple[float, ...]]:
    """Evidence inside a block of the tokens of BUDGETS; gate, wrapper, marks and date lines included."""

    def found(store: Store, asked: Question) -> tuple[float, ...]:
        ranking, query = store.ask(asked.text, MOST)
        shares = []
        for tokens in BUDGETS:
            packed = select(ranking, query, min_relevance=min_relevance, tokens=tokens, max_memories=MOST)
            ids = [one.scored.memory.id for one in packed if one.exclusion is Exclusion.INCLUDED]
            shares.append(_share(asked, ids))
        return tuple(shares)

    return found


def gate(store: Store, unrelated: Sequence[str], asked: Sequence[str]) -> Gate:
    def opened(texts: Sequence[str]) -> list[float]:
        results = [store.ask(text, 1) for text in texts]
        return [
            100 * float(np.mean([_is_open(ranking, query, setting) for ranking, query in results])) if texts else 0.0
            for setting in GATES
        ]

    return Gate(opened(unrelated), opened(asked))


def at_share(gate: Gate, kept: float) -> tuple[float, float]:
    """(setting, percent of unrelated prompts that get a block) of the strictest one that keeps so many questions."""
    place = max((place for place, share in enumerate(gate.asked) if share >= kept), default=0)
    return GATES[place], gate.unrelated[place]


def mean(found: Iterable[Answer], kinds: Collection[str] = ()) -> list[float]:
    """Percent, over the questions of the kinds; none given: of all."""
    return [
        100 * float(value)
        for value in np.mean([one.found for one in found if not kinds or one.question.kind in kinds], axis=0)
    ]


def _is_open(ranking: Ranking, query: Query, setting: float) -> bool:
    required = required_relevance(query, setting, names_subject=ranking.names_subject, evaluated=ranking.evaluated)
    return bool(ranking.scored) and ranking.best_relevance >= required


def _ids(store: Store, asked: Question, limit: int) -> list[str]:
    return [one.memory.id for one in store.ask(asked.text, limit)[0].scored]


def _share(asked: Question, ids: Collection[str]) -> float:
    return len(asked.evidence.intersection(ids)) / len(asked.evidence)
