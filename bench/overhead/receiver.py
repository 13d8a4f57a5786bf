"""An OTLP/HTTP receiver of traces (JSON) that counts spans; says on standard output how many, when SIGTERM ends it.

`python -m bench.overhead.receiver HOST:PORT`
"""

from __future__ import annotations

import asyncio
import gzip
import signal
import sys

import msgspec
import uvloop

__all__ = ["main"]

_TAKEN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class _Scope(msgspec.Struct, rename="camel"):
    spans: list[msgspec.Raw] = []


class _Resource(msgspec.Struct, rename="camel"):
    scope_spans: list[_Scope] = []


class _Export(msgspec.Struct, rename="camel"):
    """ExportTraceServiceRequest, as far as counting needs it."""

    resource_spans: list[_Resource] = []


_decode = msgspec.json.Decoder(_Export).decode


class _Counter:
    def __init__(self) -> None:
        self.spans = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One kept-alive connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(_header(head, b"content-length") or 0))
                self._count(gzip.decompress(body) if _header(head, b"content-encoding") == b"gzip" else body)
                writer.write(_TAKEN)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the exporter is done
        finally:
            writer.close()

    def _count(self, body: bytes) -> None:
        for resource in _decode(body).resource_spans:
            self.spans += sum(len(scope.spans) for scope in resource.scope_spans)


def _header(head: bytes, name: bytes) -> bytes:
    """Of a head in lower case; empty when absent."""
    start = head.find(b"\r\n" + name + b":")
    return head[start + len(name) + 3 : head.find(b"\r\n", start + 2)].strip() if start >= 0 else b""


async def _serve(listen: str) -> None:
    counter = _Counter()
    host, _, port = listen.rpartition(":")
    server = await asyncio.start_server(counter.serve, host, int(port))
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    server.close()
    print(counter.spans)


def main() -> None:
    uvloop.run(_serve(sys.argv[1]))


if __name__ == "__main__":
    main()
