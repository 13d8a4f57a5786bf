"""An answer while it is read: what was seen so far, within its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from extproc.chat._answer import Completion, ToolCall, Usage
from extproc.chat._loose import is_given, read_id

if TYPE_CHECKING:
    from msgspec import Raw

    from extproc.chat._answer import AnswerLimits

__all__ = ["Draft"]

_MAX_CALLS: Final = 128
"""Most tool calls of one answer: OpenAI's limit for the tools of a request."""
_LONGEST_USAGE: Final = 16 * 1024
"""Providers send some hundred bytes."""


class _Room:
    """What is left of a limit in bytes."""

    __slots__ = ("left", "was_short")

    def __init__(self, left: int) -> None:
        self.left = left
        self.was_short = False

    def fit(self, piece: str) -> bytes:
        """As much of it as there is room for, in whole characters. After the first cut there is none."""
        encoded = piece.encode()
        if len(encoded) <= self.left:
            self.left -= len(encoded)
            return encoded
        end = self.left
        while end and encoded[end] & 0xC0 == 0x80:  # the next byte continues a UTF-8 sequence
            end -= 1
        self.left = 0
        self.was_short = True
        return encoded[:end]


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: bytearray = field(default_factory=bytearray)


class Draft:
    """Texts are kept as UTF-8: a list of a million tokens as `str` would take 15 times their size."""

    def __init__(self, limits: AnswerLimits) -> None:
        self.finish_reason = ""
        self.model = ""
        self.response_id = ""
        self.usage = Usage()
        self.last_usage = b""
        """The provider's usage object as it came last: some count in each event, and the last one is read."""
        self.error = ""
        self.has_ended = False
        self.was_cut = False
        self._text = bytearray()
        self._text_room = _Room(limits.max_text_bytes)
        self._refusal = bytearray()
        self._refusal_room = _Room(limits.max_text_bytes)
        self._calls: list[_Call] = []
        self._open_calls: dict[object, _Call] = {}
        self._argument_room = _Room(limits.max_text_bytes)

    def has_content(self) -> bool:
        return bool(self._text or self._refusal or self._calls)

    def add_text(self, piece: str) -> None:
        self._text += self._text_room.fit(piece)

    def add_refusal(self, piece: str) -> None:
        self._refusal += self._refusal_room.fit(piece)

    def name_answer(self, response_id: Raw, model: Raw) -> None:
        """The first of each counts."""
        self.response_id = self.response_id or read_id(response_id)
        self.model = self.model or read_id(model)

    def note_usage(self, usage: Raw) -> None:
        if is_given(usage) and len(usage) <= _LONGEST_USAGE:
            self.last_usage = bytes(usage)

    def note_error(self, error: str) -> None:
        """The first counts: what follows is its consequence."""
        self.error = self.error or error

    def open_call(self, key: object, call_id: str, name: str) -> None:
        """A new call, whose arguments come under `key`."""
        if len(self._calls) >= _MAX_CALLS:
            self.close_call(key)
            self.was_cut = True
            return
        self._open_calls[key] = call = _Call(call_id, name)
        self._calls.append(call)

    def close_call(self, key: object) -> None:
        """Something else comes under `key` now, if anything."""
        self._open_calls.pop(key, None)

    def open_id(self, key: object) -> str | None:
        """Id of the call that is open under `key`; None: none is."""
        call = self._open_calls.get(key)
        return call.id if call else None

    def has_arguments(self, key: object) -> bool:
        call = self._open_calls.get(key)
        return call is not None and len(call.arguments) > 0

    def add_arguments(self, key: object, piece: str) -> None:
        """Nothing happens without a call under `key`."""
        if call := self._open_calls.get(key):
            call.arguments += self._argument_room.fit(piece)

    def completion(self) -> Completion:
        rooms = (self._text_room, self._refusal_room, self._argument_room)
        return Completion(
            text=self._text.decode(),
            refusal=self._refusal.decode(),
            tool_calls=tuple(ToolCall(call.id, call.name, call.arguments.decode()) for call in self._calls),
            finish_reason=self.finish_reason,
            model=self.model,
            response_id=self.response_id or None,
            usage=self.usage,
            error=self.error,
            has_ended=self.has_ended,
            was_cut=self.was_cut or any(room.was_short for room in rooms),
        )
