"""Insert one block at one place of a body. Only a message that begins oddly needs the body parsed again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import msgspec
from msgspec import Raw

from extproc.chat._json import decode
from extproc.chat._request import Place, Placement, UnreadableBody
from extproc.chat._span import locate

if TYPE_CHECKING:
    from extproc.chat._request import EditPoints

__all__ = ["ArrayOf", "MessageFrame", "element_place", "key_place", "object_start", "prefix_place", "splice_block"]


class ArrayOf(msgspec.Struct):
    """The array of messages alone. Each format gives the field its key, again: msgspec renames no inherited field."""

    array: Raw


@dataclass(frozen=True, slots=True)
class MessageFrame:
    """How a format writes a message of ours: the block goes between the two as the inside of a JSON string."""

    decoder: msgspec.json.Decoder[ArrayOf]
    user: bytes
    after: bytes
    system: bytes | None = None
    """None: the format keeps its instructions outside of the array."""


_is_empty_array = re.compile(rb"\[[ \t\r\n]*+\]").fullmatch
_raws_decoder = msgspec.json.Decoder(list[Raw])

_WINDOW_BYTES = 256
"""How far before a content its message may begin; enough for ids and roles."""
_OBJECT_START = re.compile(
    rb'\{[ \t\r\n]*(?:"[^"\\]*"[ \t\r\n]*:[ \t\r\n]*"[^"\\]*"[ \t\r\n]*,[ \t\r\n]*)*+"[^"\\]*"[ \t\r\n]*:[ \t\r\n]*\Z'
).search
"""The beginning of an object up to a member's value, all members before it being strings without quotes and escapes.

Exact in a well-formed document that has a value where the searched bytes end. Read it backwards: a quote within a
string always has a backslash before it. Here each opening quote follows white space, a brace, a comma or a colon, and
each closing one follows no backslash, so both are real; between two real quotes without a third lies one string; and
what stands between strings is structure. So each step is certain, and the first brace outside of a string opens the
object.
"""


def splice_block(body: bytes, edits: EditPoints, text: str, placement: Placement, frame: MessageFrame) -> bytes:
    """The body with the text at its place; unchanged when there is no such place, nor a user message with text."""
    try:
        place = _find_place(body, edits, placement, frame)
    except UnreadableBody:  # the stack is deeper here than when the body was read, and the body nests up to the limit
        place = None
    return _insert(body, place or edits.last_user, text)


def _find_place(body: bytes, edits: EditPoints, placement: Placement, frame: MessageFrame) -> Place | None:
    match placement:
        case Placement.LAST_USER:
            return edits.last_user
        case Placement.BEFORE_LAST_USER:
            if edits.user_index < 0:
                return None
            return _message_place(body, frame, edits.user_index, edits.user_content_at, frame.user)
        case Placement.SYSTEM_FIRST:
            if frame.system is None:
                return edits.system
            return _message_place(body, frame, 0, edits.first_content_at, frame.system)
        case _:
            assert_never(placement)


def _message_place(body: bytes, frame: MessageFrame, index: int, content_at: int, before: bytes) -> Place:
    """Right before the message at `index`, whose content value is at `content_at` (-1: it has none)."""
    start = object_start(body, content_at) if content_at >= 0 else -1
    if start < 0:
        array = decode(frame.decoder, body).array
        messages = decode(_raws_decoder, array)
        if not messages:
            return Place(locate(body, array) + 1, before, frame.after)
        start = locate(body, messages[index])
    return Place(start, before, frame.after + b",")


def _insert(body: bytes, place: Place | None, text: str) -> bytes:
    """`body[:at] + inserted + body[at:]`, copied once; the body itself without a place or text."""
    if place is None or not text:
        return body
    view = memoryview(body)
    escaped = msgspec.json.encode(text)[1:-1]
    return b"".join((view[: place.at], place.before, escaped, place.after, view[place.at :]))


def prefix_place(body: bytes, string: Raw) -> Place:
    """The beginning of a string, with a blank line after the block."""
    return Place(locate(body, string) + 1, b"", rb"\n\n")


def element_place(body: bytes, array: Raw, before: bytes, after: bytes) -> Place:
    """A new first element of an array."""
    return Place(locate(body, array) + 1, before, after if _is_empty_array(array) else after + b",")


def key_place(body: bytes, before: bytes, after: bytes) -> Place:
    """A new first key of the body, which must be an object with at least one key."""
    return Place(body.index(b"{") + 1, before, after + b",")


def object_start(body: bytes, value_at: int) -> int:
    """Where the object begins that has a value at `value_at`; -1 when its members before that are not plain strings."""
    window_at = max(0, value_at - _WINDOW_BYTES)
    found = _OBJECT_START(body, window_at, value_at)
    return found.start() if found else -1
