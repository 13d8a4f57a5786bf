"""Servers that read what Envoy shows an observer: a bare grpc.aio loop, the observer without its outbox, a recorder.

All have the observer's server options, event loop and gRPC poller (GRPC_EXPERIMENTS, which the parent sets).

`python -m bench.observer.reader bare|observer|recorder HOST:PORT [DIRECTORY]`; the recorder writes each exchange into
the directory, as 0.recording and on.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2_grpc

from bench.observer.recording import save, split
from extproc.filter.identity import IdentitySources
from extproc.filter.observation import ObservationLimits
from extproc.filter.observer import LagMeter, StreamObserver
from extproc.filter.service import SERVICE_NAME
from extproc.serve import server_options
from extproc.settings import ObserverSettings, load

__all__ = ["main"]

ServicerContext: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Process: TypeAlias = Callable[[object, ServicerContext], Awaitable[None]]

_GRPC_OVERHEAD_BYTES = 1024 * 1024
"""As `extproc observer` adds it to the largest body."""


async def _read_only(_requests: object, context: ServicerContext) -> None:
    read = context.read
    while (_message := await read()) is not grpc.aio.EOF:  # type: ignore[comparison-overlap]  # stub's gap
        pass


def _record_into(directory: Path) -> Process:
    """Streams that are no whole exchange are left out."""
    count = 0

    async def record(_requests: object, context: ServicerContext) -> None:
        nonlocal count
        messages: list[bytes] = []
        while not _is_end(message := await context.read()):
            messages.append(message)
        metadata = [(str(key), str(value)) for key, value in context.invocation_metadata() or ()]
        try:
            recording = split(messages, [each for each in metadata if each[0] == "traceparent"])
        except ValueError:
            return
        save(recording, directory / f"{count}.recording")
        count += 1

    return record


def _is_end(message: object) -> bool:
    return message is grpc.aio.EOF


def _add_process(server: grpc.aio.Server, process: Process) -> None:
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(process)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": handler}),))


async def _serve(kind: str, listen: str, directory: Path) -> None:
    settings = load(ObserverSettings)
    server = grpc.aio.server(options=server_options(settings.max_body_bytes + _GRPC_OVERHEAD_BYTES))
    lag = LagMeter()
    if kind == "observer":
        identities = IdentitySources(settings.identity_org, settings.identity_agent, settings.identity_user)
        StreamObserver(identities, ObservationLimits(), lambda _observed: None, lag).add_to_server(server)
        lag.start()
    else:
        _add_process(server, _read_only if kind == "bare" else _record_into(directory))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    server.add_insecure_port(listen)
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await lag.stop()
    await server.stop(1.0)


def main() -> None:
    kind, listen, *directory = sys.argv[1:]
    uvloop.run(_serve(kind, listen, Path(directory[0] if directory else ".")))


if __name__ == "__main__":
    main()
