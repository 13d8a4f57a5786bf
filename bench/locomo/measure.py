"""The engine's own retrieval over LoCoMo: how much of the evidence is in the first k, and in a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from bench.locomo.dataset import Conversation, Question
from extproc.context.index import Index
from extproc.context.pack import Exclusion
from extproc.context.retrieve import Meanings, Pool, collect
from extproc.context.score import DEFAULT_PARTS, Parts, Ranking, rank
from extproc.context.select import select
from extproc.memory.features import WindowIndexer
from extproc.memory.text import Query
from extproc.settings import EngineSettings

__all__ = ["BUDGETS", "FIRST", "Share", "Store", "blocks", "generic_share", "mean", "recalls"]

FIRST = (5, 10, 25, 50)
BUDGETS = (256, 512, 1024, 2048, 4096)
LATER = datetime(2030, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Share:
    """Of one question."""

    category: int
    conversation: str
    found: tuple[float, ...]
    """Share of its evidence, by k or by budget."""


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

    def questions(self) -> Iterable[tuple[Conversation, Question]]:
        return ((conversation, asked) for conversation in self.conversations for asked in conversation.questions)


def recalls(store: Store) -> list[Share]:
    """Evidence among the first k of FIRST."""

    def found(asked: Question) -> tuple[float, ...]:
        ids = [one.memory.id for one in store.ask(asked.text, FIRST[-1])[0].scored]
        return tuple(_share(asked, ids[:k]) for k in FIRST)

    return _each(store, found)


def blocks(store: Store, settings: EngineSettings) -> list[Share]:
    """Evidence inside a block of the tokens of BUDGETS, gate and wrapper included."""

    def found(asked: Question) -> tuple[float, ...]:
        ranking, query = store.ask(asked.text, _MOST)
        shares = []
        for tokens in BUDGETS:
            packed = select(ranking, query, min_relevance=settings.min_relevance, tokens=tokens, max_memories=_MOST)
            ids = [one.scored.memory.id for one in packed if one.exclusion is Exclusion.INCLUDED]
            shares.append(_share(asked, ids))
        return tuple(shares)

    return _each(store, found)


_MOST = 200
"""Memories in a block here: the budget alone decides."""


def generic_share(store: Store, prompts: Sequence[str], settings: EngineSettings) -> tuple[float, float]:
    """(share of the generic prompts that get a block, share of the questions of categories 1 to 4 that get one)"""

    def gets_one(text: str) -> bool:
        ranking, query = store.ask(text, settings.max_memories)
        packed = select(
            ranking,
            query,
            min_relevance=settings.min_relevance,
            tokens=settings.memory_budget_tokens,
            max_memories=settings.max_memories,
        )
        return any(one.exclusion is Exclusion.INCLUDED for one in packed)

    asked = [question.text for _, question in store.questions() if question.category < 5]
    return float(np.mean(list(map(gets_one, prompts)))), float(np.mean(list(map(gets_one, asked))))


def mean(shares: Sequence[Share], categories: Iterable[int]) -> list[float]:
    """Percent, over the questions of the categories."""
    wanted = set(categories)
    return [100 * float(value) for value in np.mean([one.found for one in shares if one.category in wanted], axis=0)]


def _each(store: Store, found: Callable[[Question], tuple[float, ...]]) -> list[Share]:
    return [Share(asked.category, conversation.name, found(asked)) for conversation, asked in store.questions()]


def _share(asked: Question, ids: Sequence[str]) -> float:
    return len(asked.evidence.intersection(ids)) / len(asked.evidence)
