"""`ibex.context.v1.ContextAssemblyService` over gRPC: decode, ask the engine, encode.

What a caller sends wrongly is INVALID_ARGUMENT with the reason; a bug is INTERNAL without one, and a log line with its
traceback. Memories that cannot be had are neither: the context is then empty.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
import structlog
from ibex.context.v1 import context_pb2 as pb
from ibex.context.v1 import context_pb2_grpc
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import REGISTRY
from typing_extensions import override

from extproc import names
from extproc.context.admission import Overloaded
from extproc.context.cache import NamespaceCache
from extproc.context.engine import Engine, Request, Stage
from extproc.context.metrics import EngineMetrics
from extproc.context.pack import Exclusion, Packed
from extproc.context.rehearsal import NOBODY, rehearse
from extproc.context.score import DEFAULT_WEIGHTS, SCORE_SCHEMA, Scored, Weights
from extproc.context.usage import RetrievalCounts
from extproc.memory.lane import LaneFull
from extproc.memory.model import InvalidValue, Namespace, parse_category, parse_uuid
from extproc.memory.store import StoreAway, StoreError
from extproc.telemetry.spans import linked_spans

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import numpy as np
    from google.protobuf.message import Message
    from grpc import aio
    from numpy.typing import NDArray
    from prometheus_client import CollectorRegistry

    from extproc.context.engine import Assembly
    from extproc.context.index import Index
    from extproc.memory.features import WindowIndexer
    from extproc.memory.store import MemoryStore
    from extproc.settings import EngineSettings

__all__ = ["SERVICE_NAME", "ContextService"]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ContextAssemblyService"].full_name
"""For the health service."""

MOST_MISSED_ROWS = 8
"""Rows of `memories_used` beside those included: enough to see what just missed. Each costs filter and engine 3 µs."""
MOST_FOUND = 100
DEFAULT_FOUND = 10
MOST_FEEDBACK_IDS = 500
MOST_WEIGHT = 2.0
"""Of a prior: it then moves a score from nothing to twice."""
MOST_SPAN_CHARACTERS = 256
"""Of a caller's own text in a span."""
USEFULNESS_STEP = 0.05
"""One voice; ten of them take a memory from neutral to the end of the scale."""
SEARCH_WALL_S = 5.0
"""A search has no client that waits for 45 ms, so a cold namespace may be loaded first."""
SWITCH_S = 0.0005
"""For which a thread that loads a namespace may keep the interpreter from the event loop. Python's 5 ms, at each of the
steps of a request from socket to answer, is most of the wall."""
RESERVE_S = 0.003
"""Left of the caller's deadline for the way back."""

_STEPS = {"positive": USEFULNESS_STEP, "negative": -USEFULNESS_STEP, "neutral": 0.0}
_NO_DEADLINE_S = 3600.0

_log = structlog.get_logger(__name__)
_tracer = trace.get_tracer("extproc.context")
_propagator = TraceContextTextMapPropagator()

M = TypeVar("M", bound="Message")


class ContextService(context_pb2_grpc.ContextAssemblyServiceServicer):
    """Await `start` before the server starts and `stop` after it has; both in the server's event loop."""

    def __init__(
        self,
        store: MemoryStore,
        indexer: WindowIndexer,
        settings: EngineSettings,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """The store stays the caller's to close, after `stop`. `indexer`: the one that the store writes with."""
        self._store = store
        self._switch_s = sys.getswitchinterval()
        self._wall_s = settings.retrieval_wall_ms / 1000
        self._serve_away_s = settings.store_away_s
        self._indexer = indexer
        self._metrics = EngineMetrics(registry)
        self._cache = NamespaceCache(
            store, indexer, settings.namespace_cache_bytes, on_held_back=self._metrics.loads_held_back.inc
        )
        self._engine = Engine(self._cache, indexer, settings, on_foreign=self._metrics.foreign.inc)
        self._metrics.watch(self._cache, self._engine.admission, store)
        self._retrievals = RetrievalCounts(store, self._cache, on_lost=self._metrics.lost_retrievals.inc)

    async def start(self) -> None:
        """Afterwards the first request is as quick as others. Raises StoreError when the store cannot be read."""
        await self.check()
        question, _ = await self._cache.run(partial(rehearse, self._indexer))
        # Compiles the statements, so that the first namespace is found and loaded within the wall.
        await self._cache.run(partial(self._store.candidates, NOBODY, list(question.query.stems), None))
        await self._cache.wait(NOBODY, SEARCH_WALL_S)
        self._retrievals.start()
        sys.setswitchinterval(SWITCH_S)

    @staticmethod
    def freeze() -> None:
        """For a process that does nothing else, after `start` and what was warmed: what is there now stays.

        Otherwise the garbage collector looks at all of it under load, for 30 ms each time.
        """
        gc.collect()
        gc.freeze()

    async def warm(self, namespace: Namespace, timeout_s: float) -> bool:
        """Load a namespace before anybody asks. False: it is not loaded yet, and goes on. Raises StoreError."""
        if await self._cache.whole(namespace, time.monotonic() + timeout_s) is None:
            return False
        await self._cache.settle(namespace)
        return True

    async def stop(self) -> None:
        """Write what was counted and let go of the threads."""
        sys.setswitchinterval(self._switch_s)
        try:
            await self._retrievals.stop()
        finally:
            await self._cache.stop()

    def is_busy(self) -> bool:
        """Whether a request is being answered. From any thread."""
        return self._engine.admission.inside > 0

    async def check(self) -> None:
        """Raises StoreError when the store cannot be read and does not serve without its database."""
        await self._cache.run(self._store.check)

    async def store_state(self) -> bool | str:
        """For readiness: whether the store is well, or in words for how long it has been away and what that means."""
        try:
            await self.check()
            is_well = True
        except StoreError:
            is_well = False
        if not self.is_store_away:
            return is_well
        served = f"loaded namespaces are served, for {self._serve_away_s:.0f} s at most"
        return f"away for {self._store.away_s():.0f} s; {served if is_well else 'nothing is served until it is back'}"

    @property
    def is_store_away(self) -> bool:
        """Whether memories are served without their database, or none at all for want of it."""
        return self._store.away_s() > 0

    def add_to_server(self, server: aio.Server) -> None:
        context_pb2_grpc.add_ContextAssemblyServiceServicer_to_server(self, server)

    @override
    async def AssembleContext(
        self, request: pb.AssembleContextRequest, context: context_pb2_grpc._ServicerContext
    ) -> pb.AssembleContextResponse:
        return await self._answer("AssembleContext", partial(self._assemble, request, context), context)

    @override
    async def SearchMemories(
        self, request: pb.SearchMemoriesRequest, context: context_pb2_grpc._ServicerContext
    ) -> pb.SearchMemoriesResponse:
        return await self._answer("SearchMemories", partial(self._search, request), context)

    @override
    async def RecordMemoryFeedback(
        self, request: pb.RecordMemoryFeedbackRequest, context: context_pb2_grpc._ServicerContext
    ) -> pb.RecordMemoryFeedbackResponse:
        return await self._answer("RecordMemoryFeedback", partial(self._record_feedback, request), context)

    async def _answer(
        self, method: str, work: Callable[[float], Awaitable[M]], context: context_pb2_grpc._ServicerContext
    ) -> M:
        """The one place where failures become status codes, and calls are counted.

        `work` gets the seconds that are left, and is not begun when there are none: nobody would get its answer.
        """
        began = time.perf_counter()
        code, reason = grpc.StatusCode.CANCELLED, ""
        try:
            answer = await work(_time_left_s(context))
        except InvalidValue as error:
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except StoreError as error:
            code, reason = grpc.StatusCode.UNAVAILABLE, "the memory store cannot be used now"
            if not isinstance(error, StoreAway):  # which the store says once, and not every call
                _log.warning("call_failed", method=method, error=str(error))
        except Overloaded:
            code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, "the engine has more to do than it can; add engines"
        except TimeoutError:
            code, reason = grpc.StatusCode.DEADLINE_EXCEEDED, "not done in the time that was left; try again"
        except Exception:  # noqa: BLE001 (the edge: a bug ends one call, not the server)
            code, reason = grpc.StatusCode.INTERNAL, "internal error"
            _log.exception("call_failed_by_a_bug", method=method)
        else:
            code = grpc.StatusCode.OK
            return answer
        finally:
            self._metrics.requests.labels(method, code.name).inc()
            self._metrics.seconds.labels(method).observe(time.perf_counter() - began)
        await context.abort(code, reason)
        raise AssertionError("abort raises")

    async def _assemble(
        self, request: pb.AssembleContextRequest, context: context_pb2_grpc._ServicerContext, left_s: float
    ) -> pb.AssembleContextResponse:
        if not request.model:
            raise InvalidValue("model is empty")
        namespace = Namespace.parse(request.org_id, request.agent_id, request.user_id)
        options = request.options
        if options.max_memories < 0:
            raise InvalidValue("options.max_memories is below 0")
        asked = Request(
            namespace=namespace,
            session_id=request.session_id,
            query=request.query,
            available_tokens=request.available_tokens,
            max_memories=options.max_memories,
            weights=_weights(options) if request.HasField("options") else DEFAULT_WEIGHTS,
            skip_retrieved=options.skip_cold_memories,
            skip_standing=options.skip_hot_memories,
        )
        span = _start_span(context)
        try:
            assembly = await self._engine.assemble(asked, min(self._wall_s, left_s))
            if span.is_recording():
                _describe(span, request, assembly)
        finally:
            span.end()
        self._metrics.outcomes[assembly.outcome].inc()
        for stage, took_ms in assembly.stages_ms.items():
            self._metrics.stages[stage].observe(took_ms / 1000)
        included = assembly.included
        if included:
            self._retrievals.add([one.scored.memory for one in included])
        return _assembled(request, assembly, len(included))

    async def _search(self, request: pb.SearchMemoriesRequest, left_s: float) -> pb.SearchMemoriesResponse:
        began = time.perf_counter()
        namespace = Namespace.parse(request.org_id, request.agent_id, request.user_id)
        if not request.query:
            raise InvalidValue("query is empty")
        if request.limit < 0:
            raise InvalidValue("limit is below 0")
        categories = frozenset(map(parse_category, request.categories))
        tags = frozenset(request.tags)

        def accept(index: Index) -> NDArray[np.bool_]:
            return index.accepted(categories, tags)

        limit = min(request.limit or DEFAULT_FOUND, MOST_FOUND)
        wall_s = min(SEARCH_WALL_S, left_s)
        found = await self._engine.search(
            namespace, request.query, limit, wall_s, accept if categories or tags else None
        )
        return pb.SearchMemoriesResponse(
            memories=[_memory(one) for one in found.scored if one.relevance >= request.min_similarity],
            total_candidates=found.evaluated,
            search_time_ms=round((time.perf_counter() - began) * 1000),
        )

    async def _record_feedback(
        self, request: pb.RecordMemoryFeedbackRequest, _left_s: float
    ) -> pb.RecordMemoryFeedbackResponse:
        """A write that has begun is finished; one that still waits for its thread ends with its caller's deadline.

        Raises Overloaded when too many wait.
        """
        org_id = parse_uuid(request.org_id, "org_id")
        step = _STEPS.get(request.feedback)
        if step is None:
            raise InvalidValue(f"feedback is not one of {', '.join(_STEPS)}")
        if len(request.memory_ids) > MOST_FEEDBACK_IDS:
            raise InvalidValue(f"more than {MOST_FEEDBACK_IDS} memory_ids")
        memory_ids = [parse_uuid(memory_id, "memory_ids") for memory_id in request.memory_ids]
        try:
            updates = await self._cache.write(partial(self._store.move_usefulness, org_id, memory_ids, step))
        except LaneFull:
            raise Overloaded from None
        return pb.RecordMemoryFeedbackResponse(
            success=len(updates) == len(set(memory_ids)),
            updates=[
                pb.MemoryScoreUpdate(memory_id=one.memory_id, previous_score=one.previous, new_score=one.new)
                for one in updates
            ],
        )


def _weights(options: pb.AssemblyOptions) -> Weights:
    """The defaults where nothing is set; 0 is not set."""
    given = {name: getattr(options, f"{name}_weight") for name in ("relevance", "recency", "usefulness", "confidence")}
    for name, weight in given.items():
        if not math.isfinite(weight) or weight < 0:
            raise InvalidValue(f"options.{name}_weight is not a number from 0")
    return Weights(
        relevance=given["relevance"] or DEFAULT_WEIGHTS.relevance,
        recency=min(MOST_WEIGHT, given["recency"] or DEFAULT_WEIGHTS.recency),
        usefulness=min(MOST_WEIGHT, given["usefulness"] or DEFAULT_WEIGHTS.usefulness),
        confidence=min(MOST_WEIGHT, given["confidence"] or DEFAULT_WEIGHTS.confidence),
    )


def _time_left_s(context: context_pb2_grpc._ServicerContext) -> float:
    """Raises TimeoutError when none is."""
    left = cast("float | None", context.time_remaining())  # None without a deadline, whatever the stubs say
    if left is None:
        return _NO_DEADLINE_S
    if left <= RESERVE_S:
        raise TimeoutError
    return left - RESERVE_S


def _assembled(request: pb.AssembleContextRequest, assembly: Assembly, included: int) -> pb.AssembleContextResponse:
    stage_ms = {stage: round(assembly.stages_ms.get(stage, 0.0)) for stage in Stage}
    return pb.AssembleContextResponse(
        assembled_context=assembly.text,
        tokens_used=assembly.tokens,
        memory_tokens=assembly.tokens,
        memories_included=included,
        memories_used=_used(assembly.packed),
        metrics=pb.AssemblyMetrics(
            budget_calculation_ms=stage_ms[Stage.BUDGET],
            cold_memory_retrieval_ms=stage_ms[Stage.LOAD],
            ranking_ms=stage_ms[Stage.RETRIEVE],
            packing_ms=stage_ms[Stage.PACK],
            formatting_ms=stage_ms[Stage.RENDER],
            total_ms=round(assembly.total_ms),
            candidates_evaluated=assembly.evaluated,
        ),
        request_id=request.request_id,
        trace_id=request.trace_id,
        span_id=request.span_id,
        score_schema=SCORE_SCHEMA,
    )


def _used(packed: Sequence[Packed]) -> list[pb.MemoryUsed]:
    """All that are included, and the best of the others."""
    others = MOST_MISSED_ROWS
    rows = []
    for rank, one in enumerate(packed, start=1):
        if one.exclusion is not Exclusion.INCLUDED:
            if others == 0:
                continue
            others -= 1
        scored = one.scored
        rows.append(
            pb.MemoryUsed(
                memory_id=scored.memory.id,
                composite_score=scored.composite,
                relevance_score=scored.relevance,
                recency_score=scored.recency,
                usefulness_score=scored.usefulness,
                rank=rank,
                category=scored.memory.category,
                exclusion=one.exclusion,
                similarity=scored.similarity,
                confidence=scored.confidence,
                token_estimate=one.tokens,
            )
        )
    return rows


def _memory(scored: Scored) -> pb.Memory:
    memory = scored.memory
    return pb.Memory(
        id=memory.id,
        content=memory.content,
        category=memory.category,
        confidence=memory.confidence,
        composite_score=scored.composite,
        retrieval_count=memory.retrieval_count,
        created_at=memory.created_at.isoformat().replace("+00:00", "Z"),
    )


def _start_span(context: context_pb2_grpc._ServicerContext) -> trace.Span:
    """A child of the caller's span, when its `traceparent` came with the call."""
    headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    parent = _propagator.extract(headers) if "traceparent" in headers else None
    return _tracer.start_span("context.retrieve", context=parent, kind=trace.SpanKind.SERVER)


def _describe(span: trace.Span, request: pb.AssembleContextRequest, assembly: Assembly) -> None:
    """Ids and numbers, never the query or a memory."""
    included = assembly.included
    span.set_attributes(
        {
            names.ORG_ATTRIBUTE: request.org_id,
            names.GEN_AI_AGENT_ID: request.agent_id,
            names.GEN_AI_CONVERSATION_ID: request.session_id[:MOST_SPAN_CHARACTERS],
            names.GEN_AI_REQUEST_MODEL: request.model[:MOST_SPAN_CHARACTERS],
            names.REQUEST_ID_ATTRIBUTE: request.request_id[:MOST_SPAN_CHARACTERS],
            names.OUTCOME_ATTRIBUTE: assembly.outcome,
            names.CANDIDATES_ATTRIBUTE: assembly.evaluated,
            names.MEMORIES_INCLUDED_ATTRIBUTE: len(included),
            names.CONTEXT_TOKENS_ATTRIBUTE: assembly.tokens,
            names.MEMORY_IDS_ATTRIBUTE: [one.scored.memory.id for one in included],
            names.MEMORY_SCORES_ATTRIBUTE: [one.scored.composite for one in included],
            **{names.STAGE_MS_ATTRIBUTE.format(stage): took_ms for stage, took_ms in assembly.stages_ms.items()},
        }
    )
    # To the spans that wrote them, and so to the requests in which they were said.
    for written in linked_spans(one.scored.memory.metadata.get("traceparent") for one in included):
        span.add_link(written)
