"""A provider that answers with the bytes a test gives it, cut and paced as the test says, over plain HTTP/1.1."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from extproc.stack.envoy import Address

LIMIT_S = 120


@dataclass
class Script:
    """One answer. `pieces` are sent one by one; with `breaks` the connection is cut behind the last one."""

    pieces: Sequence[bytes]
    status: int = 200
    content_type: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    waits_s: float = 0.0
    """Before it answers at all."""
    pause_s: float = 0.0
    """Before each piece but the first."""
    breaks: bool = False
    has_length: bool = False
    """A content-length in place of chunks."""


class Provider:
    """`script` may be replaced at any time; it holds for the next request."""

    def __init__(self) -> None:
        self.script = Script([b"{}"])
        self.bodies: list[bytes] = []
        self.address = Address("127.0.0.1", 0)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.bodies.append(await self._body(head, reader))
                if await self._send(self.script, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # whoever sent the request has gone
        finally:
            writer.close()

    @staticmethod
    async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return await reader.readexactly(int(line.partition(b":")[2]))
        body = b""
        if b"transfer-encoding" not in head.lower():
            return body
        while (size := int((await reader.readline()).strip() or b"0", 16)) > 0:
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return body

    @staticmethod
    async def _send(script: Script, writer: asyncio.StreamWriter) -> bool:
        """True: the connection is over."""
        await asyncio.sleep(script.waits_s)
        is_chunked = not script.has_length
        framing = (
            {"transfer-encoding": "chunked"} if is_chunked else {"content-length": str(len(b"".join(script.pieces)))}
        )
        headers = {"content-type": script.content_type, **framing, **script.headers}
        lines = [f"HTTP/1.1 {script.status} Said", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        for number, piece in enumerate(script.pieces):
            if number and script.pause_s:
                await writer.drain()
                await asyncio.sleep(script.pause_s)
            if piece:
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
            await writer.drain()
        if script.breaks:
            return True
        if is_chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return False


@contextmanager
def provide() -> Iterator[Provider]:
    provider = Provider()
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(provider.answer, "127.0.0.1", 0, family=socket.AF_INET)
        host, port = server.sockets[0].getsockname()
        provider.address = Address(host, port)
        started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            server.close()

    task = loop.create_task(run())
    thread = threading.Thread(target=_run, args=(loop, task), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield provider
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(task)
    except asyncio.CancelledError:
        pass
    finally:
        leftover = asyncio.all_tasks(loop)
        for one in leftover:
            one.cancel()
        loop.run_until_complete(asyncio.gather(*leftover, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
