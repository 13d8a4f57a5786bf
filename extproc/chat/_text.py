"""Text of JSON strings, up to a limit, without decoding megabytes to take kilobytes.

Everything here takes the raw spelling, quotes included, of strings that msgspec has already found well-formed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

from extproc.chat._json import decode, is_string

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from msgspec import Raw

__all__ = ["is_text", "read_text"]

_string_decoder = msgspec.json.Decoder(str)

_BLANK = re.compile(rb'"(?: |\\[ntrfb]|\\u00(?:0[89a-dA-D]|20))*+"').fullmatch
_LONGEST_BLANK: Final = 1024
"""A longer string counts as text, whatever is in it: the check is for empty and filler strings and must be cheap."""

_WHOLE_ESCAPES = re.compile(rb"(?:[^\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+").match
"""The longest beginning that does not end within an escape."""
_HIGH_SURROGATE_END = re.compile(rb"(?<!\\)(?:\\\\)*+(\\u[dD][89abAB][0-9a-fA-F]{2})\Z").search
"""Its other half was cut off: msgspec accepts no lone one, so there was one."""
_SAFE_START = re.compile(rb"[^\\]{5}[\x80-\xbf]*+(?:\\u[dD][c-fC-F][0-9a-fA-F]{2})?").search
"""Ends where a text may begin.

The longest escape is a backslash and five bytes, so after five bytes without a backslash nothing is within one. Then
whatever is left of a UTF-8 sequence or of a surrogate pair is passed over.
"""


def is_text(raw: Raw) -> bool:
    """Is it a string with something other than white space in it?"""
    return is_string(raw) and (len(raw) > _LONGEST_BLANK or _BLANK(raw) is None)


def read_text(strings: Sequence[Raw], limit_bytes: int) -> str:
    """The strings, joined by line breaks; of longer text the beginning and the end, half of the limit each.

    Both ends, because people put their question before or after what they paste. The limit is in bytes of the body,
    see `ReadLimits`. Raises UnreadableBody("not_utf8") when what is read is not UTF-8.
    """
    if sum(map(len, strings)) - 2 <= limit_bytes:
        return "\n".join([_decode(raw) for raw in strings])
    half = limit_bytes // 2
    end = _take(reversed(strings), half, _last_bytes)
    return "\n".join([*_take(strings, limit_bytes - half - 1, _first_bytes), *reversed(end)])


def _take(strings: Iterable[Raw], room: int, cut: Callable[[Raw, int], bytes]) -> list[str]:
    """Whole strings while there is room, then a piece of the next."""
    pieces = []
    for raw in strings:
        if len(raw) - 2 > room:
            pieces.append(_decode(b'"%b"' % cut(raw, room)))
            break
        pieces.append(_decode(raw))
        room = max(0, room + 1 - len(raw))  # its line break counts
    return [piece for piece in pieces if piece]


def _first_bytes(raw: Raw, size: int) -> bytes:
    """At most `size` bytes from the inside of a longer string, cut between two characters."""
    inside = memoryview(raw)[1:-1]
    size = max(0, size)
    while size and inside[size] & 0xC0 == 0x80:  # the next byte continues a UTF-8 sequence
        size -= 1
    whole = _WHOLE_ESCAPES(inside[:size])
    piece = whole.group() if whole else b""
    half_pair = _HIGH_SURROGATE_END(piece)
    return piece[: half_pair.start(1)] if half_pair else piece


def _last_bytes(raw: Raw, size: int) -> bytes:
    """At most `size` bytes from the end of a longer string.

    Nothing where escapes stand so close together that no safe place is found: rare, and the beginning is still read.
    """
    inside = memoryview(raw)[1:-1]
    safe = _SAFE_START(inside, max(0, len(inside) - size - 5))
    return bytes(inside[safe.end() :]) if safe else b""


def _decode(raw: Raw | bytes) -> str:
    return decode(_string_decoder, raw)
