"""A context filter in miniature: answers Envoy's ext_proc messages as a test wants, and remembers each stream."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as rpc
from google.protobuf import struct_pb2

OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
OPTIONS = [
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
    ("grpc.max_send_message_length", 32 * 1024 * 1024),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
]

Answer = Callable[[pb.ProcessingRequest], pb.ProcessingResponse]


@dataclass
class Stream:
    """One ext_proc stream: what Envoy sent."""

    metadata: dict[str, str]
    messages: list[pb.ProcessingRequest] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return [str(message.WhichOneof("request")) for message in self.messages]

    def header(self, name: str) -> str | None:
        """A request header as the filter sees it."""
        for message in self.messages:
            for header in message.request_headers.headers.headers:
                if header.key == name:
                    return bytes(header.raw_value).decode()
        return None

    @property
    def body(self) -> bytes:
        return b"".join(message.request_body.body for message in self.messages)


class Processor(rpc.ExternalProcessorServicer):  # type: ignore[misc]  # generated without stubs
    """`answer` may be replaced by a test; `reset` puts the default back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self.lock:
            self.streams: list[Stream] = []
        self.answer: Answer = default_answer

    def Process(  # noqa: N802 - the name is Envoy's
        self, request_iterator: Iterator[pb.ProcessingRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ProcessingResponse]:
        metadata = {str(pair[0]): str(pair[1]) for pair in context.invocation_metadata()}
        stream = Stream(metadata)
        with self.lock:
            self.streams.append(stream)
        for message in request_iterator:
            stream.messages.append(message)
            yield self.answer(message)


def headers(**values: str) -> pb.HeaderMutation:
    """Overwrites; underscores in a name stand for dashes."""
    return pb.HeaderMutation(
        set_headers=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=name.replace("_", "-"), raw_value=value.encode()),
                append_action=OVERWRITE,
            )
            for name, value in values.items()
        ]
    )


def body_answer(body: bytes | None = None, **metadata: str | float) -> pb.ProcessingResponse:
    """A reply to the request body; None leaves it as it is. `metadata` becomes `ibex.context`."""
    common = pb.CommonResponse()
    if body is not None:
        common.body_mutation.body = body
        common.header_mutation.CopyFrom(headers(content_length=str(len(body))))
    response = pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))
    if metadata:
        inner = struct_pb2.Struct()
        inner.update(metadata)
        response.dynamic_metadata.fields["ibex.context"].struct_value.CopyFrom(inner)
    return response


def default_answer(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
    """What a healthy filter does when it finds seven memories, without touching the body."""
    match message.WhichOneof("request"):
        case "request_headers":
            return pb.ProcessingResponse(request_headers=pb.HeadersResponse())
        case "request_body":
            return body_answer(outcome="injected", memories=7, tokens=70, assemble_ms=1.5)
        case _:
            mutation = headers(
                x_ibex_memories_injected="7",
                x_ibex_context_tokens="70",
                x_ibex_context_fallback="false",
                x_ibex_session_id="echoed",
            )
            common = pb.CommonResponse(header_mutation=mutation)
            return pb.ProcessingResponse(response_headers=pb.HeadersResponse(response=common))


def serve(processor: Processor, address: str) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(32), options=OPTIONS)
    rpc.add_ExternalProcessorServicer_to_server(processor, server)
    if server.add_insecure_port(address) == 0:
        raise OSError(f"cannot listen on {address}")
    server.start()
    return server


def main(address: str) -> None:
    """A filter in a process of its own, for tests that freeze or kill it."""
    server = serve(Processor(), address)
    signal.signal(signal.SIGTERM, lambda *_: server.stop(0))
    server.wait_for_termination(timeout=120)


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
