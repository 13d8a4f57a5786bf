"""Server-sent events out of bytes that were cut anywhere (WHATWG HTML, section 9.2 "Server-sent events").

One rule differs: at the end of the stream an event counts without its blank line. Some servers leave that out, and a
broken event shows by its JSON.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Event", "EventStream"]

Event = tuple[bytes, bytes]
"""`event` field, empty when absent, and the `data` lines joined by line breaks."""

_LINE_BYTES: Final = 64
"""What a line of data counts beside its own bytes, from the second on: about what it costs in memory."""


class EventStream:
    """Feed bytes, get events. A byte-order mark is the caller's to remove."""

    def __init__(self, max_event_bytes: int) -> None:
        """An event that has more data than `max_event_bytes`, or any longer line in it, is left out."""
        self.was_cut = False
        """Some event was left out for its length."""
        self._limit = max_event_bytes
        self._line: list[bytes] = []
        """Pieces of the line that has no end yet."""
        self._line_bytes = 0
        self._ended_in_cr = False
        """A line break at the start of the next bytes belongs to the one before."""
        self._name = b""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._is_skipping = False

    def feed(self, batch: bytes) -> list[Event]:
        """The events that end in it."""
        if self._ended_in_cr and batch.startswith(b"\n"):
            batch = batch[1:]
        self._ended_in_cr = batch.endswith(b"\r")
        end = max(batch.rfind(b"\n"), batch.rfind(b"\r")) + 1
        events = self._read_lines(self._take_line() + batch[:end]) if end else []
        self._keep(batch[end:])
        return events

    def finish(self) -> list[Event]:
        """The last event, if it has no blank line after it."""
        return self._read_lines(self._take_line() + b"\n\n")

    def _take_line(self) -> bytes:
        line = b"".join(self._line)
        self._line.clear()
        self._line_bytes = 0
        return line

    def _keep(self, piece: bytes) -> None:
        if not piece:
            return
        self._line.append(piece)
        self._line_bytes += len(piece)
        if self._line_bytes > self._limit:
            self._take_line()
            self._line.append(b":")  # what is still to come of the line reads as a comment
            self._skip()

    def _skip(self) -> None:
        """Leave out everything up to the next blank line."""
        self.was_cut = True
        self._is_skipping = True
        self._data = []

    def _read_lines(self, block: bytes) -> list[Event]:
        events = []
        may_be_long = len(block) > self._limit
        for line in block.splitlines():  # of bytes: at CR, LF and CRLF only
            if not line:
                if self._data and not self._is_skipping:
                    events.append((self._name, b"\n".join(self._data)))
                self._name, self._data, self._data_bytes, self._is_skipping = b"", [], 0, False
            elif may_be_long and len(line) > self._limit:
                self._skip()
            elif line.startswith(b"data:"):
                self._add_data(line[6:] if line.startswith(b" ", 5) else line[5:])
            elif line.startswith(b"event:"):
                self._name = line[7:] if line.startswith(b" ", 6) else line[6:]
            elif line == b"data":
                self._add_data(b"")
            elif line == b"event":
                self._name = b""
        return events

    def _add_data(self, value: bytes) -> None:
        if self._is_skipping:
            return
        self._data_bytes += len(value) + (_LINE_BYTES if self._data else 0)
        self._data.append(value)
        if self._data_bytes > self._limit:
            self._skip()
