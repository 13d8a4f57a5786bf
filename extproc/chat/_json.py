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

_MOST_BRACES: Final = 100_000
"""Objects of a body, and braces in its strings. An empty object is three bytes of a body and 0.1 to 0.2 µs of the
decoder, which nobody can stop: 5 MB of them would hold the event loop for 0.2 s. A million tokens have fewer.
"""

_SOME_BRACES: Final = 1_000
"""At 0.1 µs each."""

T = TypeVar("T")


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Decode a body as it came, which is looked through first. Raises UnreadableBody."""
    if len(body) > _MOST_BRACES and _is_made_of_braces(body):
        raise UnreadableBody("too_many_messages")
    return decode(decoder, body)


def _is_made_of_braces(body: bytes) -> bool:
    # A brace before a backslash is in a string: JSON and code that somebody quotes do not count.
    return _has_some_braces(body) and _has_most_braces(body) and _has_most_braces(body.replace(b"{\\", b""))


def _has_some_braces(body: bytes) -> bool:
    """Most bodies have few, whatever their size; those are not copied to be counted."""
    at = -1
    for _ in range(_SOME_BRACES):
        at = body.find(b"{", at + 1)
        if at < 0:
            return False
    return True


def _has_most_braces(body: bytes) -> bool:
    # `replace` looks for one byte with memchr and stops at the limit; `count` and `split` take ten times as long.
    return len(body) - len(body.replace(b"{", b"", _MOST_BRACES)) == _MOST_BRACES


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
