"""TLS in front of real Valkeys and Sentinels: the binary of the tests has none of its own."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import trustme

_HANDSHAKE = b"\x16"
"""The first byte of TLS."""


@dataclass
class Front:
    """A port that speaks TLS, and plain text too where `takes_plain`, and passes all of it on to the port `behind`."""

    ca: trustme.CA
    behind: int
    takes_plain: bool = False
    port: int = 0
    secured: int = 0
    """Connections that came with TLS."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, listening: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        self.ca.configure_trust(context)
        self.ca.issue_cert("127.0.0.1").configure_cert(context)
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            task = asyncio.create_task(self._pass_on(connection, context))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        is_secured = await _first_byte(connection) == _HANDSHAKE
        if not (is_secured or self.takes_plain):
            connection.close()
            return
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        with suppress(OSError):
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=context if is_secured else None
            )
            self.secured += is_secured
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.behind)
            try:
                await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
            finally:
                writer.close()
                inner_writer.close()


async def _first_byte(connection: socket.socket) -> bytes:
    """Still to be read."""
    while True:
        try:
            return connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            await asyncio.sleep(0.01)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while received := await reader.read(65536):
        writer.write(received)
    writer.close()


@contextmanager
def fronts(*made: Front) -> Iterator[None]:
    """Each gets a port and serves it in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    sockets = []
    serving = []
    for front in made:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        front.port = listening.getsockname()[1]
        sockets.append(listening)
        serving.append(asyncio.run_coroutine_threadsafe(front.serve(listening), loop))
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(_end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
        for listening in sockets:
            listening.close()


async def _end() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.1)  # in which closed connections go
