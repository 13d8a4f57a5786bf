"""A provider that streams the answer which a request's `x-bench-answer` names, one chunk at a time.

`python -m bench.observer.provider HOST:PORT`
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from bench.observer.transcript import ANSWER_HEADER, Answer, chunks

__all__ = ["main"]

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_REFUSAL = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Requests of one connection until either side goes."""
    try:
        while True:
            headers = _headers(await reader.readuntil(b"\r\n\r\n"))
            await reader.readexactly(int(headers.get("content-length", "0")))
            if ANSWER_HEADER not in headers:
                writer.write(_REFUSAL)
                return
            await _stream(writer, Answer.from_header(headers[ANSWER_HEADER]))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # Envoy has gone
    finally:
        writer.close()


async def _stream(writer: asyncio.StreamWriter, answer: Answer) -> None:
    """The first chunk goes with the head. Each is due at a time of its own, so that delays do not add up."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    pieces = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks(answer)]
    pieces[0] = _HEAD + pieces[0]
    pieces[-1] += b"0\r\n\r\n"
    for number, piece in enumerate(pieces):
        await asyncio.sleep(max(0.0, started + number * answer.pause_ms / 1e3 - loop.time()))
        writer.write(piece)
    await writer.drain()


def _headers(head: bytes) -> dict[str, str]:
    """Envoy writes names in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


async def _serve(host: str, port: int) -> None:
    server = await asyncio.start_server(_answer, host, port)
    await server.serve_forever()


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    uvloop.run(_serve(host, int(port)))


if __name__ == "__main__":
    main()
