from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest

from extproc.context.index import Index
from extproc.context.retrieve import Meanings, Pool, collect
from extproc.context.score import Ranking, Weights, rank
from extproc.memory.features import Row, WindowIndexer, open_indexer
from extproc.memory.model import Memory, Namespace, new_memory

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def agent() -> Namespace:
    return Namespace(str(uuid.UUID(int=1)), str(uuid.UUID(int=2)))


@pytest.fixture(scope="session")
def make(agent: Namespace) -> Callable[..., Memory]:
    """A memory of the agent, with a new id."""

    def build(content: str, whose: Namespace = agent, **given: object) -> Memory:
        return new_memory(whose, content, **{"id": str(uuid.uuid4()), "now": NOON, **given})  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def indexer() -> WindowIndexer:
    return open_indexer()


@pytest.fixture(scope="session")
def rows(indexer: WindowIndexer) -> Callable[[Sequence[Memory]], list[Row]]:
    """The memories with features, their predecessors left out."""

    def build(memories: Sequence[Memory]) -> list[Row]:
        return list(map(Row, memories, indexer.features(memories, [()] * len(memories))))

    return build


class Asking:
    """The pure part of the engine: a query, some indexes, a ranking."""

    def __init__(self, indexer: WindowIndexer, agent: Namespace, rows: Callable[[Sequence[Memory]], list[Row]]) -> None:
        self.indexer = indexer
        self.meanings = Meanings(indexer.table)
        self.agent = agent
        self.rows = rows

    def index(self, *memories: Memory) -> Index:
        return Index(self.agent, self.rows(memories))

    def pool(self, query: str, *indexes: Index, now: datetime = NOON, candidates: int = 64) -> Pool:
        return collect(indexes, self.indexer.question(query), self.meanings, now, candidates=candidates)

    def rank(self, query: str, *indexes: Index, limit: int = 50, weights: Weights | None = None) -> Ranking:
        return rank(self.pool(query, *indexes), self.indexer.question(query).query, limit, weights or Weights())

    def contents(self, query: str, *indexes: Index) -> list[str]:
        """Best first."""
        return [one.memory.content for one in self.rank(query, *indexes).scored]


@pytest.fixture(scope="session")
def asking(indexer: WindowIndexer, agent: Namespace, rows: Callable[[Sequence[Memory]], list[Row]]) -> Asking:
    return Asking(indexer, agent, rows)
