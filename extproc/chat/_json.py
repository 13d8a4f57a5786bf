"""JSON values as they stand in a body: decoding with one kind of failure, and what kind of value a `Raw` is."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec
from msgspec import Raw

from extproc.chat._request import UnreadableBody

__all__ = ["ABSENT", "decode", "decode_body", "is_array", "is_object", "is_string", "read_count"]

ABSENT: Final = Raw()
"""Default of a `Raw` field: the key is not there. No JSON value is empty."""

_STRING = re.compile(rb'"').match
_ARRAY = re.compile(rb"\[").match
_OBJECT = re.compile(rb"\{").match
_COUNT = re.compile(rb"\d{1,9}").fullmatch

_MOST_OBJECTS: Final = 150_000
"""Most objects in a body, opening braces in strings included: no prompt has one for each 7 tokens of a million.

Each costs up to 0.2 µs to build, and how many an array has is known only when all of them are built: 10 MiB of `{},`
would hold the process for half a second.
"""
_SHORTEST_OBJECT: Final = len(b"{},")

T = TypeVar("T")


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Decode a whole body, as `decode` does; one with too many objects is refused before anything is built."""
    if len(body) > _MOST_OBJECTS * _SHORTEST_OBJECT and body.count(b"{") > _MOST_OBJECTS:
        raise UnreadableBody("too_many_messages")
    return decode(decoder, body)


def decode(decoder: msgspec.json.Decoder[T], source: bytes | Raw) -> T:
    """Decode, with every failure as UnreadableBody.

    It is raised outside the handlers: their errors may hold the client's bytes, and would stay attached to it.
    """
    try:
        return decoder.decode(source)
    except RecursionError:
        reason = "too_deep"
    except msgspec.ValidationError:
        reason = "wrong_type"
    except UnicodeDecodeError:
        reason = "not_utf8"
    except ValueError:  # msgspec.DecodeError, and what numbers may raise
        reason = "not_json"
    raise UnreadableBody(reason)


def is_string(raw: Raw) -> bool:
    return _STRING(raw) is not None


def is_array(raw: Raw) -> bool:
    return _ARRAY(raw) is not None


def is_object(raw: Raw) -> bool:
    return _OBJECT(raw) is not None


def read_count(*fields: Raw) -> int | None:
    """The first of the fields that is a plain non-negative integer; None without one."""
    return next((int(bytes(field)) for field in fields if _COUNT(field)), None)
