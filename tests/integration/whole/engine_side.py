"""An engine in this process: answers one memory, unless a test says otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from ibex.context.v1 import context_pb2

BLOCK = "<memory>The user's name is Ada.</memory>"
ANSWER = context_pb2.AssembleContextResponse(assembled_context=BLOCK, tokens_used=9, memories_included=1)

Behaviour = Callable[[context_pb2.AssembleContextRequest, grpc.ServicerContext], bytes]


def answer(_request: context_pb2.AssembleContextRequest, _context: grpc.ServicerContext) -> bytes:
    return ANSWER.SerializeToString()


@dataclass
class StubEngine:
    behaviour: Behaviour = answer
    requests: list[context_pb2.AssembleContextRequest] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the test is over, so that a hanging answer ends."""
    stop: Callable[[], object] = lambda: None
    """Ends its server, so that nobody listens at its address."""

    def reset(self) -> None:
        self.behaviour = answer
        self.requests.clear()

    def handle(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        request = context_pb2.AssembleContextRequest.FromString(raw)
        self.requests.append(request)
        return self.behaviour(request, context)


@contextmanager
def serve_engine(engine: StubEngine) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(16))
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(engine.handle)
    service = "ibex.context.v1.ContextAssemblyService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"AssembleContext": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    engine.stop = lambda: server.stop(0).wait(10)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        engine.ended.set()
        server.stop(0).wait(10)
