"""Insert a directive and a block of memories, each at one place of a body, in one copy.

A long body is parsed again only for a message that begins oddly, or when the first user message has no text; a short
one also for where its messages begin, which few insertions need.

The directive is the same for a long time and its place depends on the beginning of the conversation alone, so what a
provider has cached of one request serves the next. The memories differ, and come after it where both go to one place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias, assert_never

import msgspec
from msgspec import Raw

from extproc.chat._conversation import Turn, find_opening, first_text
from extproc.chat._json import decode
from extproc.chat._place import element_place, end_place, message_place
from extproc.chat._request import InjectionMode, Place, Placement, UnreadableBody
from extproc.chat._span import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.chat._request import Directive, EditPoints, Opening

__all__ = ["ArrayOf", "MessageFrame", "object_start", "splice_texts"]


class ArrayOf(msgspec.Struct):
    """The array of messages alone. Each format gives the field its key, again: msgspec renames no inherited field."""

    array: Raw


@dataclass(frozen=True, slots=True)
class MessageFrame:
    """How a format writes a message of ours: the text goes between the two as the inside of a JSON string."""

    decoder: msgspec.json.Decoder[ArrayOf]
    turns: msgspec.json.Decoder[list[Turn]]
    """Of the array, by the format's own names."""
    text_types: frozenset[str | None]
    """Of the parts of a content that are text."""
    user: bytes
    after: bytes
    system: bytes | None = None
    """None: the format keeps its instructions outside of the array."""


_Find: TypeAlias = "Callable[[bytes, EditPoints, MessageFrame], Place | None]"

_raws_decoder = msgspec.json.Decoder(list[Raw])

_MARK: Final = b"[DIRECTIVE]: "
"""Before a directive that the model reads as a user's words; contract, section 4."""

_MOST_USERS: Final = 100
"""User messages to look into for the first text. Almost always it is in the first one, and each may cost 2 µs."""

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


def splice_texts(
    body: bytes, edits: EditPoints, text: str, placement: Placement, directive: Directive | None, frame: MessageFrame
) -> bytes:
    """The body with both at their places; the body itself when there is no place for either."""
    insertions: list[tuple[Place, bytes]] = []
    if directive and directive.text and (place := _directive_place(body, edits, directive.mode, frame)):
        insertions.append((place, _escaped(directive.text)))
    if text and (place := _block_place(body, edits, placement, frame)):
        insertions.append((place, _escaped(text)))
    match insertions:
        case []:
            return body
        case [(first, one), (second, other)] if first == second:
            return _insert(body, [(first, one + first.between + other)])
        case _:
            return _insert(body, sorted(insertions, key=lambda insertion: insertion[0].at))  # stable: directive first


def _escaped(text: str) -> bytes:
    return msgspec.json.encode(text)[1:-1]


def _insert(body: bytes, insertions: Iterable[tuple[Place, bytes]]) -> bytes:
    """In the order of their offsets, with the body copied once."""
    view = memoryview(body)
    pieces: list[bytes | memoryview] = []
    at = 0
    for place, escaped in insertions:
        pieces += (view[at : place.at], place.before, escaped, place.after)
        at = place.at
    pieces.append(view[at:])
    return b"".join(pieces)


def _block_place(body: bytes, edits: EditPoints, placement: Placement, frame: MessageFrame) -> Place | None:
    match placement:
        case Placement.LAST_USER:
            place = None
        case Placement.BEFORE_LAST_USER:
            place = _try(_before_last_user, body, edits, frame)
        case Placement.SYSTEM_FIRST:
            place = _try(_system_first, body, edits, frame)
        case _:
            assert_never(placement)
    return place or edits.last_user


def _directive_place(body: bytes, edits: EditPoints, mode: InjectionMode, frame: MessageFrame) -> Place | None:
    """Every row ends with the two places that a block may go to, so that no block goes in without the directive."""
    match mode:
        case InjectionMode.SYSTEM_FIRST:
            order = [_system_first, _first_user, _last_user]
        case InjectionMode.SYSTEM_APPEND:
            order = [_system_append, _system_first, _first_user, _last_user]
        case InjectionMode.USER_PREPEND:
            order = [_first_user, _last_user, _system_first]
        case _:
            assert_never(mode)
    places = (_try(find, body, edits, frame) for find in order)
    return next((place for place in places if place is not None), None)


def _try(find: _Find, body: bytes, edits: EditPoints, frame: MessageFrame) -> Place | None:
    try:
        return find(body, edits, frame)
    except UnreadableBody:  # the stack is deeper here than when the body was read, and the body nests up to the limit
        return None


def _before_last_user(body: bytes, edits: EditPoints, frame: MessageFrame) -> Place | None:
    if edits.user_index < 0:
        return None
    return _message_place(body, frame, edits.user_index, edits.user_content_at, frame.user)


def _system_first(body: bytes, edits: EditPoints, frame: MessageFrame) -> Place | None:
    if edits.system is not None or frame.system is None:
        return edits.system
    opening = _opening(body, edits, frame)
    return _message_place(body, frame, 0, opening.first_content_at, frame.system) if opening.leading >= 0 else None


def _system_append(body: bytes, edits: EditPoints, frame: MessageFrame) -> Place | None:
    """Where there is nothing to come after, it is the beginning."""
    if frame.system is not None:
        opening = _opening(body, edits, frame)
        if opening.leading >= (1 if edits.system else 0):
            return _message_place(body, frame, opening.leading, opening.next_content_at, frame.system)
    return end_place(edits.system) if edits.system else None


def _first_user(body: bytes, edits: EditPoints, frame: MessageFrame) -> Place | None:
    """The first text of a user message that has one."""
    if edits.last_user is None:
        return None
    opening = _opening(body, edits, frame)
    at = opening.first_user_at
    if body.startswith(b'"', at):
        return _marked(at + 1)
    content = body[at : opening.first_user_end]
    if text := _text(Raw(content), frame):
        return _marked(at + locate(content, text) + 1)
    users = (turn for turn in _turns(body, frame) if turn.role == "user")
    found = (_text(turn.content, frame) for turn in islice(users, _MOST_USERS))
    text = next(filter(None, found), None)
    return None if text is None else _marked(locate(body, text) + 1)


def _last_user(body: bytes, edits: EditPoints, frame: MessageFrame) -> Place | None:  # noqa: ARG001 - as the others
    return _marked(edits.last_user.at) if edits.last_user else None


def _marked(at: int) -> Place:
    return Place(at, _MARK, rb"\n\n")


def _text(content: Raw, frame: MessageFrame) -> Raw | None:
    """The first text of a content, which nobody may have looked into yet."""
    try:
        return first_text(content, frame.text_types)
    except UnreadableBody:
        return None


def _opening(body: bytes, edits: EditPoints, frame: MessageFrame) -> Opening:
    return edits.opening or find_opening(body, _turns(body, frame))


def _turns(body: bytes, frame: MessageFrame) -> list[Turn]:
    return decode(frame.turns, decode(frame.decoder, body).array)


def _message_place(body: bytes, frame: MessageFrame, index: int, content_at: int, before: bytes) -> Place:
    """Right before the message at `index`, whose content value is at `content_at` (-1: it has none), or at the end."""
    start = object_start(body, content_at) if content_at >= 0 else -1
    if start >= 0:
        return message_place(start, before, frame.after)
    array = decode(frame.decoder, body).array
    messages = decode(_raws_decoder, array)
    if not messages:
        return element_place(body, array, before, frame.after)
    if index < len(messages):
        return message_place(locate(body, messages[index]), before, frame.after)
    return Place(locate(body, messages[-1]) + len(messages[-1]), b"," + before, frame.after)


def object_start(body: bytes, value_at: int) -> int:
    """Where the object begins that has a value at `value_at`; -1 when its members before that are not plain strings."""
    window_at = max(0, value_at - _WINDOW_BYTES)
    found = _OBJECT_START(body, window_at, value_at)
    return found.start() if found else -1
