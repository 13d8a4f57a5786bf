"""The bare processor and the bare engine: what grpc.aio itself costs for the same conversation, and nothing else.

The processor gets the same messages as the filter (request headers, buffered request body, response headers), asks the
engine once with bytes, and replies: continue, the body unchanged as a mutation with its `content-length`, four response
headers. No JSON, no identity, no spans, no metrics, no logs. Server and channel options are the filter's own.

`python -m bench.overhead.echo processor HOST:PORT ENGINE` and `python -m bench.overhead.echo engine HOST:PORT SECONDS`
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TypeAlias

import grpc
import grpc.aio
import uvloop
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from extproc.context.client import CHANNEL_OPTIONS
from extproc.filter.service import SERVICE_NAME
from extproc.serve import server_options

__all__ = ["main"]

_MAX_BODY_BYTES = 11 * 1024 * 1024
"""The filter's default limit and gRPC's overhead on top of it."""

_ENGINE_METHOD = "/bench.Engine/Ask"
_QUESTION = b"q" * 1_000
"""About what the filter sends: ids, the query, a few recent messages."""
_ANSWER = b"a" * 2_000
"""About what an engine answers: the block, and ids and scores of its memories."""

_RESPONSE_HEADERS = (
    ("x-ibex-memories-injected", b"1"),
    ("x-ibex-context-tokens", b"64"),
    ("x-ibex-context-fallback", b"false"),
    ("x-ibex-session-id", b"bench-0"),
)

ServicerContext: TypeAlias = grpc.aio.ServicerContext[ext_proc.ProcessingRequest, ext_proc.ProcessingResponse]


class _Processor:
    def __init__(self, engine: str) -> None:
        channel = grpc.aio.insecure_channel(engine, options=CHANNEL_OPTIONS)
        self._ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_ENGINE_METHOD)

    async def process(self, _requests: object, context: ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(await self._reply(message))

    async def _reply(self, message: ext_proc.ProcessingRequest) -> ext_proc.ProcessingResponse:
        match message.WhichOneof("request"):
            case "request_headers":
                return ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
            case "request_body":
                await self._ask(_QUESTION, timeout=1.0)
                return _same_body(message.request_body.body)
            case _:
                common = ext_proc.CommonResponse(header_mutation=_mutation(_RESPONSE_HEADERS))
                return ext_proc.ProcessingResponse(response_headers=ext_proc.HeadersResponse(response=common))


def _same_body(body: bytes) -> ext_proc.ProcessingResponse:
    common = ext_proc.CommonResponse(
        body_mutation=ext_proc.BodyMutation(body=body),
        header_mutation=_mutation((("content-length", str(len(body)).encode()),)),
    )
    return ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse(response=common))


def _mutation(headers: tuple[tuple[str, bytes], ...]) -> ext_proc.HeaderMutation:
    overwrite = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    return ext_proc.HeaderMutation(
        set_headers=[
            base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=name, raw_value=value), append_action=overwrite)
            for name, value in headers
        ]
    )


def _processor_handler(engine: str) -> grpc.GenericRpcHandler:
    method = grpc.stream_stream_rpc_method_handler(
        _Processor(engine).process,
        request_deserializer=ext_proc.ProcessingRequest.FromString,
        response_serializer=ext_proc.ProcessingResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": method})


def _engine_handler(answer_s: float) -> grpc.GenericRpcHandler:
    async def answer(_request: bytes, _context: object) -> bytes:
        if answer_s:
            await asyncio.sleep(answer_s)
        return _ANSWER

    service, method = _ENGINE_METHOD.strip("/").split("/")
    return grpc.method_handlers_generic_handler(service, {method: grpc.unary_unary_rpc_method_handler(answer)})


async def _serve(role: str, listen: str, more: str) -> None:
    server = grpc.aio.server(options=server_options(_MAX_BODY_BYTES))
    handler = _processor_handler(more) if role == "processor" else _engine_handler(float(more))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(listen)
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await server.stop(1.0)


def main() -> None:
    role, listen, more = sys.argv[1:]
    uvloop.run(_serve(role, listen, more))


if __name__ == "__main__":
    main()
