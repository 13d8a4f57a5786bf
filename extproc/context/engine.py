"""From a request to its block: embed, retrieve, score, pack, render. No gRPC, no telemetry.

Nothing here fails because memories cannot be had: the block is then empty, and the outcome says why.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import structlog

from extproc.context.admission import Admission
from extproc.context.budget import memory_budget
from extproc.context.order import chronological
from extproc.context.pack import Exclusion, Packed
from extproc.context.render import WRAPPER_TOKENS, nonce, render
from extproc.context.retrieve import Filter, Meanings, collecting, standing
from extproc.context.score import DEFAULT_WEIGHTS, Ranking, Scored, Weights, rank, unranked
from extproc.context.select import select
from extproc.context.steps import advance
from extproc.memory.store import StoreAway, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from extproc.context.admission import Turn
    from extproc.context.cache import NamespaceCache
    from extproc.context.index import Index
    from extproc.context.steps import Steps
    from extproc.memory.features import Question, WindowIndexer
    from extproc.memory.model import Namespace
    from extproc.settings import EngineSettings

__all__ = ["Assembly", "Engine", "Found", "Outcome", "Request", "Stage"]

_log = structlog.get_logger(__name__)

SPARE_CANDIDATES = 14
"""Memories that are scored beyond those that may go in: enough for ties to be broken, and to show what just missed."""
MAX_QUERY_CHARACTERS = 16_384
"""The rest of a longer query is not read: it would take milliseconds of the event loop."""
LARGE = 200_000
"""Memories in a namespace from which on its search has a thread of its own: 5 ms and more, most of it in numpy and
faiss, which leave the interpreter to others."""
LEAST_FOUND = 0.1
"""Relevance below which a search does not name a memory: it has nothing to do with the query."""
LOAD_RESERVE_S = 0.005
"""Beyond the wall, for what was loaded just before it: between the wall and the engine's own limit of 40 ms."""
_EMBED_SHARE = 0.5
"""Of the time that is left, for an embedder that is not quick; then words alone are compared."""


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
    EMBED = "embed"
    LOAD = "load"
    WAIT = "wait"
    """For the CPU, while others have it."""
    RETRIEVE = "retrieve"
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
    skip_standing: bool = False
    """Leave out what is pinned and what a profile holds."""


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


_NOTHING = Ranking()


@dataclass(frozen=True, slots=True)
class _Recalled:
    ranking: Ranking = _NOTHING
    pinned: Sequence[Scored] = ()
    profile: Sequence[Scored] = ()


class Engine:
    def __init__(
        self,
        cache: NamespaceCache,
        indexer: WindowIndexer,
        settings: EngineSettings,
        on_foreign: Callable[[int], None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`on_foreign` is told how many memories of somebody else were dropped: each is a bug of the store."""
        self._cache = cache
        self._indexer = indexer
        self._meanings = Meanings(indexer.table)
        self._settings = settings
        self._nonce_key = settings.nonce_key.get_secret_value().encode()
        self._on_foreign = on_foreign
        self._now = now
        self.admission = Admission(settings.most_requests)

    async def assemble(self, request: Request, wall_s: float) -> Assembly:
        """Ends within `wall_s`, and a few milliseconds when nothing must be loaded. Raises Overloaded."""
        assembly = Assembly()
        clock = _Clock(assembly.stages_ms)
        with self.admission.room(request.namespace.org_id), self._cache.hurry():
            await self._assemble(request, wall_s, assembly, clock)
        assembly.total_ms = clock.total_ms()
        return assembly

    async def _assemble(self, request: Request, wall_s: float, assembly: Assembly, clock: _Clock) -> None:
        org_id = request.namespace.org_id
        deadline = time.monotonic() + wall_s
        budget = memory_budget(self._settings.memory_budget_tokens, request.available_tokens)
        clock.ended(Stage.BUDGET)
        text = "" if request.skip_retrieved else request.query
        question = None if self._indexer.is_quick else await self._embedded(text, deadline)
        clock.ended(Stage.EMBED)
        async with self.admission.turn(org_id, deadline) as turn:
            clock.ended(Stage.WAIT)
            if question is None:
                question = self._indexer.question(text[:MAX_QUERY_CHARACTERS])
            clock.ended(Stage.EMBED)
            if request.skip_retrieved:
                assembly.outcome = Outcome.SKIPPED
            elif not question.query.stems:
                assembly.outcome = Outcome.NO_QUERY
            indexes = self._ready(request.namespace, assembly)
            if indexes is not None:
                await self._fill(request, question, indexes, budget, assembly, clock, turn)
                return
        indexes = await self._load(request.namespace, question, deadline, assembly)
        clock.ended(Stage.LOAD)
        async with self.admission.turn(org_id, deadline + LOAD_RESERVE_S) as turn:
            clock.ended(Stage.WAIT)
            await self._fill(request, question, indexes, budget, assembly, clock, turn)

    def _ready(self, namespace: Namespace, assembly: Assembly) -> Sequence[Index] | None:
        """None: it must be loaded first."""
        try:
            return self._cache.ready(namespace)
        except StoreError as error:
            return _nothing(assembly, error)

    async def _load(
        self, namespace: Namespace, question: Question, deadline: float, assembly: Assembly
    ) -> Sequence[Index]:
        try:
            indexes = await self._cache.find(namespace, question, deadline)
        except StoreError as error:
            return _nothing(assembly, error)
        if indexes is None:
            assembly.outcome = Outcome.NOT_READY
            return []
        return indexes

    async def _fill(
        self,
        request: Request,
        question: Question,
        indexes: Sequence[Index],
        budget: int,
        assembly: Assembly,
        clock: _Clock,
        turn: Turn,
    ) -> None:
        """The part that takes the CPU."""
        settings = self._settings
        most = min(request.max_memories or settings.max_memories, settings.max_memories)
        recalled = await self._recall(
            self._recalling(
                indexes,
                request.namespace,
                question,
                most + SPARE_CANDIDATES,
                request.weights,
                with_standing=not request.skip_standing,
            ),
            indexes,
            turn,
        )
        assembly.evaluated = recalled.ranking.evaluated
        clock.ended(Stage.RETRIEVE)

        assembly.packed = select(
            recalled.ranking,
            question.query,
            min_relevance=settings.min_relevance,
            tokens=budget,
            max_memories=most,
            pinned=recalled.pinned,
            profile=recalled.profile,
        )
        included = assembly.included
        clock.ended(Stage.PACK)
        if included:
            assembly.outcome = Outcome.INJECTED
            mark = nonce(self._nonce_key, request.namespace, request.session_id)
            assembly.text = render(chronological([one.scored.memory for one in included]), mark)
            assembly.tokens = WRAPPER_TOKENS + sum(one.tokens for one in included)
        clock.ended(Stage.RENDER)

    async def search(
        self,
        namespace: Namespace,
        query: str,
        limit: int,
        wall_s: float,
        accept: Filter | None = None,
    ) -> Found:
        """What matches, best first, without the gate.

        Raises StoreError, Overloaded, or TimeoutError when the namespace is not loaded in time.
        """
        deadline = time.monotonic() + wall_s
        with self.admission.room(namespace.org_id):
            question = await self._embedded(query, deadline)
            indexes = await self._cache.whole(namespace, deadline)
            if indexes is None:
                raise TimeoutError
            async with self.admission.turn(namespace.org_id, deadline) as turn:
                steps = self._recalling(indexes, namespace, question, limit, DEFAULT_WEIGHTS, accept)
                recalled = await self._recall(steps, indexes, turn)
        ranking = recalled.ranking
        return Found([one for one in ranking.scored if one.relevance >= LEAST_FOUND], ranking.evaluated)

    async def _embedded(self, query: str, deadline: float) -> Question:
        text = query[:MAX_QUERY_CHARACTERS]
        if self._indexer.is_quick:
            return self._indexer.question(text)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) * _EMBED_SHARE):
                return await self._cache.run(partial(self._indexer.question, text))
        except TimeoutError:
            return self._indexer.words_of_question(text)

    async def _recall(self, steps: Steps[_Recalled], indexes: Sequence[Index], turn: Turn) -> _Recalled:
        """Step by step, the indexes unchanged meanwhile. Raises Overloaded when others have the CPU to the end."""
        in_thread = sum(map(len, indexes)) >= LARGE
        is_late: bool | None = None
        async with self._cache.reading(indexes):
            while True:
                recalled = await self._in_thread(steps, is_late) if in_thread else advance(steps, is_late)
                if recalled is not None:
                    return recalled
                await turn.step()
                is_late = turn.is_late

    async def _in_thread(self, steps: Steps[_Recalled], is_late: bool | None) -> _Recalled | None:  # noqa: FBT001
        """Ends with the step, also when cancelled: until then the thread reads the indexes."""
        running = asyncio.ensure_future(self._cache.run(partial(advance, steps, is_late)))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait({running})
            raise

    def _recalling(
        self,
        indexes: Sequence[Index],
        namespace: Namespace,
        question: Question,
        limit: int,
        weights: Weights,
        accept: Filter | None = None,
        *,
        with_standing: bool = False,
    ) -> Steps[_Recalled]:
        now = self._now()
        pinned, profile = standing(indexes, now) if with_standing else ([], [])
        if not question.query.stems or not any(map(len, indexes)):
            return _Recalled(pinned=self._own(map(unranked, pinned), namespace))
        pool = yield from collecting(indexes, question, self._meanings, now, accept)
        ranking = rank(pool, question.query, limit, weights)
        yield
        return _Recalled(
            ranking._replace(scored=self._own(ranking.scored, namespace)),
            self._own(map(unranked, pinned), namespace),
            self._own(map(unranked, profile), namespace),
        )

    def _own(self, found: Iterable[Scored], namespace: Namespace) -> list[Scored]:
        every = list(found)
        own = [one for one in every if namespace.can_see(one.memory)]
        if len(own) < len(every):
            self._on_foreign(len(every) - len(own))
            _log.error(
                "foreign_memories_dropped_this_is_a_bug_of_the_store",
                org_id=namespace.org_id,
                agent_id=namespace.agent_id,
                memory_ids=[one.memory.id for one in every if not namespace.can_see(one.memory)][:8],
            )
        return own


def _nothing(assembly: Assembly, error: StoreError) -> Sequence[Index]:
    if not isinstance(error, StoreAway):  # which the store says once, and not every request
        _log.warning("retrieval_failed_nothing_injected", error=str(error))
    assembly.outcome = Outcome.STORE_ERROR
    return []


class _Clock:
    """Milliseconds of each stage, one after the other."""

    def __init__(self, stages_ms: dict[Stage, float]) -> None:
        self._stages_ms = stages_ms
        self._began = self._last = time.perf_counter()

    def ended(self, stage: Stage) -> None:
        now = time.perf_counter()
        self._stages_ms[stage] = self._stages_ms.get(stage, 0.0) + (now - self._last) * 1000
        self._last = now

    def total_ms(self) -> float:
        return (time.perf_counter() - self._began) * 1000
