"""JSON of providers, read loosely: a wrong type is an unknown value, and no failure.

Providers and those who imitate them disagree about types. What an answer's text depends on is typed by the formats; the
rest they take as `Raw`, and it is read here.
"""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec
from msgspec import Raw

from extproc.chat._json import ABSENT, is_object, is_string, read_count

__all__ = [
    "Counts",
    "add",
    "is_given",
    "read_arguments",
    "read_code",
    "read_error",
    "read_id",
    "read_string",
    "try_decode",
]

_LONGEST_SCALAR: Final = 1024
"""A longer value is no name, id or code."""
_LONGEST_REPAIR: Final = 256 * 1024
"""Repairing costs about 30 times as much as decoding."""

_LONE_SURROGATE = re.compile(rb"(\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F]..")
"""Or, as a group that stays: an escaped backslash, which begins no other escape, or a whole pair."""

_NULL: Final = Raw(b"null")

T = TypeVar("T")

_string_decoder = msgspec.json.Decoder(str)


def try_decode(decoder: msgspec.json.Decoder[T], source: bytes | Raw) -> T | None:
    """None: not JSON, or not of that shape. Bytes that are not UTF-8 and lone surrogates are read as U+FFFD.

    The WHATWG has event streams decoded so, and programs that cut text between UTF-16 units send lone surrogates.
    """
    try:
        return decoder.decode(source)
    except RecursionError:
        return None
    except ValueError:  # msgspec's own, and UnicodeDecodeError
        pass
    repaired = _repaired(bytes(source)) if len(source) <= _LONGEST_REPAIR else source
    if repaired == source:
        return None
    try:
        return decoder.decode(repaired)
    except (RecursionError, ValueError):
        return None


def _repaired(source: bytes) -> bytes:
    text = source.decode("utf-8", "replace").encode()
    return _LONE_SURROGATE.sub(lambda found: found[1] or rb"\ufffd", text)


def is_given(raw: Raw) -> bool:
    """Is it there, and not `null`?"""
    return len(raw) > 4 or (len(raw) > 0 and raw != _NULL)


def read_string(raw: Raw) -> str:
    """The text of a string; empty for any other value."""
    return (try_decode(_string_decoder, raw) or "") if is_string(raw) else ""


_NUMBER = re.compile(rb"-?\d+").fullmatch
_UNFIT_FOR_ID = re.compile(r"[^!-~]+")
_UNFIT_FOR_CODE = re.compile(r"[^A-Za-z0-9_.-]+")
_has_space = re.compile(r"\s").search


def _read_scalar(raw: Raw) -> str:
    if len(raw) > _LONGEST_SCALAR:
        return ""
    return bytes(raw).decode() if _NUMBER(raw) else read_string(raw)


def read_id(raw: Raw) -> str:
    """An id or a name: at most 256 visible ASCII characters."""
    return _UNFIT_FOR_ID.sub("", _read_scalar(raw))[:256]


def read_code(*fields: Raw) -> str:
    """The first word among the fields, else the first number: at most 64 of `[A-Za-z0-9_.-]`; empty without either.

    What has white space in it is a sentence, and may quote what was said.
    """
    scalars = (_read_scalar(raw) for raw in fields)
    codes = [_UNFIT_FOR_CODE.sub("", scalar)[:64] for scalar in scalars if not _has_space(scalar)]
    return next((code for code in codes if code and not code.isdigit()), next(filter(None, codes), ""))


class _Error(msgspec.Struct, gc=False):
    code: Raw = ABSENT
    status: Raw = ABSENT
    """Gemini's word for its numeric `code`."""
    type: Raw = ABSENT


_error_decoder = msgspec.json.Decoder(_Error)
_NO_ERRORS: Final = {b"", b"null", b"false", b'""'}


def read_error(raw: Raw) -> str:
    """Type or code out of an `error` value; `error` when it has neither, empty when it is none."""
    if bytes(memoryview(raw)[:8]) in _NO_ERRORS:
        return ""
    error = try_decode(_error_decoder, raw) if is_object(raw) else None
    found = read_code(error.code, error.status, error.type) if error else read_code(raw)
    return found or "error"


def read_arguments(raw: Raw) -> str:
    """Of a tool call: the text of a string, any other value as it is spelled."""
    if is_string(raw):
        return read_string(raw)
    return bytes(raw).decode("utf-8", "replace") if is_given(raw) else ""


_members_decoder = msgspec.json.Decoder(dict[str, Raw])


class Counts:
    """The numbers of a usage object; of none of them where it is no object."""

    def __init__(self, raw: bytes | Raw = b"") -> None:
        self._members = try_decode(_members_decoder, raw) or {}

    def get(self, *names: str) -> int | None:
        """The first that is a count."""
        return read_count(*(self._members.get(name, ABSENT) for name in names))

    def inner(self, name: str) -> Counts:
        return Counts(self._members.get(name, ABSENT))


def add(*counts: int | None) -> int | None:
    """None: none of them is known."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
