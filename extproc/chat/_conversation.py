"""A conversation as msgspec decodes it: which message counts, what it says, where it lies, how heavy the whole is.

One typed pass over the body validates all of it and leaves contents as `Raw` views. Looked at a second time are only
the last few messages, and arrays that are long enough to hold a picture. The formats differ in names, and give those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Raw

from extproc.chat._json import ABSENT, decode, is_array, is_object
from extproc.chat._place import prefix_place
from extproc.chat._request import EditPoints, Message, Opening, UnreadableBody
from extproc.chat._span import locate
from extproc.chat._text import is_text, read_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.chat._request import Place, ReadLimits

__all__ = ["Conversation", "Turn", "check_count", "find_opening", "first_text", "read_conversation"]

MAX_ELEMENTS: Final = 20_000
"""Most messages, and most parts that are read of a body. Each costs 1 to 3 µs of Python here at worst, so that a body
made to be slow stays near the filter's 45 ms; a window of a million tokens leaves 50 for each.
"""

_LARGE_BYTES: Final = 8192
"""A field below this is counted as it stands: looking inside would cost more than the estimate gains."""
_ATTACHMENT_BYTES: Final = 6000
"""What a large picture, sound or file counts as: 1,500 tokens of four bytes, about a full-size picture."""

_SPEAKERS: Final[dict[str | None, str]] = {"user": "user", "assistant": "assistant", "model": "assistant"}
"""The roles whose messages are talk; instructions and tool output are not."""
_SYSTEM_ROLES: Final[frozenset[str | None]] = frozenset({"system", "developer"})
"""The roles whose messages are instructions, in the formats that have such messages."""

_LONG_BYTES: Final = 32768
"""In a longer body the offsets that only some insertions need are found with the rest, at 4 µs of more than 60; a
shorter one is read again for them, in about as long as it took the first time.
"""

_is_base64 = re.compile(rb'"base64"').search


class Turn(msgspec.Struct, gc=False):
    """One message. `gc=False`: it holds no containers, and the collector need not visit thousands of them."""

    role: str | None
    content: Raw = ABSENT


class _Part(msgspec.Struct, gc=False):
    """One part of a content, in whichever format: text, or the fields for pictures, sound, files and tool results."""

    type: str | None = None
    text: Raw = ABSENT
    image_url: Raw = ABSENT
    input_audio: Raw = ABSENT
    file: Raw = ABSENT
    file_data: Raw = ABSENT
    inline_data: Raw = ABSENT
    inline_data_camel: Raw = msgspec.field(default=ABSENT, name="inlineData")
    source: Raw = ABSENT
    """Anthropic's, and the only attachment that may be plain text instead."""
    content: Raw = ABSENT
    """Of a tool result, which may hold a picture in turn."""
    function_response: Raw = ABSENT
    function_response_camel: Raw = msgspec.field(default=ABSENT, name="functionResponse")

    def is_tool_result(self) -> bool:
        """Must its message directly follow the model's call, so that nothing may be put before it?"""
        return self.type == "tool_result" or len(self.function_response) + len(self.function_response_camel) > 0

    def surplus(self) -> int:
        """By how many bytes its own attachments are longer than what they count as."""
        media = [self.image_url, self.input_audio, self.file, self.file_data, self.inline_data, self.inline_data_camel]
        if len(self.source) > _LARGE_BYTES and _is_base64(self.source):
            media.append(self.source)
        return sum(len(raw) - _ATTACHMENT_BYTES for raw in media if len(raw) > _LARGE_BYTES)


_parts_decoder = msgspec.json.Decoder(list[_Part])
_part_decoder = msgspec.json.Decoder(_Part)


class _Contents:
    """The parts of a body's contents, each content read once; all together they keep to MAX_ELEMENTS."""

    def __init__(self) -> None:
        self._read: dict[int, list[_Part]] = {}
        """By the identity of the content, which its turn or part holds on to."""
        self._count = 0

    def parts(self, content: Raw) -> list[_Part]:
        """Raises UnreadableBody."""
        if is_array(content):
            return self._array(content)
        if is_object(content):  # Gemini takes a single part without its array, and its own examples are written so
            return [decode(_part_decoder, content)]
        return []

    def texts(self, content: Raw, text_types: frozenset[str | None]) -> list[Raw]:
        """The strings of a content that hold text, in order: itself, or of its parts."""
        if is_text(content):
            return [content]
        return [part.text for part in self.parts(content) if part.type in text_types and is_text(part.text)]

    def _array(self, content: Raw) -> list[_Part]:
        parts = self._read.get(id(content))
        if parts is None:
            parts = self._read[id(content)] = decode(_parts_decoder, content)
            self._count += len(parts)
            _check(self._count)
        return parts


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request says, by its messages alone."""

    query: str
    recent: tuple[Message, ...]
    content_bytes: int
    edits: EditPoints


def read_conversation(
    body: bytes,
    turns: Sequence[Turn],
    text_types: frozenset[str | None],
    limits: ReadLimits,
    system: Place | None = None,
    outputs: Iterable[Raw] = (),
) -> Conversation:
    """Find the last user message that carries text. Raises UnreadableBody.

    `text_types` are the types of parts that are text; `outputs` are contents outside of messages, for their
    attachments.
    """
    check_count(turns)
    contents = _Contents()
    index, strings = _last_user(turns, contents, text_types)
    return Conversation(
        query=read_text(strings, limits.query_bytes) if strings else "",
        recent=_recent_messages(turns, index, contents, text_types, limits),
        content_bytes=_model_bytes(body, turns, contents, outputs),
        edits=_edit_points(body, turns, index, contents, strings, system),
    )


def check_count(elements: Sequence[object]) -> None:
    """Raises UnreadableBody for too many messages or parts."""
    _check(len(elements))


def _check(count: int) -> None:
    if count > MAX_ELEMENTS:
        raise UnreadableBody("too_many_messages")


def _last_user(turns: Sequence[Turn], contents: _Contents, text_types: frozenset[str | None]) -> tuple[int, list[Raw]]:
    """The last user message that carries text: its index and its texts; -1 and nothing without one."""
    for index in range(len(turns) - 1, -1, -1):
        turn = turns[index]
        if turn.role == "user" and (strings := contents.texts(turn.content, text_types)):
            return index, strings
    return -1, []


def _edit_points(
    body: bytes, turns: Sequence[Turn], index: int, contents: _Contents, strings: list[Raw], system: Place | None
) -> EditPoints:
    parts = contents.parts(turns[index].content) if strings else []
    # The last text, not the first: a client that marks a long document as cached puts it before the question, and the
    # provider's cache holds for everything before the insertion. Both stay put while a tool loop goes on.
    last_user = prefix_place(body, strings[-1]) if strings else None
    if last_user is not None and not parts:  # a plain string: content and text are one
        content_at = last_user.at - 1
    else:
        content_at = locate(body, turns[index].content) if strings else -1
    opening = find_opening(body, turns) if len(body) > _LONG_BYTES else None
    if opening and strings and opening.first_user_at == content_at:  # its parts, which may be large, are known now
        text_at = locate(body, strings[0])
        opening = replace(opening, first_user_at=text_at, first_user_end=text_at + len(strings[0]))
    return EditPoints(
        last_user=last_user,
        system=system,
        user_index=-1 if any(part.is_tool_result() for part in parts) else index,
        user_content_at=content_at,
        first_role=turns[0].role or "" if turns else "",
        opening=opening,
    )


def find_opening(body: bytes, turns: Sequence[Turn]) -> Opening:
    """Of a body that the turns were decoded from. Nobody reads the parts of a content before they are needed."""
    leading = _count_leading(turns)
    following = turns[leading].content if leading < len(turns) else ABSENT
    following_at = _offset(body, following)
    user = _first_user(turns)
    user_at = following_at if user is following else _offset(body, user)
    return Opening(
        leading=leading,
        first_content_at=_offset(body, turns[0].content) if leading else following_at,
        next_content_at=following_at,
        first_user_at=user_at,
        first_user_end=user_at + len(user),
    )


def _count_leading(turns: Sequence[Turn]) -> int:
    for index, turn in enumerate(turns):
        if turn.role not in _SYSTEM_ROLES:
            return index
    return len(turns)


def _first_user(turns: Sequence[Turn]) -> Raw:
    """The content of the first user message that may carry text; ABSENT without one."""
    for turn in turns:
        if turn.role == "user" and _may_hold_text(turn.content):
            return turn.content
    return ABSENT


def _may_hold_text(content: Raw) -> bool:
    return is_text(content) or is_array(content) or is_object(content)


def _offset(body: bytes, raw: Raw) -> int:
    return -1 if raw is ABSENT else locate(body, raw)


def _recent_messages(
    turns: Sequence[Turn], end: int, contents: _Contents, text_types: frozenset[str | None], limits: ReadLimits
) -> tuple[Message, ...]:
    found: list[Message] = []
    for index in range(end - 1, -1, -1):
        if len(found) >= limits.recent_messages:
            break
        turn = turns[index]
        role = _SPEAKERS.get(turn.role)
        if role is not None and (strings := contents.texts(turn.content, text_types)):
            found.append(Message(role, read_text(strings, limits.recent_bytes)))
    return tuple(reversed(found))


def first_text(content: Raw, text_types: frozenset[str | None]) -> Raw | None:
    """The first text of a content; None without one. Raises UnreadableBody."""
    return next(iter(_Contents().texts(content, text_types)), None)


def _model_bytes(body: bytes, turns: Sequence[Turn], contents: _Contents, outputs: Iterable[Raw]) -> int:
    """Bytes of the body that the model will read, roughly."""
    if len(body) <= _LARGE_BYTES:
        return len(body)
    large = (content for content in chain((turn.content for turn in turns), outputs) if len(content) > _LARGE_BYTES)
    return len(body) - sum(_surplus(part, contents) for content in large for part in contents.parts(content))


def _surplus(part: _Part, contents: _Contents) -> int:
    """With what a tool result holds. No deeper: results do not nest, and each level is one more pass over its bytes."""
    inner = contents.parts(part.content) if len(part.content) > _LARGE_BYTES else []
    return part.surplus() + sum(nested.surplus() for nested in inner)
