"""Places in a body, as the reading finds them: the beginning of a string, of an array, a new key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from extproc.chat._request import Place
from extproc.chat._span import locate

if TYPE_CHECKING:
    from msgspec import Raw

__all__ = ["element_place", "end_place", "key_place", "message_place", "prefix_place"]

_is_empty_array = re.compile(rb"\[[ \t\r\n]*+\]").fullmatch


def prefix_place(body: bytes, string: Raw) -> Place:
    """The beginning of a string, with a blank line after the text."""
    at = locate(body, string)
    return Place(at + 1, b"", rb"\n\n", end=at + len(string) - 1)


def element_place(body: bytes, array: Raw, before: bytes, after: bytes) -> Place:
    """A new first element of an array."""
    at = locate(body, array)
    between = after + b"," + before
    if _is_empty_array(array):
        return Place(at + 1, before, after, between)
    return Place(at + 1, before, after + b",", between, at + len(array) - 1)


def key_place(body: bytes, before: bytes, after: bytes) -> Place:
    """A new first key of the body, which must be an object with at least one key."""
    return Place(body.index(b"{") + 1, before, after + b",")


def message_place(at: int, before: bytes, after: bytes) -> Place:
    """A new element of an array, right before the one at `at`."""
    return Place(at, before, after + b",", after + b"," + before)


def end_place(place: Place) -> Place:
    """The end of what `place` is the beginning of; the place itself where that is empty, or a new key."""
    if place.end <= place.at:
        return place
    if not place.before:  # within a string: nothing but a blank line is needed
        return Place(place.end, rb"\n\n", b"")
    return Place(place.end, b"," + place.before, place.after.removesuffix(b","))
