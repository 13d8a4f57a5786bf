"""Many small requests over few connections. A client library would take most of the machine from what is flooded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from extproc.stack.envoy import Address

LIMIT_S = 30
Ask = Callable[..., Awaitable[int]]
"""Sends one request with these header lines and reads its answer, which must have a length: the status."""


@asynccontextmanager
async def connection(address: Address, target: str = "GET /v1/models") -> AsyncIterator[Ask]:
    reader, writer = await asyncio.open_connection(*address)

    async def ask(*lines: str) -> int:
        writer.write("\r\n".join([f"{target} HTTP/1.1", "host: g", "content-length: 0", *lines, "", ""]).encode())
        async with asyncio.timeout(LIMIT_S):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0]))
        return int(head.split(None, 2)[1])

    try:
        yield ask
    finally:
        writer.close()
        await writer.wait_closed()
