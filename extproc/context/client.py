"""Asks an engine for context: any `ibex.context.v1.ContextAssemblyService`, ours or another's.

A failure is a value: the filter turns it into the request's outcome. Nothing that an engine does raises out of
`assemble`, but cancellation.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from ibex.context.v1 import context_pb2
from prometheus_client import Counter

__all__ = ["MAX_CONTEXT_BYTES", "EngineAnswer", "EngineClient", "EngineFailure"]

MAX_CONTEXT_BYTES = 256 * 1024
"""A longer text is an engine gone wrong: 64 times the default budget of 1,024 tokens."""
MAX_MEMORIES = 1000
"""Rows about memories in one answer; each costs the filter's loop 1 µs."""
_KEPT_IDS = 64
_ID = re.compile(r"[!-~]{1,64}")
"""An id goes into spans. Whatever else an engine writes there might be a memory's text, and is left out."""

_METHOD = "/ibex.context.v1.ContextAssemblyService/AssembleContext"

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # Of several addresses each has its turn; by default gRPC stays with the first that answers.
    ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'),
    # The first request after an engine came back must not wait for a second of back-off.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Finds a host that vanished without a word; a connection that was idle for a while is tried before it is needed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    # http_proxy in the environment is for the internet; an engine is next door.
    ("grpc.enable_http_proxy", 0),
    # The text, and what an engine says about a few hundred memories. More is refused before it is parsed.
    ("grpc.max_receive_message_length", MAX_CONTEXT_BYTES + 128 * 1024),
)


_held_back = Counter(
    "ibex_extproc_engine_calls_held_back", "Requests that went on without asking: their org had too many calls open"
)


class EngineFailure(StrEnum):
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    """Not reachable, or so full that it refused at once, or not asked: so many of the organisation's calls are open."""
    ERROR = "error"
    """It answered with an error, or with something that is no answer."""


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    text: str
    """What to inject; empty: nothing."""
    memories: int
    tokens: int
    candidates: int
    memory_ids: tuple[str, ...] = ()
    """Of the block, best first; empty where the engine does not tell."""
    memory_scores: tuple[float, ...] = ()
    """In the same order."""


class EngineClient:
    """One channel to one target, which may be a load-balanced name. Close with `close`."""

    def __init__(self, target: str, most_of_org: int) -> None:
        """`most_of_org`: calls of one organisation that are open at once. More are refused here, for microseconds; an
        engine's refusal costs 0.3 ms of its CPU, which is everybody's.
        """
        self._most_of_org = most_of_org
        self._open: defaultdict[str, int] = defaultdict(int)
        """Calls, by organisation."""
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        # The answer is taken as bytes and parsed here, so that rubbish is our failure to name, not grpcio's to raise.
        self._assemble: grpc.aio.UnaryUnaryMultiCallable[context_pb2.AssembleContextRequest, bytes] = (
            self._channel.unary_unary(_METHOD, request_serializer=context_pb2.AssembleContextRequest.SerializeToString)
        )

    async def assemble(
        self, request: context_pb2.AssembleContextRequest, timeout_s: float, traceparent: str | None
    ) -> EngineAnswer | EngineFailure:
        """Ask once, within `timeout_s` seconds. There is no second try: there would be no time for it."""
        org_id = request.org_id
        if self._open.get(org_id, 0) >= self._most_of_org:
            _held_back.inc()
            return EngineFailure.UNAVAILABLE
        self._open[org_id] += 1
        try:
            return await self._ask(request, timeout_s, traceparent)
        finally:
            self._open[org_id] -= 1
            if not self._open[org_id]:
                del self._open[org_id]

    async def _ask(
        self, request: context_pb2.AssembleContextRequest, timeout_s: float, traceparent: str | None
    ) -> EngineAnswer | EngineFailure:
        metadata = (("traceparent", traceparent),) if traceparent else None
        try:
            raw = await self._assemble(request, timeout=timeout_s, metadata=metadata)
            answer = context_pb2.AssembleContextResponse.FromString(raw)
        except grpc.aio.AioRpcError as error:
            return _failure_of(error.code())
        except DecodeError:
            return EngineFailure.ERROR
        return _read_answer(answer)

    async def is_ready(self, timeout_s: float) -> bool:
        """Whether a connection stands, or can be made within `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        await self._channel.close()


def _failure_of(code: grpc.StatusCode) -> EngineFailure:
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return EngineFailure.TIMEOUT
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.RESOURCE_EXHAUSTED:
            return EngineFailure.UNAVAILABLE
        case _:
            return EngineFailure.ERROR


def _read_answer(answer: context_pb2.AssembleContextResponse) -> EngineAnswer | EngineFailure:
    text = answer.assembled_context
    memories, tokens = answer.memories_included, answer.tokens_used
    if memories < 0 or tokens < 0 or len(text) > MAX_CONTEXT_BYTES or len(answer.memories_used) > MAX_MEMORIES:
        return EngineFailure.ERROR
    used = [
        memory
        for memory in answer.memories_used
        if memory.exclusion in {"included", ""}
        and math.isfinite(memory.composite_score)
        and _ID.fullmatch(memory.memory_id)
    ][:_KEPT_IDS]
    return EngineAnswer(
        text,
        memories,
        tokens,
        answer.metrics.candidates_evaluated,
        tuple([memory.memory_id for memory in used]),
        tuple([memory.composite_score for memory in used]),
    )
