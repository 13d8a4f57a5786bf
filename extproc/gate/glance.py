"""The headers that decide about a request, cut out of Envoy's question as they are, without decoding it. Pure.

A question of a known caller differs from its last one in time, port and request id only. To decode it all, to find the
same token in it and to hash that costs a third of a bare gRPC call; walking over its bytes, a twentieth. Nothing is
decided here: the cut is compared with what the same bytes meant when protobuf read them (`extproc.gate.repeats`).

Only the shape is taken that Envoy writes with `encode_raw_headers`: each message once, each header's name before its
value. Of anything else nothing is said, and it is decoded. Numbers are those of envoy.service.auth.v3 and of
envoy.config.core.v3; tags are `number << 3 | 2` (Protocol Buffers, "Encoding", Message Structure).
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Final, TypeAlias

import msgspec
from typing_extensions import override

__all__ = ["Sight", "cut"]

_ATTRIBUTES: Final = 1 << 3 | 2
"""CheckRequest."""
_REQUEST: Final = 4 << 3 | 2
"""AttributeContext."""
_HTTP: Final = 2 << 3 | 2
"""AttributeContext.Request."""
_PATH: Final = 4 << 3 | 2
_HEADER_MAP: Final = 13 << 3 | 2
"""AttributeContext.HttpRequest."""
_HEADERS: Final = 1 << 3 | 2
"""HeaderMap."""
_KEY: Final = 1 << 3 | 2
_VALUES: Final = frozenset((2 << 3 | 2, 3 << 3 | 2))
"""HeaderValue: value and raw_value."""

_LENGTH_DELIMITED, _VARINT = 2, 0

_Span: TypeAlias = tuple[int, int]
"""Where a field's content begins and ends."""
_NOWHERE: Final = (-1, -1)


class _Unusual(Exception):
    """Not the shape that is read here."""


class Sight(msgspec.Struct, frozen=True, gc=False):
    headers: bytes
    """The entries of the named headers, one behind the other as they were sent. Equal bytes are equal headers: each
    entry brings its length, so that where one ends is never in doubt."""
    path: str

    @override
    def __repr__(self) -> str:
        return "Sight()"  # they hold the token


def cut(raw: bytes, names: AbstractSet[bytes]) -> Sight | None:
    """None: nothing is known of it, decode it."""
    try:
        [span] = _spans(raw, (0, len(raw)), (_ATTRIBUTES,))
        [span] = _spans(raw, span, (_REQUEST,))
        [span] = _spans(raw, span, (_HTTP,))
        (start, end), span = _spans(raw, span, (_PATH, _HEADER_MAP))
        return Sight(_entries(raw, span, names), raw[start:end].decode())
    except (_Unusual, IndexError, UnicodeDecodeError):
        return None


def _spans(raw: bytes, message: _Span, tags: tuple[int, ...]) -> list[_Span]:
    """Where the fields with these tags are in `message`, each of which must be there once."""
    at, end = message
    found = [_NOWHERE] * len(tags)
    while at < end:
        tag = raw[at]
        at += 1
        if tag > 0x7F:
            tag, at = _varint(raw, at - 1)
        if tag & 7 == _LENGTH_DELIMITED:
            size = raw[at]
            at += 1
            if size > 0x7F:
                size, at = _varint(raw, at - 1)
            if tag in tags:
                place = tags.index(tag)
                if found[place] is not _NOWHERE:
                    raise _Unusual
                found[place] = (at, at + size)
            at += size
        elif tag & 7 == _VARINT:
            _, at = _varint(raw, at)
        else:
            raise _Unusual
    if at != end or _NOWHERE in found:
        raise _Unusual
    return found


def _entries(raw: bytes, message: _Span, names: AbstractSet[bytes]) -> bytes:
    at, end = message
    entries = []
    while at < end:
        start = at
        if raw[at] != _HEADERS:
            raise _Unusual
        size, value = raw[at + 1], at + 2
        if size > 0x7F:
            size, value = _varint(raw, at + 1)
        at = value + size
        # The key, whose name is short; then one value that reaches up to the end.
        if raw[value] != _KEY or raw[value + 1] > 0x7F:
            raise _Unusual
        name = value + 2
        value = name + raw[value + 1]
        if value < at:
            _check_value(raw, value, at)
        elif value > at:
            raise _Unusual
        if raw[name:value] in names:
            entries.append(raw[start:at])
    if at != end:
        raise _Unusual
    return b"".join(entries)


def _check_value(raw: bytes, at: int, end: int) -> None:
    if raw[at] not in _VALUES:
        raise _Unusual
    size, at = _varint(raw, at + 1)
    if at + size != end:
        raise _Unusual


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    number = shift = 0
    for _ in range(10):
        byte = raw[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise _Unusual
