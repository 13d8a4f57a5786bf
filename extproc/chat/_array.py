"""The objects of a JSON array that is streamed, as Gemini sends them without `alt=sse`.

A first look finds where each element ends, by brackets and strings alone; what is in it is the decoder's to judge.
"""

from __future__ import annotations

import re
from typing import Final

from extproc.chat._sse import Event

__all__ = ["ArrayStream"]

_TOKENS: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
"""Whole strings and brackets. A quote alone begins a string whose end is not there yet."""
_MAX_TOKENS: Final = 100_000
"""Of one element, at about 0.2 µs each. Long answers have a few hundred."""


class ArrayStream:
    """Feed bytes that begin with the array's bracket, get its elements as events without a name."""

    def __init__(self, max_event_bytes: int) -> None:
        """At a longer element reading ends: there is no telling where the next one begins without reading it."""
        self.was_cut = False
        self._limit = max_event_bytes
        self._pieces: list[bytes] = []
        self._pieces_bytes = 0
        self._scan_at = 0
        """Look again when so many bytes are there. It doubles, so that a long element is not read for each chunk."""
        self._is_inside = False
        self._is_over = False

    def feed(self, batch: bytes) -> list[Event]:
        if self._is_over:
            return []
        self._pieces.append(batch)
        self._pieces_bytes += len(batch)
        return self._scan() if self._pieces_bytes >= self._scan_at else []

    def finish(self) -> list[Event]:
        return [] if self._is_over else self._scan()

    def _scan(self) -> list[Event]:
        pending = b"".join(self._pieces)
        elements, used = self._elements(pending)
        rest = pending[used:]
        if len(rest) > self._limit:
            self._give_up()
        self._pieces = [] if self._is_over else [rest]
        self._pieces_bytes = len(rest)
        self._scan_at = min(2 * len(rest), self._limit)
        return elements

    def _give_up(self) -> None:
        self.was_cut = self._is_over = True

    def _elements(self, pending: bytes) -> tuple[list[Event], int]:
        """The whole elements, and how many bytes need not be read again."""
        elements: list[Event] = []
        depth = start = tokens = 0
        for found in _TOKENS.finditer(pending):
            token = found[0]
            if token == b'"':
                return elements, start if depth else found.start()
            if token == b"{" or token == b"[":
                if not self._is_inside:
                    self._is_inside = True
                    continue
                if not depth:
                    start, tokens = found.start(), 0
                depth += 1
            elif token == b"}" or token == b"]":
                depth -= 1
                if depth < 0:
                    self._is_over = True
                    break
                if not depth:
                    if found.end() - start > self._limit:
                        self._give_up()
                        break
                    elements.append((b"", pending[start : found.end()]))
            tokens += 1
            if tokens > _MAX_TOKENS:
                self._give_up()
                break
        return elements, start if depth > 0 else len(pending)
