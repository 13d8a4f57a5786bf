"""Plays Envoy's part towards a filter, and an engine that does what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf import struct_pb2
from ibex.context.v1 import context_pb2

from extproc.filter.report import RequestLine

ORG = "11111111-1111-4111-8111-111111111111"
AGENT = "22222222-2222-4222-8222-222222222222"

ANSWER = context_pb2.AssembleContextResponse(
    assembled_context="<memory>The user's name is Ada.</memory>",
    tokens_used=11,
    memories_included=1,
    memories_used=[context_pb2.MemoryUsed(memory_id="m1", composite_score=0.9, exclusion="included")],
)


@dataclass
class StubEngine:
    """Answers `ANSWER` until a test sets another behaviour: bytes in, bytes out."""

    behaviour: Callable[[bytes], Awaitable[bytes]] | None = None
    requests: list[context_pb2.AssembleContextRequest] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    status: grpc.StatusCode | None = None

    async def answer(self, raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.requests.append(context_pb2.AssembleContextRequest.FromString(raw))
        self.metadata.append(dict(context.invocation_metadata() or ()))
        if self.status is not None:
            await context.abort(self.status, "told to")
        return await self.behaviour(raw) if self.behaviour else ANSWER.SerializeToString()


ProcessCall = grpc.aio.StreamStreamCall[ext_proc.ProcessingRequest, ext_proc.ProcessingResponse]


@dataclass
class Filter:
    """Plays Envoy's part: opens streams, sends messages, reads the one reply of each."""

    channel: grpc.aio.Channel
    lines: list[RequestLine] = field(default_factory=list)
    """What it wrote into its log."""

    def open(self, *metadata: tuple[str, str]) -> ProcessCall:
        call: ProcessCall = self.channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
            request_serializer=ext_proc.ProcessingRequest.SerializeToString,
            response_deserializer=ext_proc.ProcessingResponse.FromString,
        )(metadata=metadata)
        return call


async def ask(call: ProcessCall, message: ext_proc.ProcessingRequest) -> ext_proc.ProcessingResponse:
    await call.write(message)
    reply = await asyncio.wait_for(call.read(), 20)
    assert isinstance(reply, ext_proc.ProcessingResponse)
    return reply


def request_headers(headers: dict[str, str] | None = None, *, org: str | None = ORG) -> ext_proc.ProcessingRequest:
    pairs = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        "content-type": "application/json",
        "content-length": "100",
        "x-request-id": "r1",
        "x-ibex-session-id": "s1",
    } | (headers or {})
    message = ext_proc.ProcessingRequest(request_headers=ext_proc.HttpHeaders(headers=_map(pairs)))
    if org:
        identity = struct_pb2.Struct(fields={"org_id": struct_pb2.Value(string_value=org)})
        message.metadata_context.filter_metadata["ibex.identity"].CopyFrom(identity)
    return message


def request_body(body: bytes) -> ext_proc.ProcessingRequest:
    return ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=body, end_of_stream=True))


def response_headers(status: str = "200") -> ext_proc.ProcessingRequest:
    return ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders(headers=_map({":status": status})))


def _map(pairs: dict[str, str]) -> base_pb2.HeaderMap:
    return base_pb2.HeaderMap(
        headers=[base_pb2.HeaderValue(key=name, raw_value=value.encode()) for name, value in pairs.items()]
    )
