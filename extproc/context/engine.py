"""From a request to its block: look up, retrieve, score, pack, render. No gRPC, no telemetry.

Nothing here fails because memories cannot be had: the block is then empty, and the outcome says why.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

import structlog

from extproc.context.budget import memory_budget
from extproc.context.pack import Exclusion, Packed, chronological, pack
from extproc.context.render import WRAPPER_TOKENS, item_tokens, nonce, render
from extproc.context.retrieve import Matches, search
from extproc.context.score import DEFAULT_WEIGHTS, Scored, Weights, required_relevance, score
from extproc.memory.store import StoreError
from extproc.memory.text import parse_query

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.context.cache import NamespaceCache
    from extproc.context.retrieve import Hit, Index
    from extproc.memory.model import Memory, Namespace
    from extproc.memory.text import Query
    from extproc.settings import EngineSettings

__all__ = ["Assembly", "Engine", "Found", "Outcome", "Request", "Stage"]

_log = structlog.get_logger(__name__)

SPARE_CANDIDATES = 14
"""Memories that are scored beyond those that may go in: enough for ties to be broken, and to show what just missed."""


MAX_QUERY_CHARACTERS = 16_384
"""The rest of a longer query is not read: it would take milliseconds of the event loop."""


class Outcome(StrEnum):
    INJECTED = "injected"
    NOTHING_FOUND = "nothing_found"
    NO_QUERY = "no_query"
    """The query holds no word to look for."""
    SKIPPED = "skipped"
    """The caller asked for no retrieved memories."""
    NOT_READY = "not_ready"
    """The namespace was not loaded at the wall; the next request finds it."""
    STORE_ERROR = "store_error"


class Stage(StrEnum):
    BUDGET = "budget"
    RETRIEVE = "retrieve"
    RANK = "rank"
    PACK = "pack"
    RENDER = "render"


@dataclass(frozen=True, slots=True)
class Request:
    namespace: Namespace
    session_id: str
    query: str
    available_tokens: int = 0
    max_memories: int = 0
    """0: the setting's."""
    weights: Weights = DEFAULT_WEIGHTS
    skip_retrieved: bool = False


@dataclass(slots=True)
class Assembly:
    """What a request gets, and how it came about."""

    outcome: Outcome = Outcome.NOTHING_FOUND
    text: str = ""
    tokens: int = 0
    """Of the text, wrapper included."""
    packed: Sequence[Packed] = ()
    """The candidates with their fate, best first."""
    evaluated: int = 0
    stages_ms: dict[Stage, float] = field(default_factory=dict)
    total_ms: float = 0.0

    @property
    def included(self) -> list[Packed]:
        return [one for one in self.packed if one.exclusion is Exclusion.INCLUDED]


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a search."""

    scored: Sequence[Scored] = ()
    evaluated: int = 0


class Engine:
    def __init__(
        self,
        cache: NamespaceCache,
        settings: EngineSettings,
        on_foreign: Callable[[int], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`on_foreign` is told how many memories of somebody else were dropped: each is a bug of the store."""
        self._cache = cache
        self._settings = settings
        self._nonce_key = settings.nonce_key.get_secret_value().encode()
        self._on_foreign = on_foreign
        self._now = now

    async def assemble(self, request: Request, wall_s: float) -> Assembly:
        """Ends within `wall_s`, and about a millisecond when nothing must be loaded."""
        assembly = Assembly()
        clock = _Clock(assembly.stages_ms)
        await self._assemble(request, wall_s, assembly, clock)
        assembly.total_ms = clock.total_ms()
        return assembly

    async def _assemble(self, request: Request, wall_s: float, assembly: Assembly, clock: _Clock) -> None:
        settings = self._settings
        query = parse_query(request.query[:MAX_QUERY_CHARACTERS])
        if request.skip_retrieved or not query.stems:
            assembly.outcome = Outcome.SKIPPED if request.skip_retrieved else Outcome.NO_QUERY
            return
        budget = memory_budget(settings.memory_budget_tokens, request.available_tokens)
        most = min(request.max_memories or settings.max_memories, settings.max_memories)
        mark = nonce(self._nonce_key, request.namespace, request.session_id)
        clock.ended(Stage.BUDGET)

        try:
            indexes = self._cache.ready(request.namespace) or await self._cache.wait(request.namespace, wall_s)
        except StoreError as error:
            _log.warning("retrieval_failed_nothing_injected", error=str(error))
            indexes, assembly.outcome = [], Outcome.STORE_ERROR
        if indexes is None:
            indexes, assembly.outcome = [], Outcome.NOT_READY
        matches = self._search(indexes, request.namespace, query, most + SPARE_CANDIDATES)
        assembly.evaluated = matches.evaluated
        clock.ended(Stage.RETRIEVE)
        if not matches.hits:
            return

        scored = _score(matches.hits, request.weights)
        required = required_relevance(query, settings.min_relevance, max(one.relevance for one in scored))
        clock.ended(Stage.RANK)

        assembly.packed = pack(
            scored, tokens=budget - WRAPPER_TOKENS, max_memories=most, required=required, cost=item_tokens
        )
        included = assembly.included
        clock.ended(Stage.PACK)
        if included:
            assembly.outcome = Outcome.INJECTED
            assembly.text = render(chronological([one.scored.memory for one in included]), mark)
            assembly.tokens = WRAPPER_TOKENS + sum(one.tokens for one in included)
        clock.ended(Stage.RENDER)

    async def search(
        self,
        namespace: Namespace,
        query: str,
        limit: int,
        wall_s: float,
        accept: Callable[[Memory], bool] | None = None,
    ) -> Found:
        """What matches, best first, without the gate. Raises StoreError, or TimeoutError when not loaded in time."""
        indexes = self._cache.ready(namespace) or await self._cache.wait(namespace, wall_s)
        if indexes is None:
            raise TimeoutError
        matches = self._search(indexes, namespace, parse_query(query[:MAX_QUERY_CHARACTERS]), limit, accept)
        return Found(_score(matches.hits, DEFAULT_WEIGHTS), matches.evaluated)

    def _search(
        self,
        indexes: Sequence[Index],
        namespace: Namespace,
        query: Query,
        limit: int,
        accept: Callable[[Memory], bool] | None = None,
    ) -> Matches:
        matches = search(indexes, query, limit, self._now(), accept)
        own = [hit for hit in matches.hits if namespace.can_see(hit.memory)]
        foreign = len(matches.hits) - len(own)
        if foreign:
            self._on_foreign(foreign)
            _log.error(
                "foreign_memories_dropped_this_is_a_bug_of_the_store",
                org_id=namespace.org_id,
                agent_id=namespace.agent_id,
                memory_ids=[hit.memory.id for hit in matches.hits if not namespace.can_see(hit.memory)][:8],
            )
        return Matches(own, matches.evaluated - foreign)


def _score(hits: Sequence[Hit], weights: Weights) -> list[Scored]:
    if not hits:
        return []
    return score(hits, max(hit.memory.created_at for hit in hits), weights)


class _Clock:
    """Milliseconds of each stage, one after the other."""

    def __init__(self, stages_ms: dict[Stage, float]) -> None:
        self._stages_ms = stages_ms
        self._began = self._last = time.perf_counter()

    def ended(self, stage: Stage) -> None:
        now = time.perf_counter()
        self._stages_ms[stage] = (now - self._last) * 1000
        self._last = now

    def total_ms(self) -> float:
        return (time.perf_counter() - self._began) * 1000
