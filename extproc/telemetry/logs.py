"""Structured logs, one JSON object a line, that can never stop a request.

Lines go through a bounded buffer to a thread that writes them: a reader of our standard output that stops reading
costs log lines (counted, and said as soon as it reads again), not requests.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from typing import BinaryIO

import msgspec
import structlog
from structlog.typing import EventDict
from typing_extensions import override

__all__ = ["LineWriter", "configure_logs"]

_encode = msgspec.json.Encoder(enc_hook=str).encode

_KEPT_LINES = 10_000
_WRITE_INTERVAL_S = 0.25
"""Lines are written in batches: a wake-up for each would cost more than the line."""


class LineWriter:
    """Takes lines from any thread without waiting; one thread writes them. `close` writes what is left."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: deque[bytes] = deque()
        self._dropped = 0
        self._has_lines = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        if len(self._lines) >= _KEPT_LINES:
            self._dropped += 1
            return
        self._lines.append(line)
        if not self._has_lines.is_set():
            self._has_lines.set()

    def put_object(self, line: msgspec.Struct) -> None:
        """For lines that are written so often that a dict and a chain of processors would show."""
        self.put(_encode(line))

    def close(self, timeout_s: float = 1.0) -> None:
        self._closing.set()
        self._has_lines.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._has_lines.wait()
            self._closing.wait(_WRITE_INTERVAL_S)
            self._has_lines.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if self._dropped:
            lines.append(
                msgspec.json.encode({"level": "warning", "event": "log lines dropped", "count": self._dropped})
            )
            self._dropped = 0
        if not lines:
            return
        try:
            self._stream.write(b"\n".join(lines) + b"\n")
            self._stream.flush()
        except Exception:  # noqa: BLE001 - whatever it is, this thread must live on
            # Nobody takes our output; said as soon as somebody does again.
            self._dropped += len(lines)


class _Logger:
    """What structlog calls at the end of its chain, which gives it the encoded line."""

    def __init__(self, writer: LineWriter) -> None:
        self._put = writer.put

    def msg(self, line: bytes) -> None:
        self._put(line)

    debug = info = warning = error = critical = exception = msg


class _StandardLogging(logging.Handler):
    """Lines of libraries (grpc, asyncio, uvicorn) take the same way."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def _without_words(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Of an exception its class and frames stay: its own words may hold what a client, a provider or a memory says."""
    stacks = event.get("exception")
    for stack in stacks if isinstance(stacks, list) else ():
        for said in ("exc_value", "exc_notes", "syntax_error", "exceptions"):
            stack.pop(said, None)
    return event


def configure_logs(process: str, level: str, stream: BinaryIO | None = None) -> LineWriter:
    """Set up structlog for this process; returns the writer, to be closed last."""
    writer = LineWriter(stream or sys.stdout.buffer)
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            _without_words,
            lambda _logger, _method, event: _encode({"process": process, **event}),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_args: _Logger(writer),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_StandardLogging()], level=max(threshold, logging.WARNING), force=True)
    return writer
