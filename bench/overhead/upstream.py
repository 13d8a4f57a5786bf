"""A provider that costs next to nothing: reads a whole HTTP/1.1 request, answers a fixed small JSON.

`python -m bench.overhead.upstream HOST:PORT`
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop
from typing_extensions import override

__all__ = ["main"]

_ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"gpt-4o","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"Noted."},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,'
    b'"total_tokens":2}}'
)
_RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_ANSWER),
    _ANSWER,
)
_REFUSAL = b"HTTP/1.1 411 Length Required\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One kept-alive connection without pipelining, which is how Envoy speaks HTTP/1.1."""

    def __init__(self) -> None:
        self._head = b""
        self._missing = 0
        """Bytes of the body that have not come yet."""
        self._transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has the methods, not the base class

    @override
    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _content_length(self._head[: end + 2])
            if length is None:
                self._reply(_REFUSAL)
                return
            self._missing = length - (len(self._head) - end - 4)
            self._head = b""
        if self._missing <= 0:
            self._missing = 0
            self._reply(_RESPONSE)

    def _reply(self, response: bytes) -> None:
        if self._transport is not None:
            self._transport.write(response)


def _content_length(head: bytes) -> int | None:
    """Envoy writes header names in lower case."""
    at = head.find(b"\r\ncontent-length: ")
    return int(head[at + 18 : head.find(b"\r\n", at + 18)]) if at >= 0 else None


async def _serve(host: str, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, host, port)
    await server.serve_forever()


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    uvloop.run(_serve(host, int(port)))


if __name__ == "__main__":
    main()
