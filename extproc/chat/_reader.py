"""The reader of answers: chunks in, pieces of JSON to the format, a Completion out.

Chunks are collected and read some kilobytes at a time, because most of them hold one short event. What the format makes
of an event does not depend on where the bytes were cut.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from msgspec import Raw

from extproc.chat._answer import AnswerLimits, Completion
from extproc.chat._array import ArrayStream
from extproc.chat._draft import Draft
from extproc.chat._loose import read_error
from extproc.chat._sse import Event, EventStream

__all__ = ["Answer", "BodyReader"]

_BATCH_BYTES: Final = 8192
"""About 30 events. Joining and splitting them together costs a tenth of doing so for each; more gains nothing."""
_LARGE_BYTES: Final = 65536
_MAX_OBJECTS: Final = 100_000
"""Most objects in a large piece, braces in strings included. Each may cost 0.15 µs to build."""

_HEAD_BYTES: Final = 8
"""Enough to tell JSON from events."""

_is_json = re.compile(rb"\s*+[{\[]").match
_is_array = re.compile(rb"\s*+\[").match
_is_sse = re.compile(rb"\s*+(?:data|event|id|retry)?:").match


class Answer(Protocol):
    """What a format knows about its answers."""

    draft: Draft

    def take(self, name: bytes, piece: bytes) -> bool:
        """Read one event, named as its `event` field or with an empty name, or one whole body.

        False: it cannot be read. Never raises.
        """
        ...

    def settle(self) -> None:
        """Nothing comes after this: put into the draft what was left for the end. Never raises."""
        ...


class _Splitter(Protocol):
    was_cut: bool

    def feed(self, batch: bytes) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class _Document:
    """A whole JSON body."""

    def __init__(self, max_bytes: int) -> None:
        self.was_cut = False
        self._room = max_bytes
        self._pieces: list[bytes] = []

    def feed(self, batch: bytes) -> list[Event]:
        self._room -= len(batch)
        if self._room < 0:
            self.was_cut = True
            self._pieces.clear()
        else:
            self._pieces.append(batch)
        return []

    def finish(self) -> list[Event]:
        return [(b"", b"".join(self._pieces))]


class BodyReader:
    """An `AnswerReader` for any format."""

    def __init__(self, is_sse: bool, limits: AnswerLimits, answer: Answer) -> None:  # noqa: FBT001 - as in the protocol
        self._is_sse = is_sse
        self._limits = limits
        self._answer = answer
        self._chunks: list[bytes] = []
        self._chunk_bytes = 0
        self._is_first = True
        self._splitter: _Splitter | None = None
        """None: nothing but white space came."""

    def feed(self, chunk: bytes) -> None:
        if chunk:
            self._chunks.append(chunk)
            self._chunk_bytes += len(chunk)
            if self._chunk_bytes >= _BATCH_BYTES:
                self._read_batch()

    def finish(self) -> Completion:
        self._read_batch(is_last=True)
        draft = self._answer.draft
        if self._splitter is not None:
            is_whole = self._take_all(self._splitter.finish())
            draft.has_ended |= is_whole and isinstance(self._splitter, _Document)
            draft.was_cut |= self._splitter.was_cut
        self._answer.settle()
        return draft.completion()

    def _read_batch(self, *, is_last: bool = False) -> None:
        batch = b"".join(self._chunks)
        self._chunks.clear()
        self._chunk_bytes = 0
        if self._splitter is None:
            batch = self._begin(batch, is_last=is_last)
        if self._splitter is not None:
            for name, piece in self._splitter.feed(batch):
                if not self._take(name, piece) and piece.startswith(b"{"):
                    self._answer.draft.was_cut = True

    def _begin(self, batch: bytes, *, is_last: bool) -> bytes:
        """Find out what the body is, and return what is to be read of it. Blanks before it may go on for long."""
        if self._is_first:
            batch = batch.removeprefix(b"\xef\xbb\xbf")
        head = batch.lstrip()
        if len(head) >= _HEAD_BYTES or (head and is_last):
            self._splitter = self._choose(batch)
        elif head:
            self._chunks.append(batch)
        elif batch:
            self._is_first = False
            self._chunks.append(b"" if batch.endswith((b"\r", b"\n")) else b" ")  # still within a line
        return batch

    def _choose(self, batch: bytes) -> _Splitter:
        """What it looks like counts too: errors come as JSON under a stream's content type, streams under any."""
        if not _is_json(batch) if self._is_sse else _is_sse(batch):
            return EventStream(self._limits.max_event_bytes)
        if _is_array(batch):
            return ArrayStream(self._limits.max_event_bytes)
        return _Document(self._limits.max_json_bytes)

    def _take_all(self, events: list[Event]) -> bool:
        """Those of the end, where a piece that cannot be read was cut off before it came here."""
        is_whole = True
        for name, piece in events:
            is_whole &= self._take(name, piece)
        return is_whole

    def _take(self, name: bytes, piece: bytes) -> bool:
        if len(piece) > _LARGE_BYTES and piece.count(b"{") > _MAX_OBJECTS:
            self._answer.draft.was_cut = True
            return False
        is_read = self._answer.take(name, piece)
        if name == b"error":
            self._answer.draft.note_error(read_error(Raw(piece)) or "error")
        return is_read
