"""Hashes of what was said, for checkpoints: the same words give the same hash, however a client spells its JSON."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import msgspec

from extproc.chat._conversation import check_count
from extproc.chat._json import ABSENT, decode, is_string
from extproc.chat._request import UnreadableBody

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msgspec import Raw

    from extproc.chat._conversation import Turn

__all__ = ["hash_text", "hash_turns"]

_string_decoder = msgspec.json.Decoder(str)
_encode = msgspec.json.Encoder().encode
_has_escape = re.compile(rb"\\").search


def hash_text(text: str) -> str:
    """SHA-256 of its UTF-8, lower-case hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_turns(turns: Sequence[Turn]) -> str:
    r"""SHA-256, lower-case hex, of the messages' canonical JSON. Raises UnreadableBody.

    That is the array of `{"role":…,"content":…}`, keys in this order, in UTF-8 and without white space. A string that
    is a role or a content has the fewest escapes: `\"`, `\\`, `\b`, `\f`, `\n`, `\r`, `\t`, and `\u00xx` for the other
    control characters. Any other content is what the client wrote, without the white space outside of its strings. An
    absent content is `null`. A body with lone surrogates is refused here as it is by `read_request`.
    """
    check_count(turns)
    # Joined, since one call for megabytes lets other threads run, and thousands of calls would not pay for themselves.
    return hashlib.sha256(b"".join(_pieces(turns))).hexdigest()


def _pieces(turns: Sequence[Turn]) -> Iterator[bytes | Raw]:
    before = b"[{"
    for turn in turns:
        yield b'%b"role":%b,"content":' % (before, _encode(turn.role))
        yield _canonical(turn.content)
        before = b"},{"
    yield b"}]" if turns else b"[]"


def _canonical(content: Raw) -> bytes | Raw:
    if content is ABSENT:
        return b"null"
    if not is_string(content):
        return _compact(content)
    # Without a backslash there is nothing that could be spelled differently.
    return _encode(decode(_string_decoder, content)) if _has_escape(content) else content


def _compact(content: Raw) -> bytes:
    """Numbers and strings stay as they are spelled."""
    try:
        return msgspec.json.format(content, indent=-1)
    except RecursionError:
        reason = "too_deep"
    except ValueError:
        reason = "not_json"
    raise UnreadableBody(reason)
